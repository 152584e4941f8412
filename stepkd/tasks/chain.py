"""What arithmetic and modular chains share: a row of numbers and operators, evaluated strictly from left to right."""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from stepkd.errors import ConfigError
from stepkd.tasks.base import INTEGER, Task, TaskProblem, answer_line

OPERATORS = "+-*"
_LINE = re.compile(rf"{INTEGER}[-+*]{INTEGER}=({INTEGER})")


@dataclass(frozen=True)
class ChainTask(Task):
    """A chain such as ``3+4*2-5``, worked out from left to right without operator precedence.

    One line per operator, ``<value><operator><number>=<result>``, then the answer line. `terms` counts the numbers, so
    a chain of 6 terms has 5 lines to compute.
    """

    @abstractmethod
    def reduce(self, value: int) -> int:
        """Map the plain result of an operation to the one the task writes down."""

    @abstractmethod
    def wrong_results(self, result: int) -> list[int]:
        """List the results a slip may put in place of `result`."""

    def make_problem(self, numbers: list[int], operators: str, *, suffix: str = "") -> TaskProblem:
        """Build the problem of one chain.

        Args:
            numbers: the terms, at least one.
            operators: one character of ``+-*`` between each two numbers.
            suffix: text between the chain and its equals sign.
        """
        chain = str(numbers[0]) + "".join(f"{op}{number}" for op, number in zip(operators, numbers[1:], strict=True))
        value = numbers[0]
        for op, number in zip(operators, numbers[1:], strict=True):
            value = self.reduce(apply(op, value, number))
        return TaskProblem(f"{chain}{suffix}=\n", str(value), {"numbers": numbers, "operators": operators})

    def draw_operators(self, count: int, operators: str, rng: random.Random) -> str:
        """Draw `count` operators, all equally likely."""
        return "".join(rng.choice(operators) for _ in range(count))

    def next_step(self, problem: TaskProblem, previous_steps: Sequence[str]) -> str | None:
        numbers, operators = problem.meta["numbers"], problem.meta["operators"]
        index = len(previous_steps)
        value = numbers[0] if index == 0 else _claimed(previous_steps[-1])
        if value is None or index > len(operators):
            return None
        if index == len(operators):
            return answer_line(value)
        op, number = operators[index], numbers[index + 1]
        return f"{value}{op}{number}={self.reduce(apply(op, value, number))}\n"

    def slips(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> list[str]:
        result = _claimed(step)
        if result is None:
            return []
        return [f"{step.split('=')[0]}={wrong}\n" for wrong in self.wrong_results(result)]

    def operands(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> str:
        return step.split("=")[0]


def apply(op: str, left: int, right: int) -> int:
    """Compute one operation of ``+-*``."""
    if op == "+":
        return left + right
    return left - right if op == "-" else left * right


def check_operators(task: str, operators: str) -> None:
    """Raise a ConfigError unless `operators` is a non-empty choice of ``+-*`` without repeats."""
    if not operators or set(operators) - set(OPERATORS) or len(set(operators)) < len(operators):
        raise ConfigError(f"{task}: operators={operators!r} must be one or more of {OPERATORS}, once each")


def _claimed(step: str) -> int | None:
    """Read the result a chain line claims; None for anything that is not such a line."""
    match = _LINE.fullmatch(step.rstrip("\n "))
    return None if match is None else int(match[1])
