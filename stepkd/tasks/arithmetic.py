"""Arithmetic chains on whole numbers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from stepkd.tasks.base import TaskProblem, check_integer, draw_length
from stepkd.tasks.chain import ChainTask, check_operators


@dataclass(frozen=True)
class ArithmeticChain(ChainTask):
    """Chains such as ``3+4*2-5=`` on whole numbers, evaluated from left to right (here ((3+4)*2)-5 = 9).

    Results may be negative and, with ``*`` among the operators, grow with every term.
    """

    name: ClassVar[str] = "arithmetic"

    terms: int | str = 3
    """Numbers in a chain, 2 to 100; ``3-6`` draws the length of each problem."""
    maximum: int = 20
    """Largest number in a prompt, 1 to 999; the smallest is 0."""
    operators: str = "+-*"
    """Operators to draw from: one or more of ``+-*``."""

    def __post_init__(self) -> None:
        self._store_range("terms", minimum=2, maximum=100)
        check_integer("arithmetic: maximum", self.maximum, minimum=1, maximum=999)
        check_operators(self.name, self.operators)

    def problem(self, rng: random.Random) -> TaskProblem:
        count = draw_length(self.terms, rng)
        numbers = [rng.randint(0, self.maximum) for _ in range(count)]
        return self.make_problem(numbers, self.draw_operators(count - 1, self.operators, rng))

    def reduce(self, value: int) -> int:
        return value

    def wrong_results(self, result: int) -> list[int]:
        """Off by one to ten either way: the sizes of a miscounted unit and of a lost carry."""
        return [result + offset for offset in range(-10, 11) if offset != 0]
