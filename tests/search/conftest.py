"""A known tree to search: scripted steps, scripted values, and a grader without processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest

from stepkd.search.state import Problem, State, Step

Script = Mapping[str, Sequence[tuple[str, float, str]]]
"""Text so far -> next steps: text, probability of its one token, how it ends."""


@dataclass
class ScriptedSteps:
    """Proposes the steps of a script; remembers how many states each call had."""

    script: Script
    calls: list[int] = field(default_factory=list)

    def propose(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[Step]]:
        self.calls.append(len(states))
        return [
            [
                Step(text, (len(text),), math.log(probability), end, j)  # type: ignore[arg-type]
                for j, (text, probability, end) in enumerate(self.script[state.text][:n])
            ]
            for state in states
        ]

    def complete(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[State]]:
        """Every continuation takes the ``j``-th step first and then always the first one."""
        return [[self._rest(state, j) for j in range(n)] for state in states]

    def _rest(self, state: State, j: int) -> State:
        start = state
        while state.end == "step":
            steps = self.script[state.text]
            number = j if state is start and j < len(steps) else 0
            text, probability, end = steps[number]
            state = state.then(Step(text, (len(text),), math.log(probability), end, number))  # type: ignore[arg-type]
        return state

    def provenance(self) -> dict[str, Any]:
        return {"script": len(self.script)}


@dataclass
class ScriptedValue:
    """Values by the text so far."""

    known: Mapping[str, float | None]

    def values(self, states: Sequence[State], reduction: str | None = None) -> list[float | None]:
        return [self.known[state.text] for state in states]

    def provenance(self) -> dict[str, Any]:
        return {"value": "scripted"}


class _Grade(NamedTuple):
    verdict: str


class LastWordGrader:
    """Correct iff the text's last word is the answer."""

    def grade(self, texts: Sequence[str], answers: Sequence[str], **_: object) -> list[_Grade]:
        return [
            _Grade("correct" if text.split()[-1:] == [answer] else "incorrect")
            for text, answer in zip(texts, answers, strict=True)
        ]


@pytest.fixture
def scripted() -> type[ScriptedSteps]:
    """Class of the scripted generator."""
    return ScriptedSteps


@pytest.fixture
def valued() -> type[ScriptedValue]:
    """Class of the scripted value."""
    return ScriptedValue


@pytest.fixture
def grader() -> Any:
    return LastWordGrader()


@pytest.fixture
def known_tree() -> Script:
    """Two steps, then four answers of which ``#### 1`` after ``a`` is correct."""
    return {
        "": [("a\n", 0.5, "step"), ("b\n", 0.25, "step")],
        "a\n": [("#### 1", 0.5, "stop"), ("#### 2", 0.5, "stop")],
        "b\n": [("#### 2", 0.5, "stop"), ("#### 3", 0.5, "stop")],
    }


@pytest.fixture
def known_values() -> ScriptedValue:
    return ScriptedValue(
        {"a\n": 0.6, "b\n": 0.5, "a\n#### 1": 0.9, "a\n#### 2": 0.4, "b\n#### 2": 0.3, "b\n#### 3": 0.2}
    )


@pytest.fixture
def problem() -> Problem:
    return Problem(0, {"id": "p", "prompt": "?", "answer": "1"}, (7,))
