"""The tasks, chains of operations; and a task by its name and settings."""

from __future__ import annotations

import dataclasses
import functools
import operator
import random
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stepkd.errors import ConfigError, check_choice
from stepkd.tasks.base import INTEGER, Task, TaskProblem, answer_line, check_integer, draw_length, trim

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
"""What chains compute with."""
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

    def draw(
        self, rng: random.Random, terms: int | str, operators: str, number: Callable[[], int], *, suffix: str = ""
    ) -> TaskProblem:
        """Draw the problem of one chain.

        Args:
            rng: where its length and its operators are drawn from.
            terms: how many numbers, as a range setting is stored.
            operators: one or more of ``+-*``, all equally likely.
            number: draws a number.
            suffix: text between the chain and its equals sign.
        """
        numbers = [number() for _ in range(draw_length(terms, rng))]
        drawn = "".join(rng.choice(operators) for _ in numbers[1:])
        chain, value = str(numbers[0]), numbers[0]
        for op, term in zip(drawn, numbers[1:], strict=True):
            chain, value = f"{chain}{op}{term}", self.reduce(OPERATIONS[op](value, term))
        return TaskProblem(f"{chain}{suffix}=\n", str(value), {"numbers": numbers, "operators": drawn})

    def next_step(self, problem: TaskProblem, previous_steps: Sequence[str]) -> str | None:
        numbers, operators = problem.meta["numbers"], problem.meta["operators"]
        index = len(previous_steps)
        value = numbers[0] if index == 0 else claimed_result(previous_steps[-1])
        if value is None or index > len(operators):
            return None
        if index == len(operators):
            return answer_line(value)
        op, number = operators[index], numbers[index + 1]
        return f"{value}{op}{number}={self.reduce(OPERATIONS[op](value, number))}\n"

    def slips(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> list[str]:
        """The same equation with the results of `wrong_results`."""
        result = claimed_result(step)
        return [] if result is None else [f"{step.split('=')[0]}={wrong}\n" for wrong in self.wrong_results(result)]

    def operands(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> str:
        """What stands before the equals sign, by which a systematic slip is keyed."""
        return step.split("=")[0]


def claimed_result(step: str) -> int | None:
    """Read the result that a line ``<value><operator><number>=<result>`` claims; None for any other text."""
    match = _LINE.fullmatch(trim(step))
    return None if match is None else int(match[1])


def check_operators(task: str, operators: str) -> None:
    """Raise a ConfigError unless `operators` is a non-empty choice of ``+-*`` without repeats."""
    if not operators or set(operators) - set(OPERATIONS) or len(set(operators)) < len(operators):
        raise ConfigError(f"{task}: operators={operators!r} must be one or more of {''.join(OPERATIONS)}, once each")


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
        return self.draw(rng, self.terms, self.operators, lambda: rng.randint(0, self.maximum))

    def reduce(self, value: int) -> int:
        return value

    def wrong_results(self, result: int) -> list[int]:
        """Off by one to ten either way: the sizes of a miscounted unit and of a lost carry."""
        return [result + offset for offset in range(-10, 11) if offset != 0]


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
        number = functools.partial(rng.randrange, self.modulus)
        return self.draw(rng, self.terms, self.operators, number, suffix=f"%{self.modulus}")

    def reduce(self, value: int) -> int:
        return value % self.modulus

    def wrong_results(self, result: int) -> list[int]:
        """Every other residue."""
        return [value for value in range(self.modulus) if value != result]

    def operands(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> str:
        return f"{super().operands(problem, previous_steps, step)}%{self.modulus}"


TASKS: dict[str, type[Task]] = {task.name: task for task in (ArithmeticChain, ModularChain)}
"""Every task class by its name."""


def get_task(spec: str) -> Task:
    """Build a task from its name and settings.

    Args:
        spec: ``name`` or ``name:key=value,key=value``, for example ``modular:terms=3-6,modulus=7``. Settings left out
            keep their defaults. `Task.spec` is such a text.

    Returns:
        The task.

    Raises:
        ConfigError: an unknown task or setting (the nearest one is named), a setting given twice or without a value,
            or a value out of range.
    """
    name, colon, settings = spec.strip().partition(":")
    check_choice("task", name, TASKS)
    task = TASKS[name]
    values: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(task)}
    for item in settings.split(",") if colon else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise ConfigError(f"task {spec!r}: {item!r} is not of the form key=value; write e.g. {task().spec}")
        check_choice(f"setting of task {name!r}", key, fields)
        if key in values:
            raise ConfigError(f"task {spec!r}: the setting {key!r} is given twice")
        try:
            values[key] = int(value) if fields[key].type == "int" else value
        except ValueError:
            raise ConfigError(f"{name}: {key}={value!r} is not a whole number") from None
    return task(**values)
