"""Solutions whose first incorrect step humans have marked; evaluation only.

``processbench`` (Zheng et al. 2024, arXiv 2412.06559): hub ``Qwen/ProcessBench``, splits ``gsm8k`` (400), ``math``,
``olympiadbench`` and ``omnimath`` (1,000 each); columns ``id``, ``generator``, ``problem``, ``steps``,
``final_answer_correct``, ``label`` (0-based index of the first incorrect step, -1: none). Its problems are those of the
test sets.
``bigbench_mistake`` (Tyen et al. 2024, arXiv 2311.08516, github ``WHGTyen/BIG-Bench-Mistake``, Apache-2.0): PaLM 2
chains on BIG-Bench tasks. BIG-Bench asks that its tasks stay out of training data. The original files' ``input`` and
``mistake_index`` (0-based, null: no mistake) are read as well.
``mr_gsm8k`` (Zeng et al. 2024, arXiv 2312.17080, github ``dvlab-research/MR-GSM8K``, MIT): solutions of GSM8K *test*
problems and of variants of them. The original counts steps from 1; here ``label`` counts from 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepkd.data.rows import STEPWISE, Row, passed_on, shown
from stepkd.data.sources.registry import Options, RawRow, Source, register

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
    """Turn the index of the first incorrect step into step labels.

    Args:
        raw: ``prompt``, ``completions`` (steps), ``first_error`` (0-based, -1: none), perhaps ``outcome`` and ``id``.

    Returns:
        A STEPWISE row: True before the first incorrect step, False at it, null behind it, where nobody judged; all True
        for -1. ``first_error`` is kept; ``outcome`` is whether the final answer is correct.

    Raises:
        DataError: steps that are no list, or an index that is no whole number or not of a step.
    """
    steps, first = raw["completions"], raw["first_error"]
    if not isinstance(steps, list):
        raise raw.error(f"must be a list of step texts, found {shown(steps)}", column="steps")
    if isinstance(first, bool) or not isinstance(first, int) or not -1 <= first < len(steps):
        raise raw.error(
            f"must be the number of the first incorrect step (0 to {len(steps) - 1}; -1: none), found {shown(first)}",
            column="label",
        )
    labels: list[bool | None] = [True] * len(steps)
    if first >= 0:
        labels[first:] = [False, *[None] * (len(steps) - first - 1)]
    row: Row = {"prompt": raw["prompt"], "completions": steps, "labels": labels, "first_error": first}
    return row | passed_on(raw, "outcome", "id", "answer", "final_answer")


def _map(raw: RawRow, options: Options) -> Row:
    return first_error_row(raw) | passed_on(raw, *_KEEPS)


def _map_bigbench(raw: RawRow, options: Options) -> Row:
    if raw["first_error"] is None:  # the original's way to say that no step is incorrect
        raw["first_error"] = -1
    return _map(raw, options)


def _map_processbench(raw: RawRow, options: Options) -> Row:
    """With the part of the benchmark: the ids begin with it (``gsm8k-0``), and files and hub splits are named so."""
    names = (str(raw.get("id")).rpartition("-")[0], Path(raw.path).name.partition(".")[0], raw.path.rpartition(":")[2])
    subset = next((name for name in names if name in SUBSETS), None)
    return _map(raw, options) | ({} if subset is None else {"subset": subset})


_KEEPS = ("generator", "question_type", "error_reason")
_COMMON: dict[str, Any] = {
    "contract": STEPWISE,
    "requires": frozenset({"prompt", "completions", "first_error"}),
    "keeps": _KEEPS,
    "evaluation_only": frozenset({"*"}),
}
_TEST: dict[str, Any] = {"splits": {"test": "test"}, "default_split": "test"}

for _source in (
    Source(
        name="processbench",
        help="ProcessBench: first incorrect steps marked by humans, for evaluation only",
        map_row=_map_processbench,
        reads=FIRST_ERROR_READS,
        hub="Qwen/ProcessBench",
        splits={name: name for name in SUBSETS},
        default_split="gsm8k",
        **_COMMON,
    ),
    Source(
        name="bigbench_mistake",
        help="BIG-Bench Mistake: first incorrect steps marked by humans, for evaluation only",
        map_row=_map_bigbench,
        reads={
            **FIRST_ERROR_READS,
            "prompt": ("problem", "input"),
            "first_error": ("label", "mistake_index"),
            "answer": ("target",),
            "final_answer": ("answer",),
        },
        **_COMMON,
        **_TEST,
    ),
    Source(
        name="mr_gsm8k",
        help="MR-GSM8K: first incorrect steps marked by humans, for evaluation only",
        map_row=_map,
        reads={**FIRST_ERROR_READS, "answer": ("gold_answer",)},
        **_COMMON,
        **_TEST,
    ),
):
    register(_source)
