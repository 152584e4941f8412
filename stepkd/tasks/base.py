"""What a task of the tiny world is: a problem generator, a scratchpad solution and an exact checker for every line.

A step is one line. All steps end in a newline except the last, the answer line ``#### <answer>``; joined they are the
completion. A concrete task says how a problem is drawn and which step follows from the steps before it
(`Task.next_step`); the solution and both checkers follow from that one definition. Everything drawn is keyed by hashes:
the same parts give the same draw in every process, on every machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from stepkd.errors import ConfigError, check_choice

ANSWER_MARK = "#### "
INTEGER = r"(?:0|-?[1-9][0-9]{0,399})"  # canonical; bounded, because int() refuses very long digit strings
MAX_STEPS = 200  # more than any setting gives; stops a row whose meta describes a problem without an end

Given = Literal["truth", "claims"]


@dataclass(frozen=True)
class TaskProblem:
    """One generated problem."""

    prompt: str
    """The question as the model reads it; one line that ends in a newline."""
    answer: str
    """The correct final answer, as it stands after ``#### ``."""
    meta: dict[str, Any]
    """What the checker needs to know, as JSON values only."""


@dataclass(frozen=True)
class Task(ABC):
    """A family of generated problems whose every solution line can be checked exactly.

    Subclasses are frozen dataclasses of their settings.
    """

    name: ClassVar[str]

    @abstractmethod
    def problem(self, rng: random.Random) -> TaskProblem:
        """Draw one problem from `rng`."""

    @abstractmethod
    def next_step(self, problem: TaskProblem, previous_steps: Sequence[str]) -> str | None:
        """Return the one step that follows from what the previous steps claim.

        Args:
            problem: the problem.
            previous_steps: the steps so far, correct or incorrect; only their claims count, not whether they are true.

        Returns:
            The next line (with its newline) or the answer line (without), or None when nothing follows: the previous
            steps are malformed or have already answered.
        """

    @abstractmethod
    def slips(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> list[str]:
        """List the incorrect versions of a line, in a fixed order.

        Args:
            problem: the problem.
            previous_steps: well-formed steps that `step` follows from.
            step: ``next_step(problem, previous_steps)``.

        Returns:
            Lines of the same form with another result; empty for the answer line, which only copies.
        """

    @abstractmethod
    def operands(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> str:
        """Name what a line is computed from (operands and operator); the key of systematic slips.

        Args:
            problem: the problem.
            previous_steps: well-formed steps that `step` follows from.
            step: ``next_step(problem, previous_steps)``, not the answer line.
        """

    @property
    def spec(self) -> str:
        """The canonical text of the task and all its settings, which `get_task` reads back."""
        settings = ",".join(f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self))
        return f"{self.name}:{settings}"

    def solution(self, problem: TaskProblem) -> list[str]:
        """Return the correct steps; the last one is the answer line.

        Raises:
            ValueError: `problem` is not a problem of this task.
        """
        steps: list[str] = []
        while not (steps and is_answer(steps[-1])):
            step = self.next_step(problem, steps)
            if step is None or len(steps) == MAX_STEPS:
                raise ValueError(f"no answer follows after {len(steps)} steps")
            steps.append(step)
        return steps

    def check_solution(self, problem: TaskProblem, steps: Sequence[str], *, given: Given = "truth") -> list[bool]:
        """Judge every step of a solution; trailing newlines and spaces are ignored, nothing else is.

        Args:
            problem: the problem.
            steps: the steps, any text.
            given: ``"truth"``: correct iff it is what the problem demands at this position, so a line that consistently
                carries on an earlier slip is incorrect and a silent recovery is correct. ``"claims"``: correct iff it
                follows from what the previous steps claim.

        Returns:
            One bool per step; malformed and surplus text is incorrect. A solution that stops early can be all True:
            that it answers is the grader's business.

        Raises:
            ConfigError: another word for ``given``.
        """
        check_choice("given", given, get_args(Given))
        texts = [trim(step) for step in steps]
        if given == "truth":
            expected = [*self.solution(problem), *[None] * len(texts)]
        else:
            expected = [self.next_step(problem, texts[:index]) for index in range(len(texts))]
        return [after is not None and text == trim(after) for text, after in zip(texts, expected, strict=False)]

    def _store_range(self, name: str, *, minimum: int, maximum: int) -> int:
        """Check a setting such as ``5`` or ``3-6``, and keep one spelling of it, so that equal settings compare equal.

        Returns:
            The largest value.

        Raises:
            ConfigError: not a number or a range, reversed, or out of bounds.
        """
        value, place = getattr(self, name), f"{self.name}: {name}"
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", str(value))
        if match is None:
            raise ConfigError(f"{place}={value!r} is neither a number such as 5 nor a range such as 3-6")
        low, high = int(match[1]), int(match[2] or match[1])
        if not minimum <= low <= high <= maximum:
            raise ConfigError(f"{place}={value} is out of range: {minimum} to {maximum}, the smaller number first")
        object.__setattr__(self, name, low if low == high else f"{low}-{high}")
        return high


def draw_length(value: int | str, rng: random.Random) -> int:
    """Draw from a range setting as a task stores it: ``5`` or ``3-6``, all values equally likely."""
    low, _, high = str(value).partition("-")
    return rng.randint(int(low), int(high or low))


def trim(step: str) -> str:
    """Drop trailing newlines and spaces, the only difference the checkers forgive."""
    return step.rstrip("\n ")


def answer_line(answer: str | int) -> str:
    """Return the closing step."""
    return f"{ANSWER_MARK}{answer}"


def is_answer(step: str) -> bool:
    """Tell whether a step is an answer line."""
    return step.startswith(ANSWER_MARK)


def keyed_bits(*parts: str | int) -> int:
    """Hash the parts to 64 bits, independently of `PYTHONHASHSEED`.

    Args:
        parts: what the value is keyed by, in order; ``1`` and ``"1"`` are different parts.

    Returns:
        An integer in [0, 2**64).
    """
    text = json.dumps(parts, ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(text.encode("ascii"), digest_size=8).digest(), "big")


def keyed_fraction(*parts: str | int) -> float:
    """Hash the parts to a number in [0, 1), uniform over different keys."""
    return (keyed_bits(*parts) >> 11) / 2**53


def keyed_rng(*parts: str | int) -> random.Random:
    """Return a fresh generator keyed by the parts (seed, purpose, index, ...)."""
    return random.Random(keyed_bits(*parts))
