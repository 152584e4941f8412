"""Families of tasks: chains, sums apart, long addition, star graphs, cellular automata; a task by name and settings."""

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

from stepkd.errors import ConfigError, check_bounds, check_choice
from stepkd.tasks.base import INTEGER, Given, Task, TaskProblem, answer_line, draw_length, is_answer, trim

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
"""What chains compute with."""


@dataclass(frozen=True)
class EquationTask(Task):
    """A task whose lines are equations, ``<operands>=<result>``."""

    line: ClassVar[re.Pattern[str]]
    """What a line looks like; group 1 is the result."""

    @abstractmethod
    def _incorrect_results(self, result: int) -> list[int]:
        """List the results a slip may put in place of `result`."""

    def claimed(self, step: str) -> int | None:
        """Read the result a line claims; None for anything that is not such a line."""
        match = self.line.fullmatch(trim(step))
        return None if match is None else int(match[1])

    def slips(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> list[str]:
        """The same equation with the results of `_incorrect_results`."""
        result = self.claimed(step)
        results = [] if result is None else self._incorrect_results(result)
        return [f"{step.split('=')[0]}={incorrect}\n" for incorrect in results]

    def operands(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> str:
        """What stands before the equals sign, by which a systematic slip is keyed."""
        return step.split("=")[0]


@dataclass(frozen=True)
class ChainTask(EquationTask):
    """A chain such as ``3+4*2-5``, worked out from left to right without operator precedence.

    One line per operator, ``<value><operator><number>=<result>``, then the answer line. `terms` counts the numbers, so
    a chain of 6 terms has 5 lines to compute.
    """

    line: ClassVar[re.Pattern[str]] = re.compile(rf"{INTEGER}[-+*]{INTEGER}=({INTEGER})")

    @abstractmethod
    def reduce(self, value: int) -> int:
        """Map the plain result of an operation to the one the task writes down."""

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
        value = numbers[0] if index == 0 else self.claimed(previous_steps[-1])
        if value is None or index > len(operators):
            return None
        if index == len(operators):
            return answer_line(value)
        op, number = operators[index], numbers[index + 1]
        return f"{value}{op}{number}={self.reduce(OPERATIONS[op](value, number))}\n"


def _check_operators(task: str, operators: str) -> None:
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
        check_bounds("arithmetic: ", self, maximum="[1, 999]")
        _check_operators(self.name, self.operators)

    def problem(self, rng: random.Random) -> TaskProblem:
        return self.draw(rng, self.terms, self.operators, lambda: rng.randint(0, self.maximum))

    def reduce(self, value: int) -> int:
        return value

    def _incorrect_results(self, result: int) -> list[int]:
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
        check_bounds(f"{self.name}: ", self, modulus="[2, 1000]")
        _check_operators(self.name, self.operators)

    def problem(self, rng: random.Random) -> TaskProblem:
        number = functools.partial(rng.randrange, self.modulus)
        return self.draw(rng, self.terms, self.operators, number, suffix=f"%{self.modulus}")

    def reduce(self, value: int) -> int:
        return value % self.modulus

    def _incorrect_results(self, result: int) -> list[int]:
        """Every other residue."""
        return [value for value in range(self.modulus) if value != result]

    def operands(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> str:
        return f"{super().operands(problem, previous_steps, step)}%{self.modulus}"


@dataclass(frozen=True)
class IndependentLines(ModularChain):
    """Expressions such as ``3+4,7*2,5-9%10=``, each worked out modulo m on a line of its own.

    No line needs another: they may stand in any order, each once, before the answer line, the sum of their results
    modulo m.
    """

    name: ClassVar[str] = "independent"

    terms: int | str = 4
    """Expressions in a prompt, 2 to 100; ``3-6`` draws their number for each problem."""

    def problem(self, rng: random.Random) -> TaskProblem:
        count, numbers = draw_length(self.terms, rng), range(self.modulus)
        parts = [(rng.choice(numbers), rng.choice(self.operators), rng.choice(numbers)) for _ in range(count)]
        prompt = ",".join(f"{a}{op}{b}" for a, op, b in parts) + f"%{self.modulus}=\n"
        answer = self.reduce(sum(OPERATIONS[op](a, b) for a, op, b in parts))
        return TaskProblem(prompt, str(answer), {"parts": [list(part) for part in parts]})

    def _lines(self, problem: TaskProblem) -> list[str]:
        """The correct lines, in the prompt's order."""
        return [f"{a}{op}{b}={self.reduce(OPERATIONS[op](a, b))}\n" for a, op, b in problem.meta["parts"]]

    def next_step(self, problem: TaskProblem, previous_steps: Sequence[str]) -> str | None:
        """As in `Task`: the first expression of the prompt that has no line yet."""
        left, total = self._lines(problem), 0
        for step in previous_steps:
            line, result = _same_operands(left, step), self.claimed(step)
            if line is None or result is None:
                return None
            left.remove(line)
            total += result
        return left[0] if left else answer_line(self.reduce(total))

    def check_solution(self, problem: TaskProblem, steps: Sequence[str], *, given: Given = "truth") -> list[bool]:
        """As in `Task`, save that a line is not asked for at one place: it is correct wherever an expression that has
        no line yet may stand, among as many lines as there are expressions: behind a line too many none is correct."""
        found, left = super().check_solution(problem, steps, given=given), self._lines(problem)
        for i, step in enumerate(steps[: len(left)]):
            line = _same_operands(left, step)
            follows = given == "truth" or self.next_step(problem, steps[:i]) is not None
            found[i] = follows and line is not None and trim(line) == trim(step)
            left = [each for each in left if each is not line]
        return found


def _same_operands(lines: Sequence[str], step: str) -> str | None:
    """The first line with the operands of a step."""
    return next((line for line in lines if line.split("=")[0] == step.split("=")[0]), None)


@dataclass(frozen=True)
class LongAddition(EquationTask):
    """Sums such as ``478+64=``, added column by column from the units.

    A line is ``<digit>+<digit>+<carry in>=<column sum>``; a shorter number counts as padded with zeros. The units of a
    column sum are the digit written down, its tens the carry into the next line; the answer line puts together the
    digits and the last carry.
    """

    name: ClassVar[str] = "addition"
    line: ClassVar[re.Pattern[str]] = re.compile(r"[0-9]\+[0-9]\+[0-9]=([1-9]?[0-9])")

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
        sums = [self.claimed(step) for step in previous_steps]
        claimed = [total for total in sums if total is not None]
        if len(claimed) < len(sums):
            return None
        carry = claimed[-1] // 10 if claimed else 0
        if index == len(columns):
            digits = "".join(str(total % 10) for total in reversed(claimed))
            return answer_line(int(f"{carry}{digits}"))
        left, right = columns[index]
        return f"{left}+{right}+{carry}={left + right + carry}\n"

    def _incorrect_results(self, result: int) -> list[int]:
        """Every other column sum that two digits and a carry can have."""
        return [total for total in range(20) if total != result]


def _columns(problem: TaskProblem) -> list[tuple[int, int]]:
    """Pair the digits of the two numbers, units first."""
    left, right = (str(number) for number in problem.meta["numbers"])
    width = max(len(left), len(right))
    pairs = zip(reversed(left.zfill(width)), reversed(right.zfill(width)), strict=True)
    return [(int(a), int(b)) for a, b in pairs]


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
        check_bounds("cellular: ", self, rule="[0, 255]", width="[3, 64]")
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


@dataclass(frozen=True)
class StarGraph(Task):
    """Find the way from the centre of a star to the end of one arm: the first step needs a look ahead.

    The prompt lists all edges, each written outward and in shuffled order, then the question:
    ``4>7,1>3,7>2,4>1:4>2=``. A line is the next node of the path (``7``, ``2``). The answer is the first node after
    the centre, the one choice that cannot be copied from an edge; so a path with an incorrect node in it can still end
    in the correct answer. An answer guessed at random is correct once in `arms` times.
    Source: Bachmann and Nagarajan, "The pitfalls of next-token prediction" (2024).
    """

    name: ClassVar[str] = "star_graph"

    arms: int | str = 3
    """Arms of the star, 2 to 100; ``2-4`` draws the number for each problem."""
    length: int | str = 3
    """Nodes on each arm (the centre not counted), 2 to 100; ``2-4`` draws the length for each problem."""
    nodes: int = 10
    """Labels are drawn without repeats from [0, nodes), at most 99999; needs ``arms * length + 1`` of them."""

    def __post_init__(self) -> None:
        most_arms = self._store_range("arms", minimum=2, maximum=100)
        most_nodes = self._store_range("length", minimum=2, maximum=100)
        check_bounds("star_graph: ", self, nodes="[5, 99999]")
        needed = most_arms * most_nodes + 1
        if needed > self.nodes:
            raise ConfigError(
                f"star_graph: arms={self.arms} and length={self.length} make up to {needed} nodes but only "
                f"nodes={self.nodes} labels exist; set nodes={needed} or more"
            )

    def problem(self, rng: random.Random) -> TaskProblem:
        arms, length = draw_length(self.arms, rng), draw_length(self.length, rng)
        centre, *labels = rng.sample(range(self.nodes), arms * length + 1)
        paths = [labels[start : start + length] for start in range(0, len(labels), length)]
        edges = [edge for path in paths for edge in zip([centre, *path], path, strict=False)]
        rng.shuffle(edges)
        # The arms are random already, so the first one is as good a target as any; the edges do not tell it apart.
        goal = paths[0][-1]
        prompt = ",".join(f"{start}>{end}" for start, end in edges) + f":{centre}>{goal}=\n"
        return TaskProblem(prompt, str(paths[0][0]), {"centre": centre, "goal": goal, "arms": paths})

    def next_step(self, problem: TaskProblem, previous_steps: Sequence[str]) -> str | None:
        """As in `Task`: from a node the outward edge follows, from the end of any arm the answer line."""
        path = [_node(step) for step in previous_steps]
        if any(node is None for node in path):
            return None
        arms: list[list[int]] = problem.meta["arms"]
        if not path or path[-1] == problem.meta["centre"]:
            return next(f"{arm[0]}\n" for arm in arms if arm[-1] == problem.meta["goal"])
        for arm in arms:
            if path[-1] == arm[-1]:
                return answer_line(str(path[0]))
            if path[-1] in arm:
                return f"{arm[arm.index(path[-1]) + 1]}\n"
        return None

    def slips(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> list[str]:
        """The nodes of the other arms at the same distance from the centre."""
        node = _node(step)
        arms: list[list[int]] = problem.meta["arms"]
        depths = [arm.index(node) for arm in arms if node in arm]
        return [f"{arm[depth]}\n" for depth in depths for arm in arms if arm[depth] != node]

    def operands(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> str:
        current = trim(previous_steps[-1]) if previous_steps else problem.meta["centre"]
        return f"{current}>{problem.meta['goal']}"


def _node(step: str) -> int | None:
    """Read the node a line names; None for anything that is not a node line."""
    text = trim(step)
    return int(text) if re.fullmatch(INTEGER, text) else None


TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (ArithmeticChain, ModularChain, LongAddition, StarGraph, CellularAutomaton, IndependentLines)
}
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
        if not equals or not value or key in values:
            raise ConfigError(f"task {spec!r}: {item!r} is not key=value, every key once; write e.g. {task().spec}")
        check_choice(f"setting of task {name!r}", key, fields)
        try:
            values[key] = int(value) if fields[key].type == "int" else value
        except ValueError:
            raise ConfigError(f"{name}: {key}={value!r} is not a whole number") from None
    return task(**values)
