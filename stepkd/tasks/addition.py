"""Long addition with carries, one column per line."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from stepkd.tasks.base import Task, TaskProblem, answer_line, draw_length, trim

_LINE = re.compile(r"[0-9]\+[0-9]\+[0-9]=([1-9]?[0-9])")


@dataclass(frozen=True)
class LongAddition(Task):
    """Sums such as ``478+64=``, added column by column from the units.

    A line is ``<digit>+<digit>+<carry in>=<column sum>``; a shorter number counts as padded with zeros. The units of a
    column sum are the digit written down, its tens the carry into the next line; the answer line puts together the
    digits and the last carry.
    """

    name: ClassVar[str] = "addition"

    digits: int | str = 3
    """Digits of each of the two numbers, 1 to 18; ``2-4`` draws the length of each number."""

    def __post_init__(self) -> None:
        self._store_range("digits", minimum=1, maximum=18)

    def problem(self, rng: random.Random) -> TaskProblem:
        left, right = (self._number(rng) for _ in range(2))
        return TaskProblem(f"{left}+{right}=\n", str(left + right), {"numbers": [left, right]})

    def _number(self, rng: random.Random) -> int:
        count = draw_length(self.digits, rng)
        return rng.randint(0 if count == 1 else 10 ** (count - 1), 10**count - 1)

    def next_step(self, problem: TaskProblem, previous_steps: Sequence[str]) -> str | None:
        columns = _columns(problem)
        index = len(previous_steps)
        if index > len(columns):
            return None
        sums = [_claimed(step) for step in previous_steps]
        claimed = [total for total in sums if total is not None]
        if len(claimed) < len(sums):
            return None
        carry = claimed[-1] // 10 if claimed else 0
        if index == len(columns):
            digits = "".join(str(total % 10) for total in reversed(claimed))
            return answer_line(int(f"{carry}{digits}"))
        left, right = columns[index]
        return f"{left}+{right}+{carry}={left + right + carry}\n"

    def slips(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> list[str]:
        """Every other column sum that two digits and a carry can have."""
        total = _claimed(step)
        return [] if total is None else [f"{step.split('=')[0]}={wrong}\n" for wrong in range(20) if wrong != total]

    def operands(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> str:
        return step.split("=")[0]


def _columns(problem: TaskProblem) -> list[tuple[int, int]]:
    """Pair the digits of the two numbers, units first."""
    left, right = (str(number) for number in problem.meta["numbers"])
    width = max(len(left), len(right))
    pairs = zip(reversed(left.zfill(width)), reversed(right.zfill(width)), strict=True)
    return [(int(a), int(b)) for a, b in pairs]


def _claimed(step: str) -> int | None:
    """Read the column sum a line claims; None for anything that is not such a line."""
    match = _LINE.fullmatch(trim(step))
    return None if match is None else int(match[1])
