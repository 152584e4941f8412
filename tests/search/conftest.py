"""A known tree to search: scripted steps, scripted values, and a grader without processes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from stepkd.data.completion import Completion
from stepkd.models.spec import tiny_tokenizer
from stepkd.randomness import generator
from stepkd.sampling.engine import Engine, Progress, SamplingConfig, Scores, Wanted
from stepkd.scorers.scorer import Solutions
from stepkd.search.generate import SampledSteps, ScorerValue
from stepkd.search.state import Costs, Problem, State, Step, Tools

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
class Written:
    """Writes whole solutions that are known by what they continue; of several the next one each time, then the last."""

    known: Mapping[Any, Sequence[Sequence[str]]]
    """(id, prompt, text so far), (id, text so far) or text so far -> solutions, each the texts of its steps."""
    longest: int | None = None
    """Longest prompt about a draft, in characters."""
    most: int | None = None
    """Longest solution put together, in tokens."""
    costs: Costs = field(default_factory=Costs)
    asked_for: list[tuple[str, tuple[int, ...], float | None]] = field(default_factory=list)
    """Text so far, path and temperature of every state."""
    calls: int = 0
    times: Counter[Any] = field(default_factory=Counter)

    def propose(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[Step]]:
        raise AssertionError("whole solutions only")

    def complete(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[State]]:
        self.calls += 1
        assert n == 1
        return [[self._written(state, temperature)] for state in states]

    def _written(self, state: State, temperature: float | None) -> State:
        self.asked_for.append((state.text, state.path, temperature))
        name, prompt = state.problem.row["id"], state.problem.row["prompt"]
        keys = ((name, prompt, state.text), (name, state.text), state.text)
        choices = next(self.known[key] for key in keys if key in self.known)
        steps = choices[min(self.times[keys[0]], len(choices) - 1)]
        self.times[keys[0]] += 1
        for number, text in enumerate(steps):
            self.costs[state.problem.index]["continuations"] += len(text)
            end: Any = "stop" if number == len(steps) - 1 else "step"
            state = state.then(Step(text, tuple(map(ord, text)), None, end))
        return state

    def asked(self, problem: Problem, prompt: Any) -> Problem | None:
        if self.longest is not None and len(prompt) > self.longest:
            return None
        return replace(problem, row=dict(problem.row) | {"prompt": prompt}, prompt_ids=(9,))

    def room(self, state: State) -> int | None:
        return None if self.most is None else self.most - len(state.token_ids)

    def provenance(self) -> dict[str, Any]:
        return {"written": len(self.known)}


@dataclass
class Scored:
    """Scores steps by their text."""

    known: Mapping[str, float]
    meaning: Any = "correctness"

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        return [[[self.known[step] for step in steps] for steps in each.solutions] for each in problems]

    def provenance(self) -> dict[str, Any]:
        return {"scorer": "scripted"}


@dataclass
class KeyedSteps:
    """Draws the steps of a script by their probabilities, keyed by the state's path; remembers states and steps of each
    call. A script is a function of the state's text where it never ends."""

    script: Script | Callable[[str], Sequence[tuple[str, float, str]]]
    longest: int = 8
    calls: list[tuple[int, int]] = field(default_factory=list)
    temperatures: list[float | None] = field(default_factory=list)

    def propose(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[Step]]:
        self.calls.append((len(states), n))
        return [[self._step(state, j, "step") for j in range(n)] for state in states]

    def complete(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[State]]:
        self.temperatures.append(temperature)
        return [[self._rest(state, j) for j in range(n)] for state in states]

    def _step(self, state: State, j: int, purpose: str) -> Step:
        options = self.script(state.text) if callable(self.script) else self.script[state.text]
        noise = generator(0, purpose, state.problem.index, *state.path, "sample", j)
        text, probability, end = options[int(noise.choice(len(options), p=[each[1] for each in options]))]
        return Step(text, tuple(map(ord, text)), math.log(probability), end, j)  # type: ignore[arg-type]

    def _rest(self, state: State, j: int) -> State:
        start = len(state.steps)
        while state.end == "step":
            state = state.then(self._step(state, j if len(state.steps) == start else 0, "rest"))
            if state.end == "step" and len(state.steps) >= self.longest:
                state = replace(state, end="length")
        return state

    def provenance(self) -> dict[str, Any]:
        return {}


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
    """Correct iff the text's last word is the answer, and it was not cut off."""

    def grade(
        self, texts: Sequence[str], answers: Sequence[str], *, cut_off: Sequence[bool] = (), **_: object
    ) -> list[_Grade]:
        return [
            _Grade("correct" if text.split()[-1:] == [answer] and not cut else "incorrect")
            for text, answer, cut in zip(texts, answers, cut_off or [False] * len(texts), strict=True)
        ]


class TableEngine(Engine):
    """Types tokens by tables: text behind the prompt (one token) -> next characters with their probabilities.

    Args:
        table: ``$`` is the end token; a text that is not there is followed by it.
        samples: text so far -> what is sampled behind it, one after the other.
        entropies: text so far -> entropy; 0 where it is not there.
    """

    gives_entropies = True

    def __init__(
        self,
        table: Mapping[str, Mapping[str, float]],
        samples: Mapping[str, Sequence[str]] | None = None,
        entropies: Mapping[str, float] | None = None,
    ) -> None:
        tokenizer = tiny_tokenizer()
        eos = frozenset([tokenizer.eos_token_id])
        self.policy = SimpleNamespace(tokenizer=tokenizer, eos_ids=eos, max_length=None, vocab_size=100, spec=None)
        self.table, self.entropies = table, entropies or {}
        self.samples = {text: list(each) for text, each in (samples or {}).items()}
        self.calls: list[list[str]] = []

    def _id(self, character: str) -> int:
        known = self.policy.tokenizer
        return int(known.eos_token_id if character == "$" else known.convert_tokens_to_ids(character))

    def _next(self, text: str) -> Mapping[str, float]:
        return self.table.get(text, {"$": 1.0})

    def _draw(
        self, wanted: Sequence[Wanted], spec: SamplingConfig, on_progress: Progress | None
    ) -> list[list[Completion]]:
        decode = self.policy.tokenizer.decode
        self.calls.append([decode(each.prompt[1:]) for each in wanted])
        return [[self._type(each, spec) for _ in range(spec.n)] for each in wanted]

    def _type(self, wanted: Wanted, spec: SamplingConfig) -> Completion:
        start = text = self.policy.tokenizer.decode(wanted.prompt[1:])
        sampled = iter(self.samples[text].pop(0)) if spec.temperature else iter(())
        ids, raw, entropies, finish = [], [], [], "length"
        while len(ids) < wanted.limit and finish == "length":
            likely = max(self._next(text), key=self._next(text).__getitem__)
            character = next(sampled, "$") if spec.temperature else likely
            ids.append(self._id(character))
            raw.append(math.log(self._next(text)[character]))
            entropies.append(self.entropies.get(text, 0.0))
            text += character
            if character == "$" or any(stop in text[len(start) :] for stop in spec.stop):
                finish = "stop"
        told: dict[str, Any] = {"raw_logprobs": raw, "entropies": entropies if wanted.entropies else None}
        return Completion(np.array(wanted.prompt), np.array(ids), finish=finish, **told)  # type: ignore[arg-type]

    def _score(self, completions: Sequence[Completion], top_k: int) -> list[Scores]:
        found = []
        for each in completions:
            texts = [
                self.policy.tokenizer.decode([*each.prompt_ids[1:], *each.token_ids[:i]]) for i in range(each.length)
            ]
            rows = []
            for text in texts[: len(each.token_ids)]:
                known = sorted(self._next(text).items(), key=lambda item: -item[1])
                ids = [self._id(character) for character, _ in known]
                ids += [i for i in range(100) if i not in ids]
                logps = [math.log(chance) for _, chance in known] + [-99.0] * (100 - len(known))
                rows.append((ids[:top_k], logps[:top_k]))
            best = np.array([ids for ids, _ in rows]), np.array([logps for _, logps in rows])
            found.append(Scores(np.zeros(len(rows)), *best))
        return found

    def choice_logps(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Any:
        raise NotImplementedError


@dataclass
class CountedValue:
    """Values of texts, 0.5 where none is given, and all texts that were asked for."""

    known: Mapping[str, float | None]
    asked: list[str] = field(default_factory=list)

    def values(self, states: Sequence[State], reduction: str | None = None) -> list[float | None]:
        self.asked += [state.text for state in states]
        return [self.known.get(state.text, 0.5) for state in states]

    def provenance(self) -> dict[str, Any]:
        return {"value": "counted"}


def tabled(engine: TableEngine, value: Any = None, **sampling: Any) -> Tools:
    """Tools over a table."""
    tools = Tools(None, LastWordGrader(), value)  # type: ignore[arg-type]
    steps = {name: sampling.pop(name) for name in ("segmenter", "max_step_tokens", "max_tokens") if name in sampling}
    tools.generator = SampledSteps(engine, engine.policy, SamplingConfig(**sampling), costs=tools.costs, **steps)
    return tools


@pytest.fixture
def table_engine() -> type[TableEngine]:
    """Class of the engine by tables."""
    return TableEngine


@pytest.fixture
def counted() -> type[CountedValue]:
    """Class of the value that remembers what it was asked."""
    return CountedValue


@pytest.fixture
def tools_of() -> Any:
    """Tools over an engine by tables."""
    return tabled


@pytest.fixture
def scripted() -> type[ScriptedSteps]:
    """Class of the scripted generator."""
    return ScriptedSteps


@pytest.fixture
def keyed() -> type[KeyedSteps]:
    """Class of the scripted generator that draws."""
    return KeyedSteps


@pytest.fixture
def valued() -> type[ScriptedValue]:
    """Class of the scripted value."""
    return ScriptedValue


@pytest.fixture
def written() -> type[Written]:
    """Class of the generator of known solutions."""
    return Written


@pytest.fixture
def judged() -> Any:
    """Makes a value of the scores of steps, by text."""
    return lambda known, costs=None: ScorerValue(Scored(known), costs=costs)


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
