"""Feedback from labelled rows: right or wrong per step and per answer, for Step-KTO and KTO.

``binary`` keeps the rows (and their sampled ids) and casts their step labels; ``unpaired`` makes TRL's unpaired
preference type, a completion with one label. What a row says is read in one place, :func:`answered`, which the pairs
of :mod:`stepkd.labels.preference_pairs` use as well.

Sources: Step-KTO (arXiv 2501.10799) takes a binary label per step and per answer; KTO (arXiv 2402.01306).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepkd.data.rows import ROLLOUT, STEPWISE, UNPAIRED, Contract, validate
from stepkd.errors import DataError
from stepkd.labels.convert import Converted, Converter, ConvertOptions, register
from stepkd.labels.matching import label_column
from stepkd.labels.solutions import PROBLEM_COLUMNS
from stepkd.runs.files import write_jsonl
from stepkd.scorers.scorer import problem_key
from stepkd.steps.format import written_steps
from stepkd.steps.labels import label_kind, tally, verdicts

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Answered:
    """What a rollout row or a stepwise row says of its solution as a whole."""

    row: Row
    """The row."""
    problem: str
    """What the rows of one problem have in common."""
    text: str
    """The solution."""
    outcome: bool | None
    """Whether its answer is right; None: not graded."""
    token_ids: list[int] | None
    """The ids that were sampled; None: it is a text."""
    cut_off: bool
    """Whether the length limit ended it."""

    @property
    def id(self) -> str:
        """Its id, for messages and provenance."""
        return str(self.row.get("id", "?"))


def answered(row: Row) -> Answered:
    """Read a rollout row or a stepwise row; no step labels are needed.

    Raises:
        DataError: another kind of row.
    """
    if "completions" in row:
        text = "".join(written_steps(row["completions"]))
        return Answered(row, problem_key(row), text, row.get("outcome"), None, cut_off=False)
    if "token_ids" not in row or "completion" not in row:
        raise DataError(
            "neither a rollout (completion, token_ids) nor a stepwise row (completions)", path=str(row.get("id", "?"))
        )
    ids = list(row["token_ids"])
    return Answered(
        row, problem_key(row), row["completion"], row.get("correct"), ids, cut_off=row.get("finish") == "length"
    )


def drop_repeated(solutions: Sequence[Answered], *, by_outcome: bool = False) -> tuple[list[Answered], int, int]:
    """Keep the first of several solutions of a problem with the same text; a cut-off one is not a finished one.

    Args:
        solutions: of any number of problems.
        by_outcome: keep one of each outcome.

    Returns:
        Those kept, in order; how many were dropped; and how many problems had several solutions, all equal.
    """
    seen: set[tuple[str, str, bool, bool | None]] = set()
    kept = []
    for each in solutions:
        key = (each.problem, each.text, each.cut_off, each.outcome if by_outcome else None)
        if key not in seen:
            seen.add(key)
            kept.append(each)
    before, after = (Counter(each.problem for each in group) for group in (solutions, kept))
    identical = sum(count > 1 and after[problem] == 1 for problem, count in before.items())
    return kept, len(solutions) - len(kept), identical


def label_values(row: Row, *, soft: bool) -> list[Any] | None:
    """A row's step labels; its estimated values in their place if ``soft``; None when it has none."""
    values = row.get("step_values" if soft else label_column(row))
    if values is None or all(value is None for value in values):
        return None
    return [None if value is None else float(value) for value in values] if soft else list(values)


def writer(*contracts: Contract) -> Callable[[Iterable[Row], str | Path], int]:
    """What writes rows that follow one of the contracts (the first whose required columns a row has)."""

    def write(rows: Iterable[Row], path: str | Path) -> int:
        return write_jsonl(path, (_checked(dict(row), contracts, path) for row in rows))

    return write


def _checked(row: dict[str, Any], contracts: Sequence[Contract], path: str | Path) -> dict[str, Any]:
    contract = next((each for each in contracts if set(each.required) <= set(row)), contracts[0])
    return validate(row, contract, path=path, extra="keep")


def _binary(rows: Sequence[Row], options: ConvertOptions) -> Converted:
    counts: Counter[str] = Counter()
    kept, counts["duplicates"], counts["problems_all_identical"] = drop_repeated([answered(row) for row in rows])
    done = []
    for each in kept:
        labels = label_values(each.row, soft=options.soft)
        marks = None if labels is None else _marks(each, labels, options)
        if labels is None or marks is None or all(mark is None for mark in marks):
            counts["rows_without_labels"] += 1
            continue
        counts["right_steps"] += marks.count(True)
        counts["wrong_steps"] += marks.count(False)
        counts["unlabelled_steps"] += labels.count(None)
        counts["neutral_steps"] += labels.count(0) if label_kind(labels) == "rating" else 0
        counts["rows_without_outcome"] += each.outcome is None
        counts["right_answers_with_a_wrong_step"] += tally([each.outcome], [marks]).flawed
        done.append(dict(each.row) | {"step_labels" if each.token_ids is not None else "labels": marks})
    return Converted(done, {"rows": len(done)} | _in_order(counts, _BINARY_COUNTS))


_BINARY_COUNTS = (
    *("right_steps", "wrong_steps", "neutral_steps", "unlabelled_steps", "right_answers_with_a_wrong_step"),
    *("rows_without_labels", "rows_without_outcome", "duplicates", "problems_all_identical"),
)


def _marks(each: Answered, labels: Sequence[Any], options: ConvertOptions) -> list[bool | None]:
    steps = each.row["completions"] if each.token_ids is None else each.row["step_ends"]
    if len(labels) != len(steps):
        raise DataError(f"has {len(labels)} labels for {len(steps)} steps", path=each.id)
    try:
        return verdicts(labels, neutral=options.neutral, threshold=options.threshold)
    except DataError as error:
        raise DataError(str(error), path=each.id, column=label_column(each.row)) from error


def _unpaired(rows: Sequence[Row], options: ConvertOptions) -> Converted:
    counts: Counter[str] = Counter()
    kept, counts["duplicates"], counts["problems_all_identical"] = drop_repeated([answered(row) for row in rows])
    done = []
    for each in kept:
        if each.outcome is None:
            counts["rows_without_outcome"] += 1
        elif not each.text.strip():
            counts["empty_completions"] += 1
        else:
            counts["right" if each.outcome else "wrong"] += 1
            counts["cut_off"] += each.cut_off
            done.append(
                {name: each.row[name] for name in ("id", "problem_id") if each.row.get(name) is not None}
                | {"prompt": each.row["prompt"], "completion": each.text, "label": each.outcome}
                | {name: each.row[name] for name in PROBLEM_COLUMNS if each.row.get(name) is not None}
            )
    return Converted(done, {"rows": len(done)} | _in_order(counts, _UNPAIRED_COUNTS))


_UNPAIRED_COUNTS = (
    *("right", "wrong", "cut_off", "rows_without_outcome", "empty_completions", "duplicates", "problems_all_identical"),
)


def _in_order(counts: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    return {name: int(counts[name]) for name in names}


register(Converter("binary", "the same rows with right or wrong for every step", _binary, writer(ROLLOUT, STEPWISE)))
register(Converter("unpaired", "TRL's KTO rows: prompt, completion, label = the outcome", _unpaired, writer(UNPAIRED)))
