"""Chains modulo m: a wrong line can still end in the right answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from stepkd.tasks.base import TaskProblem, check_integer, draw_length
from stepkd.tasks.chain import ChainTask, check_operators


@dataclass(frozen=True)
class ModularChain(ChainTask):
    """Chains such as ``3+4*2-5%10=``: evaluated from left to right, every line's result taken modulo m.

    The prompt itself reads from left to right too: ``%10`` is its last operation. Results lie in [0, m), also after
    a subtraction. The default is 5 lines modulo 10, the setting measured in the design notes.
    """

    name: ClassVar[str] = "modular"

    terms: int | str = 6
    """Numbers in a chain, 2 to 100 (one line less than that); ``3-6`` draws the length of each problem."""
    modulus: int = 10
    """The modulus m, 2 to 1000; numbers are drawn from [0, m)."""
    operators: str = "+-*"
    """Operators to draw from: one or more of ``+-*``."""

    def __post_init__(self) -> None:
        self._store_range("terms", minimum=2, maximum=100)
        check_integer("modular: modulus", self.modulus, minimum=2, maximum=1000)
        check_operators(self.name, self.operators)

    def problem(self, rng: random.Random) -> TaskProblem:
        count = draw_length(self.terms, rng)
        numbers = [rng.randrange(self.modulus) for _ in range(count)]
        operators = self.draw_operators(count - 1, self.operators, rng)
        return self.make_problem(numbers, operators, suffix=f"%{self.modulus}")

    def reduce(self, value: int) -> int:
        return value % self.modulus

    def wrong_results(self, result: int) -> list[int]:
        """Every other residue."""
        return [value for value in range(self.modulus) if value != result]

    def operands(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> str:
        return f"{super().operands(problem, previous_steps, step)}%{self.modulus}"
