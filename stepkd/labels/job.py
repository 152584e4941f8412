"""The labelling job: draw or read solutions, cut them into steps, label the steps; sharded and resumable.

Two phases, each a fixed list of groups whose results are appended to the shards (:mod:`stepkd.labels.shards`). First
the solutions are drawn (or given ones graded), then they are cut and labelled. A threshold that is to be fitted is
fitted between the two, on all solutions, and saved; a resumed job reads it. Every draw is keyed by the solution's
number and every group has a fixed composition, so the labels do not depend on the number of ranks or on interruptions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepkd.data.spec import LABELS_NAME
from stepkd.errors import DataError
from stepkd.labels.folder import THRESHOLD_NAME
from stepkd.labels.labellers import Labeller, Solution
from stepkd.labels.manifest import segmenter_settings
from stepkd.labels.quality import row_labels, summarise_labels
from stepkd.labels.settings import LabelSpec
from stepkd.labels.setup import JobParts, job_parts
from stepkd.labels.sharded_job import Report, ShardedJob
from stepkd.labels.solutions import Candidate, SolutionSource, cut, drop_duplicates, labelled_row
from stepkd.runs.files import write_json
from stepkd.steps import Segmenter, get_segmenter
from stepkd.steps.labels import verdicts
from stepkd.steps.threshold import SegmentThreshold, fit_threshold

SOLUTIONS, LABELS = "solutions", "labels"


def run_label_job(
    spec: LabelSpec,
    *,
    rank: int = 0,
    world_size: int = 1,
    launch: str | None = None,
    overwrite: bool = False,
    wait_s: float = 1800.0,
    parts: JobParts | None = None,
    report: Report | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any] | None:
    """Run a labelling job, go on with it, or do one rank's share of it.

    Args:
        spec: what to label, how, and where to write.
        rank, world_size: this process among those at work, on one shared disk; they need no process group. A resumed
            job may have another number of ranks.
        launch: a word that the ranks of this launch share; see :func:`~stepkd.labels.folder.prepare_job_folder`.
        overwrite: delete an earlier job in the folder, once everything else has been found to be in order.
        wait_s: longest wait for other ranks without news (s).
        parts: an already made source of solutions, labeller and manifest, in place of those that ``spec`` describes.
        report: told of progress after every group.
        say: told what is waited for.

    Returns:
        The summary, written to ``summary.json`` beside ``labels.jsonl``; None while groups of other ranks are missing
        (the last rank to finish writes them).

    Raises:
        ConfigError: the folder holds another job (its settings are named), or settings contradict each other.
        DataError, ModelError: data or model cannot be used.
        StepkdError: the folder cannot be written, or other ranks do not come.
    """
    made = parts or job_parts(spec, rank=rank, overwrite=overwrite)
    sharded = ShardedJob(
        Path(spec.out),
        rank=rank,
        world_size=world_size,
        launch=launch,
        overwrite=overwrite,
        wait_s=wait_s,
        report=report,
        say=say,
    )
    with made.grader:
        sharded.begin(made.manifest)
        groups = made.source.groups()
        sharded.work(SOLUTIONS, groups, made.source.work, _right_answers)
        return _Labelling(spec, made, sharded).run(sharded.wait(SOLUTIONS, groups))


class _Labelling:
    """One rank's view of the second phase."""

    def __init__(self, spec: LabelSpec, parts: JobParts, job: ShardedJob) -> None:
        self.spec = spec
        self.source: SolutionSource = parts.source
        self.labeller: Labeller = parts.labeller
        self.parts = parts
        self.job = job

    def run(self, drawn: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """This rank's share of the second phase; the summary when nothing is left to do for anybody."""
        found = [candidate for record in drawn for candidate in self.source.candidates(record)]
        kept, duplicates = drop_duplicates(found) if self.spec.dedupe and self.parts.drawn else (found, 0)
        if not kept:
            raise DataError("no solution is left to label: every row is longer than the model's context")
        segmenter = self._segmenter(kept)
        provenance = self._provenance(segmenter)
        size = self.parts.group_size
        groups = [list(range(start, min(start + size, len(kept)))) for start in range(0, len(kept), size)]

        def work(items: Sequence[int]) -> list[dict[str, Any]]:
            return self._label_group([kept[item] for item in items], segmenter, provenance)

        self.job.work(LABELS, groups, work, _right_steps)
        records = self.job.records(LABELS, groups)
        if records is None:
            return None
        too_long = sum(bool(record.get("too_long")) for record in drawn)
        summary = summarise_labels(records, len(found) + too_long, duplicates, drawn, too_long=too_long)
        summary |= {"threshold": getattr(segmenter, "threshold", None), "segmenter": provenance["segmenter"]}
        return self._merge(records, summary)

    def _segmenter(self, candidates: Sequence[Candidate]) -> Segmenter | None:
        """The job's segmenter; a threshold that is to be fitted is fitted once and read from then on."""
        spec = self.spec
        if spec.segmenter is None:
            return None if not self.parts.drawn else get_segmenter("newline")
        if not spec.fits_threshold:
            return get_segmenter(spec.segmenter)
        path = self.job.out / THRESHOLD_NAME
        if path.is_file():
            return SegmentThreshold.load(path).segmenter()
        (signal,) = spec.signals
        threshold = fit_threshold(
            [candidate.signals[signal] for candidate in candidates],
            spec.quantile,
            signal="confidence" if signal == "logprobs" else "entropy",
            model=self.parts.model,
            sampling=self.parts.manifest["sampling"],
            seed=spec.seed,
        )
        write_json(path, threshold.to_dict())
        return threshold.segmenter()

    def _provenance(self, segmenter: Segmenter | None) -> dict[str, Any]:
        settings = {} if segmenter is None else segmenter_settings(segmenter)
        name = "of the row" if segmenter is None else self.spec.segmenter_kind or "newline"
        return self.labeller.provenance() | {
            "segmenter": {"name": name} | settings,
            "prompt": self.parts.manifest["prompt"],
            "data": self.parts.manifest["data"]["source"],
            "dedupe": self.spec.dedupe and self.parts.drawn,
        }

    def _label_group(
        self, candidates: Sequence[Candidate], segmenter: Segmenter | None, provenance: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        default = get_segmenter("newline")
        found = [cut(candidate, self.parts.tokenizer, segmenter, default) for candidate in candidates]
        solutions = [solution for solution in found if isinstance(solution, Solution)]
        labelled = iter(self.labeller.label(solutions) if solutions else [])
        records: list[dict[str, Any]] = []
        for candidate, solution in zip(candidates, found, strict=True):
            record: dict[str, Any] = {"id": candidate.id, "index": candidate.index}
            if isinstance(solution, str):
                record["dropped"] = solution
            else:
                labels = next(labelled)
                if all(label is None for label in labels.labels):
                    record |= {"dropped": "no_labels", "facts": dict(labels.facts)}
                else:
                    earlier = (candidate.columns.get("labelling") or {}).get("segmenter")
                    own = {"segmenter": earlier} if segmenter is None and earlier else {}
                    record["row"] = labelled_row(candidate, solution, labels, {**provenance, **own})
            records.append(record)
        return records

    def _merge(self, records: Sequence[Mapping[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
        """Write the labels and the summary; every rank that gets here writes the same."""
        refuse = None
        if not summary["labelled"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in summary["dropped"].items())
            refuse = f"none of {summary['solutions']} solutions could be labelled ({reasons})"
        rows = (record["row"] for record in records if "row" in record)
        self.job.write(LABELS_NAME, rows, summary, refuse=refuse)
        return summary


def _right_answers(rows: Sequence[Mapping[str, Any]]) -> tuple[str, int, int]:
    known = [sample["correct"] for row in rows for sample in row.get("samples", [row])]
    known = [correct for correct in known if correct is not None]
    return "answers right", sum(known), len(known)


def _right_steps(rows: Sequence[Mapping[str, Any]]) -> tuple[str, int, int]:
    marks = [mark for row in rows if "row" in row for mark in verdicts(row_labels(row["row"])) if mark is not None]
    return "steps right", sum(marks), len(marks)
