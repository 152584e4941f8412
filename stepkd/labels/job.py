"""The jobs of ``stepkd label`` and ``stepkd pairs``, both jobs of :mod:`stepkd.runs.job`.

A labelling job has two phases. First the solutions are drawn (or those of the rows graded), then they are cut into
steps and labelled. A threshold that is to be fitted is fitted between the two, on all solutions.

A pair job has one phase. A builder names its items in groups and turns a group into one record per item; when no group
is missing, the records' rows go to ``pairs.jsonl`` in the order of the items, with a summary of what was left out and
what it cost.

Every draw is keyed by the number of its solution or item and every unit has a fixed composition, so the results do not
depend on the number of ranks or on interruptions.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepkd.data.config import LABELS_NAME, PAIRS_NAME
from stepkd.errors import DataError
from stepkd.labels.labellers import Labeller, Row, Solution
from stepkd.labels.monte_carlo import MonteCarlo
from stepkd.labels.quality import row_labels, summarise_labels
from stepkd.labels.settings import (
    Fitted,
    LabelConfig,
    OwnSteps,
    PairJobConfig,
    Sampled,
    StepPairConfig,
    TreePairConfig,
)
from stepkd.labels.solutions import ExistingSolutions, SampledSolutions, cut, labelled_row
from stepkd.labels.step_pairs import StepPairBuilder
from stepkd.labels.tree_pairs import TreePairBuilder
from stepkd.labels.workbench import Workbench
from stepkd.models.checkpoint import load_trained, weights_fingerprint
from stepkd.models.policy import Policy
from stepkd.runs.files import write_json
from stepkd.runs.job import ALONE, SUMMARY_NAME, Job, JobOptions, finished_rows, numbered
from stepkd.sampling.engine import Engine
from stepkd.scorers.scorer import problem_key
from stepkd.steps.confidence import SegmentThreshold, fit_threshold
from stepkd.steps.labels import verdicts
from stepkd.steps.segment import Segmenter, get_segmenter, segmenter_settings

KIND, PAIR_KIND, THRESHOLD_NAME = "labelling job", "pair job", "threshold.json"
SOLUTIONS, LABELS, PAIRS = "solutions", "labels", "pairs"


# ---- labels --------------------------------------------------------------------------------------------------------


def run_label_job(
    config: LabelConfig,
    *,
    options: JobOptions = ALONE,
    policy: Policy | None = None,
    engine: Engine | None = None,
    labeller: Labeller | None = None,
) -> dict[str, Any] | None:
    """Run a labelling job, resume it, or do one rank's share of it.

    Args:
        config: what to label, how, and where to write.
        options: how this process takes part.
        policy, engine, labeller: already made ones to use in place of those that ``config`` describes.

    Returns:
        The summary, written to ``summary.json`` beside ``labels.jsonl``; None while units of other ranks are missing
        (the last rank to finish writes them).

    Raises:
        ConfigError: the folder holds another job (its settings are named), or settings contradict each other.
        DataError, ModelError: data or model cannot be used.
        MachineError: the folder cannot be written.
        StepkdError: other ranks do not come.
    """
    job = Job(Path(config.out), KIND, (LABELS_NAME, SUMMARY_NAME, THRESHOLD_NAME), options)
    job.check()
    labelling = Labelling(config, job, policy, engine, labeller)
    if options.rank == 0:
        _warn_of_foreign_threshold(config, labelling.bench.model)
    with labelling.bench.grader:
        job.begin(labelling.settings)
        units = numbered(labelling.source.groups())
        job.work(SOLUTIONS, units, labelling.source.work, _correct_answers)
        return labelling.label(job, job.wait(SOLUTIONS, units))


def drawn_records(out: str | Path) -> list[dict[str, Any]]:
    """Records of a finished job's first phase: the solutions as they were drawn, also those that were not labelled."""
    return finished_rows(out, SOLUTIONS)


class Labelling:
    """What a labelling job works with; everything that can be checked before the work begins is checked here.

    Args:
        config: the job's settings.
        job: keeps what is measured.
        policy, engine, labeller: see :func:`run_label_job`.

    Raises:
        ConfigError, DataError, ModelError: settings, data or models that cannot be used.
    """

    def __init__(
        self, config: LabelConfig, job: Job, policy: Policy | None, engine: Engine | None, labeller: Labeller | None
    ) -> None:
        solutions, steps = config.solutions, config.steps
        drawn = solutions if isinstance(solutions, Sampled) else None
        self.config = config
        needs, problems = config.labeller.needs, drawn is not None
        self.bench = bench = Workbench(
            config, solutions.source, solutions.model, needs, problems=problems, job=job, policy=policy
        )
        continues = config.labeller.continues or bool(steps.signals)
        if continues and drawn is None:
            bench.check_prompt()
        teacher = None if steps.teacher is None else load_trained(steps.teacher, dtype=bench.dtype).to(bench.device)
        if engine is None and (continues or drawn is not None):  # else only the policy's tokenizer is used
            engine = bench.engine()
        self.labeller = labeller or config.labeller.build(bench, engine)
        sampling = None if drawn is None else bench.limited(drawn.sampling)
        self.source: SampledSolutions | ExistingSolutions
        if sampling is not None:
            assert engine is not None
            self.source = SampledSolutions(bench, engine, sampling, steps.signals, teacher)
        else:
            keep = isinstance(steps, OwnSteps)
            self.source = ExistingSolutions(bench, keep_steps=keep, signals=steps.signals, teacher=teacher)
        self.dedupe = drawn is not None and drawn.dedupe
        self.settings = bench.settings() | {
            "teacher": None if teacher is None else {"name": steps.teacher, "weights": weights_fingerprint(teacher)},
            "sampling": None if sampling is None else asdict(sampling),
            "dedupe": None if drawn is None else self.dedupe,
            "labeller": self.labeller.provenance(),
            "segmenter": steps.settings(),
        }

    def label(self, job: Job, drawn: Sequence[Row]) -> dict[str, Any] | None:
        """This rank's share of the second phase; the summary when nothing is left to do for anybody."""
        kept = found = [solution for record in drawn for solution in self.source.solutions(record)]
        if self.dedupe:
            first: dict[tuple[str, ...], Solution] = {}
            for each in found:  # the first of several solutions of one problem with the same text stays
                first.setdefault((str(each.row["id"]), each.text, each.finish), each)
            kept = list(first.values())
        if not kept:
            raise DataError("no solution is left to label: every row is longer than the model's context")
        segmenter, cut_by = self._segmenter(job.out, kept)
        provenance = self.labeller.provenance() | {
            "segmenter": cut_by,
            "prompt": self.bench.prompt_id,
            "data": self.bench.source,
            "dedupe": self.dedupe,
        }
        labeller = self.config.labeller
        n, share = (labeller.sampling.n, labeller.share) if isinstance(labeller, MonteCarlo) else (1, False)
        units = numbered(_batches(kept, max(1, self.config.engine.at_once // n), whole_problems=share))
        job.work(LABELS, units, lambda group: self._label_group(group, segmenter, provenance), _correct_steps)
        records = job.rows(LABELS, units)
        if records is None:
            return None
        too_long = sum(bool(record.get("too_long")) for record in drawn)
        summary = summarise_labels(records, len(found) + too_long, len(found) - len(kept), drawn, too_long=too_long)
        summary |= {"threshold": getattr(segmenter, "threshold", None), "segmenter": cut_by}
        rows = [record["row"] for record in records if "row" in record]
        nothing = f"none of {summary['solutions']} solutions could be labelled"
        return _finish(job, LABELS_NAME, rows, summary, nothing=nothing)

    def _segmenter(self, out: Path, solutions: Sequence[Solution]) -> tuple[Segmenter, dict[str, Any]]:
        """The job's segmenter, and what rows say of it; a threshold that is to be fitted is fitted on all solutions."""
        steps = self.config.steps
        if isinstance(steps, OwnSteps):
            sampled = isinstance(self.config.solutions, Sampled)
            return get_segmenter("newline"), {"name": "newline" if sampled else "of the row"}
        if isinstance(steps, Fitted):
            (signal,) = steps.signals
            threshold = fit_threshold(
                [solution.signals[signal] for solution in solutions],
                steps.quantile,
                signal="confidence" if signal == "logprobs" else "entropy",
                model=self.bench.model,
                sampling=self.settings["sampling"],
            )
            write_json(out / THRESHOLD_NAME, threshold.to_dict())
            segmenter: Segmenter = threshold.segmenter()
        else:
            segmenter = get_segmenter(steps.segmenter)
        return segmenter, {"name": steps.kind} | segmenter_settings(segmenter)

    def _label_group(self, solutions: Sequence[Solution], segmenter: Segmenter, provenance: Row) -> list[Row]:
        found = [cut(solution, self.bench.policy.tokenizer, segmenter) for solution in solutions]
        usable = [solution for solution in found if isinstance(solution, Solution)]
        labelled = iter(self.labeller.label(usable) if usable else [])
        records: list[Row] = []
        for solution, steps in zip(solutions, found, strict=True):
            record: dict[str, Any] = {"id": solution.id, "index": solution.index}
            if isinstance(steps, str):
                records.append(record | {"dropped": steps})
                continue
            labels = next(labelled)
            if labels.labels.count(None) == len(labels.labels):
                record |= {"dropped": "no_labels", "facts": dict(labels.facts)}
            else:
                earlier = (solution.columns.get("labelling") or {}).get("segmenter")
                own = provenance["segmenter"] == {"name": "of the row"} and earlier
                record["row"] = labelled_row(steps, labels, {**provenance, **({"segmenter": earlier} if own else {})})
            records.append(record)
        return records


def _batches(solutions: Sequence[Solution], size: int, *, whole_problems: bool) -> list[list[Solution]]:
    """The solutions in batches of ``size``, larger ones where neighbours of one problem are to stay together."""
    batches: list[list[Solution]] = []
    for each in solutions:
        inside = whole_problems and batches and problem_key(batches[-1][-1].row) == problem_key(each.row)
        if not batches or (len(batches[-1]) >= size and not inside):
            batches.append([])
        batches[-1].append(each)
    return batches


def _correct_answers(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    known = [sample["correct"] for row in rows for sample in row.get("samples", [row])]
    known = [correct for correct in known if correct is not None]
    return {"answers correct": (sum(known), len(known))}


def _correct_steps(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    marks = [mark for row in rows if "row" in row for mark in verdicts(row_labels(row["row"])) if mark is not None]
    return {"steps correct": (sum(marks), len(marks))}


def _warn_of_foreign_threshold(config: LabelConfig, model: str) -> None:
    """A threshold file belongs to the model whose samples it was fitted on; another model's signals are others."""
    file = Path(config.steps.segmenter.partition(":")[2])
    if not config.steps.signals or not file.is_file():
        return
    threshold = SegmentThreshold.load(file)
    if threshold.model not in (None, model):
        warnings.warn(
            f"the threshold in {file} was fitted on samples of {threshold.model}, and {model} is another model: it may "
            f"divide at more or fewer than {threshold.quantile:.1%} of the tokens. To fit one on this job's solutions, "
            "choose Fitted steps",
            stacklevel=2,
        )


# ---- pairs ---------------------------------------------------------------------------------------------------------


def run_pair_job(config: PairJobConfig, *, options: JobOptions = ALONE, **made: Any) -> dict[str, Any] | None:
    """Run a pair job, resume it, or do one rank's share of it.

    Args:
        config: its settings.
        options: how this process takes part.
        **made: an already made ``policy``, ``engine`` or (for trees) ``scorer`` to use in place of the one that
            ``config`` describes.

    Returns:
        The summary, written to ``summary.json`` beside ``pairs.jsonl``; None while units of other ranks are missing
        (the last rank to finish writes them).

    Raises:
        ConfigError: the folder holds another job (its settings are named), or something else.
        DataError: rows that cannot be used; or no pair could be made, and the summary says why.
        ModelError: a model that cannot be used.
        MachineError: the folder cannot be written.
    """
    job = Job(Path(config.out), PAIR_KIND, (PAIRS_NAME, SUMMARY_NAME), options)
    job.check()
    builder: StepPairBuilder | TreePairBuilder
    if isinstance(config, StepPairConfig):
        builder = StepPairBuilder(config, job, **made)
    else:
        assert isinstance(config, TreePairConfig)
        builder = TreePairBuilder(config, job, **made)
    with builder.bench.grader:
        job.begin(builder.bench.settings() | {"pairing": builder.pairing})
        units = numbered(builder.groups())
        job.work(PAIRS, units, builder.work, _pairs_per_item)
        found = job.rows(PAIRS, units)
    if found is None:
        return None
    records = _drop_repeated_pairs(found)
    summary = _summarise_pairs(records)
    rows = [row for record in records for row in record["rows"]]
    return _finish(job, PAIRS_NAME, rows, summary, nothing=f"no pair could be made from {summary['items']} items")


def _drop_repeated_pairs(records: Sequence[Row]) -> list[dict[str, Any]]:
    """Keep the first of equal pairs of one problem, and count the others as ``repeated_pair``.

    Several solutions of a problem may make the same mistake at the same place; its pair should not count twice.
    """
    seen: dict[tuple[Any, ...], Row] = {}
    kept = []
    for record in records:
        rows = []
        for row in record["rows"]:
            key = (row["problem_id"], *row["prefix"], None, row["chosen"], row["rejected"])
            if seen.setdefault(key, row) is row:
                rows.append(row)
        repeated = {"repeated_pair": len(record["rows"]) - len(rows)} if len(rows) < len(record["rows"]) else {}
        kept.append(dict(record) | {"rows": rows, "dropped": dict(record["dropped"]) | repeated})
    return kept


def _summarise_pairs(records: Sequence[Row]) -> dict[str, Any]:
    """Summary of a finished pair job; depends on nothing but the records.

    Returns:
        ``items``, ``items_with_pairs``, ``pairs``, ``problems`` (those with a pair), ``dropped`` by reason,
        ``by_position`` (pairs and their share by the number of steps in the prefix) and the sums of the ``facts``.
    """
    rows = [row for record in records for row in record["rows"]]
    dropped: Counter[str] = Counter()
    facts: Counter[str] = Counter()
    for record in records:
        dropped.update(record["dropped"])
        facts.update(record["facts"])
    positions = Counter(len(row["prefix"]) for row in rows)
    return {
        "items": len(records),
        "items_with_pairs": sum(bool(record["rows"]) for record in records),
        "pairs": len(rows),
        "problems": len({row["problem_id"] for row in rows}),
        "dropped": {reason: dropped[reason] for reason in sorted(dropped)},
        "by_position": [
            {"position": position, "pairs": positions[position], "share": positions[position] / len(rows)}
            for position in sorted(positions)
        ],
        "facts": {name: facts[name] for name in sorted(facts)},
    }


def _pairs_per_item(records: Sequence[Row]) -> dict[str, tuple[float, float]]:
    # An item without facts was left out before anything was drawn for it.
    return {"items with a pair": (sum(bool(r["rows"]) for r in records), sum(bool(r["facts"]) for r in records))}


# ---- both ----------------------------------------------------------------------------------------------------------


def _finish(job: Job, name: str, rows: Sequence[Row], summary: dict[str, Any], *, nothing: str) -> dict[str, Any]:
    """Write a job's rows and its summary; where there are no rows the summary alone, and say why.

    Args:
        job: the job, whose units are all done.
        name: file of the rows.
        rows: what the job made.
        summary: counts, with ``dropped`` by reason; also what is returned.
        nothing: that there are no rows.

    Raises:
        DataError: there are none, and why.
    """
    if not rows:
        write_json(job.out / SUMMARY_NAME, summary)
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary["dropped"].items())
        raise DataError(f"{nothing} ({reasons or 'no reason given'})", path=job.out)
    job.finish(name, rows, summary)
    return summary
