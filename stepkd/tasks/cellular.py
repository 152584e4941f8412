"""Elementary cellular automata: each line is the next row of cells."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from stepkd.tasks.base import Task, TaskProblem, answer_line, check_integer, draw_length, is_answer, trim


@dataclass(frozen=True)
class CellularAutomaton(Task):
    """Run an elementary cellular automaton on a ring of cells for a few steps.

    The prompt is ``<rule>:<first row>*<steps>=``, for example ``110:00010110*3=``. A line is the next row; the answer
    is the last one. The rule is numbered as usual: bit ``4*left + 2*self + right`` of the number is the new cell.
    Source: Wolfram, "Statistical mechanics of cellular automata" (1983).
    """

    name: ClassVar[str] = "cellular"

    rule: int = 110
    """Rule number, 0 to 255."""
    width: int = 12
    """Cells in a row, 3 to 64; the row's ends are neighbours."""
    steps: int | str = 3
    """Rows to compute, 1 to 100; ``2-5`` draws the number for each problem."""

    def __post_init__(self) -> None:
        check_integer("cellular: rule", self.rule, minimum=0, maximum=255)
        check_integer("cellular: width", self.width, minimum=3, maximum=64)
        self._store_range("steps", minimum=1, maximum=100)

    def problem(self, rng: random.Random) -> TaskProblem:
        count = draw_length(self.steps, rng)
        first = "".join(rng.choice("01") for _ in range(self.width))
        row = first
        for _ in range(count):
            row = self._evolve(row)
        return TaskProblem(f"{self.rule}:{first}*{count}=\n", row, {"row": first, "steps": count})

    def next_step(self, problem: TaskProblem, previous_steps: Sequence[str]) -> str | None:
        count = problem.meta["steps"]
        row = trim(previous_steps[-1]) if previous_steps else problem.meta["row"]
        if len(previous_steps) > count or not re.fullmatch(f"[01]{{{self.width}}}", row):
            return None
        return answer_line(row) if len(previous_steps) == count else self._evolve(row) + "\n"

    def slips(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> list[str]:
        """The rows that differ in one cell."""
        if is_answer(step):
            return []
        row = trim(step)
        return [f"{row[:i]}{'10'[int(row[i])]}{row[i + 1 :]}\n" for i in range(len(row))]

    def operands(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> str:
        row = trim(previous_steps[-1]) if previous_steps else problem.meta["row"]
        return f"{self.rule}:{row}"

    def _evolve(self, row: str) -> str:
        cells = [int(cell) for cell in row]
        codes = (4 * cells[i - 1] + 2 * cells[i] + cells[(i + 1) % len(cells)] for i in range(len(cells)))
        return "".join(str(self.rule >> code & 1) for code in codes)
