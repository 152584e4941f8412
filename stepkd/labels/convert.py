"""From labelled rows to other kinds of rows: the registry behind ``stepkd label --to``.

A converter is a function from rows and options to rows and counts of what was left out. To add one, write the function,
register it, and import its module in the package's ``__init__``, so that the registry is whole whoever imports it.
Binary feedback is in :mod:`stepkd.labels.feedback`, pairs from outcomes are in :mod:`stepkd.labels.preference_pairs`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from stepkd.data.stepwise_io import to_stepwise, trl_row, write_math_shepherd, write_stepwise
from stepkd.errors import ConfigError, DataError, check_choice
from stepkd.labels.matching import label_column
from stepkd.labels.reductions import balance_by_prefix_length
from stepkd.runs.files import write_jsonl
from stepkd.steps.labels import Neutral, check_threshold

Row = Mapping[str, Any]
KEPT = ("labelling", "label_facts", "step_values", "task", "meta", "problem_id")
"""Columns of a labelled rollout that its stepwise row keeps."""


@dataclass(frozen=True)
class ConvertOptions:
    """Settings of converters; each reads what it needs."""

    soft: bool = False
    """Take the estimated values as labels, not right or wrong (``stepwise``, ``trl``, ``binary``, ``preference``)."""
    neutral: Neutral = "right"
    """What a rating of 0 becomes where only right and wrong exist (``trl``, ``math_shepherd``, ``binary``)."""
    threshold: float = 0.5
    """A soft label is right there from this chance on, in (0, 1)."""
    seed: int = 0
    """Keys what is drawn (``balanced``, ``preference``)."""
    max_pairs: int = 1
    """Most pairs per problem, >= 1 (``preference``)."""
    chosen_steps: Literal["any", "clean"] = "any"
    """``clean``: a solution with a wrong step is never the better one (``preference``)."""

    def __post_init__(self) -> None:
        check_choice("neutral", self.neutral, get_args(Neutral))
        check_choice("--chosen-steps", self.chosen_steps, ("any", "clean"))
        check_threshold(self.threshold)
        if self.max_pairs < 1:
            raise ConfigError(f"max_pairs={self.max_pairs}: must be at least 1")


@dataclass(frozen=True)
class Converted:
    """Rows of the new kind."""

    rows: list[dict[str, Any]]
    """At least one, else the caller refuses."""
    counts: dict[str, int]
    """What was kept, changed and left out, by reason."""


@dataclass(frozen=True)
class Converter:
    """One kind of rows to convert to."""

    name: str
    """Word behind ``--to``."""
    help: str
    """One line for listings."""
    convert: Callable[[Sequence[Row], ConvertOptions], Converted]
    """Labelled rows (rollout or stepwise contract) and options to new rows."""
    write: Callable[[Iterable[Row], str | Path], int] = write_stepwise
    """Writes the new rows; returns their number."""


CONVERTERS: dict[str, Converter] = {}
"""Converters by name."""


def register(converter: Converter) -> Converter:
    """Add a converter; its name must be new."""
    assert converter.name not in CONVERTERS, converter.name
    CONVERTERS[converter.name] = converter
    return converter


def convert_rows(rows: Sequence[Row], to: str, options: ConvertOptions | None = None) -> Converted:
    """Convert labelled rows.

    Args:
        rows: rows with step labels.
        to: name of a converter.
        options: its settings.

    Raises:
        ConfigError: no converter of that name.
        DataError: rows it cannot convert, or none left.
    """
    check_choice("--to", to, CONVERTERS)
    converted = CONVERTERS[to].convert(rows, options or ConvertOptions())
    if not converted.rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in converted.counts.items() if count)
        raise DataError(f"none of {len(rows)} rows is left ({reasons or 'no reason given'})")
    return converted


def stepwise_rows(rows: Sequence[Row], *, soft: bool = False) -> list[dict[str, Any]]:
    """The same solutions as stepwise rows; those that are stepwise already stay as they are (unless ``soft``).

    Raises:
        DataError: no labels or step texts, or ``soft`` and no values.
    """
    return [_stepwise(row, soft) for row in rows]


def _stepwise(row: Row, soft: bool) -> dict[str, Any]:
    name = str(row.get("id", "?"))
    if "completions" in row:
        if not soft:
            return dict(row)
        if row.get("step_values") is None:
            raise DataError("no values to take as soft labels", path=name, column="step_values")
        return dict(row) | {"labels": [None if v is None else float(v) for v in row["step_values"]]}
    if row.get("steps") is None:
        raise DataError(
            "no step texts: these rollouts were not labelled by `stepkd label`; label them with --rollouts first",
            path=name,
            column="steps",
        )
    return to_stepwise(row, row["steps"], soft=soft, keep=KEPT)


def _to_stepwise(rows: Sequence[Row], options: ConvertOptions) -> Converted:
    done = stepwise_rows(rows, soft=options.soft)
    return Converted(done, {"rows": len(done)})


def _to_trl(rows: Sequence[Row], options: ConvertOptions) -> Converted:
    counts: Counter[str] = Counter()
    cast = [
        trl_row(row, neutral=options.neutral, threshold=options.threshold, counts=counts)
        for row in stepwise_rows(rows, soft=options.soft)
    ]
    kept = [{name: row[name] for name in ("prompt", "completions", "labels")} for row in cast if row is not None]
    return Converted(kept, {"rows": len(kept)} | dict(counts))


def _to_math_shepherd(rows: Sequence[Row], options: ConvertOptions) -> Converted:
    counts: Counter[str] = Counter()
    cast = [
        trl_row(row, neutral=options.neutral, threshold=options.threshold, counts=counts)
        for row in stepwise_rows(rows, soft=options.soft)
    ]
    kept = [row for row in cast if row is not None]
    return Converted(kept, {"rows": len(kept)} | dict(counts))


def _balanced(rows: Sequence[Row], options: ConvertOptions) -> Converted:
    """Equal numbers of right and wrong labels at every prefix length (GLoRe, arXiv 2402.10963)."""
    columns = [label_column(row) for row in rows]
    balanced = balance_by_prefix_length(
        [{"labels": row.get(column)} for row, column in zip(rows, columns, strict=True)], options.seed
    )
    kept = [
        dict(row) | {column: new["labels"]}
        for row, column, new in zip(rows, columns, balanced.rows, strict=True)
        if any(label is not None for label in new["labels"])
    ]
    return Converted(
        kept,
        {
            "rows": len(kept),
            "rows_without_labels_now": len(rows) - len(kept),
            "labels_before": sum(step.positives + step.negatives for step in balanced.steps),
            "labels_kept": sum(2 * step.kept for step in balanced.steps),
        },
    )


def _write_lines(rows: Iterable[Row], path: str | Path) -> int:
    return write_jsonl(path, (dict(row) for row in rows))


register(Converter("stepwise", "prompt, completions, labels, with what else the rows carry", _to_stepwise))
register(Converter("trl", "TRL's stepwise-supervision type: one true or false per step", _to_trl))
register(
    Converter("math_shepherd", "Math-Shepherd's texts with step tags and +/-", _to_math_shepherd, write_math_shepherd)
)
register(
    Converter(
        "balanced", "the same rows with as many right as wrong labels at every step number", _balanced, _write_lines
    )
)
