"""ProcessBench: human-marked first wrong steps (Zheng et al. 2024, arXiv 2412.06559); evaluation only.

Hub: ``Qwen/ProcessBench``, splits ``gsm8k`` (400), ``math``, ``olympiadbench`` and ``omnimath`` (1,000 each); columns
``id``, ``generator``, ``problem``, ``steps``, ``final_answer_correct``, ``label`` (0-based index of the first wrong
step, -1: none). Its problems are those of the test sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stepkd.data.checks import shown
from stepkd.data.rows import STEPWISE
from stepkd.data.sources.registry import Options, RawRow, Row, Source, as_text, passed_on, register

SUBSETS = ("gsm8k", "math", "olympiadbench", "omnimath")
"""The benchmark's parts, in its order."""
FIRST_ERROR_READS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("problem",),
    "completions": ("steps",),
    "first_error": ("label",),
    "outcome": ("final_answer_correct",),
    "id": ("id",),
}
"""Columns of files in ProcessBench's layout."""


def first_error_row(raw: RawRow) -> Row:
    """Turn the index of the first wrong step into step labels.

    Args:
        raw: ``prompt``, ``completions`` (steps), ``first_error`` (0-based, -1: none), perhaps ``outcome`` and ``id``.

    Returns:
        A STEPWISE row: True before the first wrong step, False at it, null behind it, where nobody judged; all True
        for -1. ``first_error`` is kept; ``outcome`` is whether the final answer is right.

    Raises:
        DataError: steps that are no list, or an index that is no whole number or not of a step.
    """
    steps, first = raw["completions"], raw["first_error"]
    if not isinstance(steps, list):
        raise raw.error(f"must be a list of step texts, found {shown(steps)}", column="steps")
    if isinstance(first, bool) or not isinstance(first, int):
        raise raw.error(
            f"must be the whole number of the first wrong step (from 0; -1: none), found {shown(first)}", column="label"
        )
    if not -1 <= first < len(steps):
        raise raw.error(
            f"is {first} for {len(steps)} steps; must be -1 (no wrong step) or 0 to {len(steps) - 1}, counted from 0",
            column="label",
        )
    labels: list[bool | None] = [True] * len(steps)
    if first >= 0:
        labels[first:] = [False, *[None] * (len(steps) - first - 1)]
    row: Row = {"prompt": raw["prompt"], "completions": steps, "labels": labels, "first_error": first}
    row |= passed_on(raw, "outcome")
    return row | {name: as_text(value) for name, value in passed_on(raw, "id").items()}


def _map(raw: RawRow, options: Options) -> Row:
    row = first_error_row(raw) | passed_on(raw, "generator")
    subset = _subset(row.get("id"), raw.path)
    return row if subset is None else row | {"subset": subset}


def _subset(identity: object, path: str) -> str | None:
    """The part of the benchmark: the ids begin with it (``gsm8k-0``), and files and hub splits are named so."""
    names = (str(identity).rpartition("-")[0], Path(path).name.partition(".")[0], path.rpartition(":")[2])
    return next((name for name in names if name in SUBSETS), None)


PROCESSBENCH = register(
    Source(
        name="processbench",
        help="ProcessBench: first wrong steps marked by humans, for evaluation only",
        contract=STEPWISE,
        map_row=_map,
        reads=FIRST_ERROR_READS,
        optional=frozenset({"outcome", "id"}),
        keeps=("generator",),
        hub="Qwen/ProcessBench",
        splits={name: name for name in SUBSETS},
        default_split="gsm8k",
        evaluation_only=frozenset({"*"}),
    )
)
"""The ProcessBench source."""
