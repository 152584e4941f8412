"""The tiny world: generated tasks whose every solution line has an exact checker, so step labels are free and true.

A problem's prompt is one line; its solution is a scratchpad with one step per line, closed by ``#### <answer>``.
`make_rows` gives problem rows for training and evaluation, `check_row` judges a model's steps against such a row.
"""

from __future__ import annotations

from stepkd.lazy import lazily

_HOMES = {
    "base": "Given Task TaskProblem",
    "families": "TASKS ArithmeticChain CellularAutomaton LongAddition ModularChain StarGraph get_task",
    "rows": "Noise Split check_row critique_rows demonstration is_task_row make_rows row_problem split_of",
}

__getattr__ = lazily(__name__, _HOMES)
