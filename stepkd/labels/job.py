"""The labelling job: draw or read solutions, cut them into steps, label the steps; sharded and resumable.

Two phases, each a fixed list of groups whose results are appended to the shards (:mod:`stepkd.labels.shards`). First
the solutions are drawn (or given ones graded), then they are cut and labelled. A threshold that is to be fitted is
fitted between the two, on all solutions, and saved; a resumed job reads it. Every draw is keyed by the solution's
number and every group has a fixed composition, so the labels do not depend on the number of ranks or on interruptions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepkd.data.io import write_jsonl_atomic
from stepkd.data.spec import LABELS_NAME
from stepkd.errors import DataError
from stepkd.evaluation.disk import write_atomically
from stepkd.evaluation.folder import SUMMARY_NAME
from stepkd.labels.folder import THRESHOLD_NAME, prepare_job_folder
from stepkd.labels.labeller import Labeller, Solution
from stepkd.labels.manifest import segmenter_settings
from stepkd.labels.matching import row_labels, verdicts
from stepkd.labels.settings import LabelSpec
from stepkd.labels.setup import JobParts, job_parts
from stepkd.labels.shards import Shards, work_through
from stepkd.labels.solutions import Candidate, SolutionSource, cut, drop_duplicates, labelled_row
from stepkd.labels.summary import summarise_labels
from stepkd.steps import Segmenter, get_segmenter
from stepkd.steps.threshold import SegmentThreshold, fit_threshold

Report = Callable[[str, int, int, Mapping[str, float]], None]
"""Called with the phase, items this rank has done, its items in all, and running figures."""

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
    with made.grader:
        prepare_job_folder(
            spec.out,
            made.manifest,
            rank=rank,
            world_size=world_size,
            launch=launch,
            overwrite=overwrite,
            wait_s=wait_s,
            say=say,
        )
        job = _Job(spec, made, rank, world_size, report)
        job.draw()
        drawn = job.drawn.wait(len(made.source.groups()), world_size, timeout_s=wait_s, say=say)
        return job.label(drawn)


class _Job:
    """One rank's view of the job."""

    def __init__(self, spec: LabelSpec, parts: JobParts, rank: int, world_size: int, report: Report | None) -> None:
        self.spec = spec
        self.out = Path(spec.out)
        self.source: SolutionSource = parts.source
        self.labeller: Labeller = parts.labeller
        self.parts = parts
        self.rank = rank
        self.world_size = world_size
        self.report = report
        self.drawn = Shards(self.out, SOLUTIONS, rank=rank)
        self.labelled = Shards(self.out, LABELS, rank=rank)

    def draw(self) -> None:
        """This rank's share of the first phase."""
        self._work(self.drawn, self.source.groups(), self.source.work, _right_answers)

    def label(self, drawn: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
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

        self._work(self.labelled, groups, work, _right_steps)
        records = self.labelled.rows()
        if len({record["batch"] for record in records}) < len(groups):
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
        path = self.out / THRESHOLD_NAME
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
        threshold.save(path)
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
        write_atomically(self.out / SUMMARY_NAME, (json.dumps(summary, indent=2) + "\n").encode())
        if not summary["labelled"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in summary["dropped"].items())
            raise DataError(f"none of {summary['solutions']} solutions could be labelled ({reasons})", path=self.out)
        write_jsonl_atomic(self.out / LABELS_NAME, (record["row"] for record in records if "row" in record))
        return summary

    def _work(
        self,
        shards: Shards,
        groups: Sequence[Sequence[int]],
        work: Callable[[Sequence[int]], Sequence[Mapping[str, Any]]],
        figures: Callable[[Sequence[Mapping[str, Any]]], tuple[str, int, int]],
    ) -> None:
        """Do this rank's groups of a phase and report on them."""
        mine = range(self.rank, len(groups), self.world_size)
        total, finished = sum(len(groups[number]) for number in mine), shards.finished()
        done = sum(len(groups[number]) for number in mine if number in finished)
        right = judged = 0

        def report(rows: Sequence[Mapping[str, Any]]) -> None:
            nonlocal done, right, judged
            name, good, seen = figures(rows)
            done, right, judged = done + len(rows), right + good, judged + seen
            if self.report is not None:
                self.report(shards.phase, done, total, {name: right / judged} if judged else {})

        work_through(shards, groups, work, rank=self.rank, world_size=self.world_size, report=report)


def _right_answers(rows: Sequence[Mapping[str, Any]]) -> tuple[str, int, int]:
    known = [sample["correct"] for row in rows for sample in row.get("samples", [row])]
    known = [correct for correct in known if correct is not None]
    return "answers right", sum(known), len(known)


def _right_steps(rows: Sequence[Mapping[str, Any]]) -> tuple[str, int, int]:
    marks = [mark for row in rows if "row" in row for mark in verdicts(row_labels(row["row"])) if mark is not None]
    return "steps right", sum(marks), len(marks)
