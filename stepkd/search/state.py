"""What search works with: problems, solutions so far, what continues and judges them, and what a method is.

A method (:class:`Search`) is settings with ``run``: problems and :class:`Tools` in, completions out, for every problem
its answer first. It never sees the reference answer. All problems of a call advance together, so that every call of the
generator and of the value has the states of all of them; what is found for a problem does not depend on the others.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, cast

import numpy as np

from stepkd.data.completion import UNKNOWN, Completion
from stepkd.errors import ConfigError
from stepkd.grading.extract import extract_answer
from stepkd.grading.judge import vote_keys
from stepkd.grading.pool import Grader
from stepkd.scorers.scorer import Reduction

End = Literal["step", "stop", "length"]
"""How a step ends: the solution is unfinished (``step``), is over (``stop``: end token or stop string), or was cut off
(``length``: no room for more tokens)."""
Name = tuple[int | str, ...]
"""What tells several draws for one problem apart."""


@dataclass(frozen=True)
class Problem:
    """A problem to search solutions of."""

    index: int
    """Number of the problem in the whole run; keys everything that is drawn for it."""
    row: Mapping[str, Any]
    """Problem row: ``id``, ``prompt``, ``answer``; scorers may want ``solution``, ``task`` and ``meta``."""
    prompt_ids: tuple[int, ...]
    """Prompt as the generator reads it."""
    seed: int = 0
    """The run's seed: with the number it keys what a method draws beside tokens."""

    @property
    def id(self) -> str:
        """The row's, or else the number."""
        return str(self.row.get("id", self.index))


@dataclass(frozen=True)
class Step:
    """What continues a state: its next step, or all the rest of the solution."""

    text: str
    """Text, separator included; blank where the solution ends at once."""
    token_ids: tuple[int, ...]
    """Sampled ids; an end token only where it ends the solution."""
    logprob: float | None
    """Sum of the tokens' log-probabilities under the model at temperature 1 (nats, <= 0); None: the engine has none."""
    end: End
    """How it ends."""
    sample: int = 0
    """Which of the samples it was, from 0."""


@dataclass(frozen=True)
class State:
    """A solution so far."""

    problem: Problem
    """What is being solved."""
    steps: tuple[str, ...] = ()
    """Texts of the steps, separators included; joined they are the solution's text."""
    token_ids: tuple[int, ...] = ()
    """Sampled ids of all steps, without the prompt."""
    path: tuple[int, ...] = ()
    """Which of its siblings each step was when it was sampled, and what else tells it from others: names the state
    within its problem, and keys what is drawn from it."""
    correct: bool | None = None
    """Whether the final answer is correct; None: not known, or the solution is unfinished. Methods do not know it."""
    step_ends: tuple[int, ...] = ()
    """Exclusive ends of the steps in ``token_ids``."""
    end: End = "step"
    """How the newest step ended; ``step``: the solution is unfinished."""
    logprob: float | None = 0.0
    """Sum of the log-probabilities of its tokens (:attr:`Step.logprob`)."""

    @property
    def text(self) -> str:
        """The solution's text."""
        return "".join(self.steps)

    def then(self, step: Step) -> State:
        """The solution with one more step."""
        ids = (*self.token_ids, *step.token_ids)
        return State(
            self.problem,
            (*self.steps, step.text),
            ids,
            (*self.path, step.sample),
            step_ends=(*self.step_ends, len(ids)),
            end=step.end,
            logprob=None if self.logprob is None or step.logprob is None else self.logprob + step.logprob,
        )

    def since(self, start: State) -> Step:
        """What was added to a beginning of it, at least one step, as one step."""
        known = None if self.logprob is None or start.logprob is None else self.logprob - start.logprob
        ids, sample = self.token_ids[len(start.token_ids) :], self.path[len(start.path)]
        return Step("".join(self.steps[len(start.steps) :]), ids, known, self.end, sample)

    def first(self, steps: int, *name: int) -> State:
        """The solution as far as its first steps.

        Args:
            steps: from 0 to all of them.
            name: goes into its path, so that what is drawn from it is not what was drawn from there before.
        """
        length = self.step_ends[steps - 1] if steps else 0
        kept = State(self.problem, self.steps[:steps], self.token_ids[:length], (*self.path[:steps], *name))
        return replace(kept, step_ends=self.step_ends[:steps], logprob=None)


Scored: TypeAlias = tuple[State, float | None]
"""A solution so far, and its score."""
StateScores: TypeAlias = tuple[float | None, tuple[float | None, ...]]
"""What a scorer says of a state: its score, and those of its steps; None: there is none."""
Trace: TypeAlias = list[dict[str, Any]]
"""Decisions, in order; see :attr:`Found.trace`."""
T = TypeVar("T")
R = TypeVar("R")
START = Step("", (), 0.0, "step")
"""What leads to a tree's root."""


class StepGenerator(Protocol):
    """Continues states. What it gives for a state depends on the state alone, not on the others of a call."""

    def propose(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[Step]]:
        """Draw ``n`` next steps, at least 1, of every state, an unfinished solution of any problem, at the generator's
        temperature or another one (0: greedy).

        Returns:
            For each state its steps by sample number; several may say the same.
        """

    def complete(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[State]]:
        """Continue every state ``n`` times, at least once, to the end of the solution, at the generator's temperature
        or another one (0: greedy).

        Returns:
            For each state its finished solutions by sample number, with all of their steps.
        """

    def asked(self, problem: Problem, prompt: Any) -> Problem | None:
        """A problem with another prompt, as the generator reads it: for methods that ask about drafts.

        Args:
            problem: names the noise, as it would for its own prompt.
            prompt: text or chat messages, which go through the generator's template.

        Returns:
            The problem to start states of; None: the prompt leaves no room for a token.
        """

    def room(self, state: State) -> int | None:
        """Tokens that a solution may still have behind a state, below 0 where it is too long; None: no limit."""

    def provenance(self) -> dict[str, Any]:
        """What the steps come from, as JSON values: model, sampling settings, segmenter, seed."""


class StateValue(Protocol):
    """Estimates how good states are: by continuations, by a step scorer, or by the policy itself."""

    def values(self, states: Sequence[State], reduction: Reduction | None = None) -> list[float | None]:
        """Estimate states.

        Args:
            states: solutions of at least one step, finished ones among them.
            reduction: from the scores of steps to one, where there are such; None: its own.

        Returns:
            For each a number in [0, 1], the higher the better; None: no estimate.
        """

    def provenance(self) -> dict[str, Any]:
        """What the values come from, as JSON values."""


class Costs(defaultdict[int, Counter[str]]):
    """What has been spent on every problem, by its number.

    ``steps``, ``continuations``: tokens drawn for single steps and for all else, those thrown away included;
    ``scored_tokens``: tokens of prompt and solution that a scorer was given, each time that it was, and those that a
    critic wrote; ``scorer_calls``: solutions, whole or in part, that it was given; ``unscored``: those it had no score
    for; ``no_room``: prompts about drafts that left no room for an answer; ``drafted``, ``passes``: tokens of a small
    model that drafts, and forward passes of the one that it drafts for.
    """

    def __init__(self) -> None:
        super().__init__(Counter)

    def generated(self, index: int) -> int:
        """Tokens drawn for a problem."""
        return self[index]["steps"] + self[index]["continuations"]


@dataclass(frozen=True, eq=False)
class Found(Completion):
    """A completion that a method found, and how it came to be."""

    trace: tuple[Mapping[str, Any], ...] = field(default=(), kw_only=True)
    """Decisions on the way, in order: JSON values, each with ``event``, and ``step`` (from 0) where it is about one."""
    score: float | None = field(default=None, kw_only=True)
    """What the method ranked it by, the higher the better; None: nothing."""
    columns: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """What else a row is to say of it, as JSON values."""


def found(
    state: State, *, sample: int = 0, score: float | None = None, trace: Sequence[Mapping[str, Any]] = ()
) -> Found:
    """A state as a completion; an unfinished one counts as cut off. ``sample`` is its number among the problem's
    solutions, from 0."""
    return Found(
        np.array(state.problem.prompt_ids),
        np.array(state.token_ids),
        np.array(state.step_ends) if state.step_ends else UNKNOWN,
        finish="stop" if state.end == "stop" else "length",
        text=state.text,
        sample=sample,
        id=state.problem.id,
        row=state.problem.row,
        score=score,
        trace=tuple(trace),
    )


def event(kind: str, candidates: Sequence[Scored], **more: Any) -> dict[str, Any]:
    """A decision among solutions, for a trace: their newest steps, their scores, and what else there is to say."""
    shown = {"steps": [state.steps[-1] for state, _ in candidates], "scores": [score for _, score in candidates]}
    return {"event": kind, **more, **shown}


def for_some(which: Sequence[bool], items: Sequence[T], call: Callable[[list[T]], Sequence[R]]) -> list[R | None]:
    """What a call gives for some of the items, None for the others; without such there is no call."""
    asked = [item for item, own in zip(items, which, strict=True) if own]
    given = iter(call(asked) if asked else ())
    return [next(given) if own else None for own in which]


@dataclass(eq=False)
class Tools:
    """What a method works with."""

    generator: StepGenerator
    """Continues solutions."""
    grader: Grader
    """Tells which answers are equal; what the reference answer is, a method does not ask."""
    value: StateValue | None = None
    """Judges solutions so far."""
    costs: Costs = field(default_factory=Costs)
    """What is spent; generator and value count into it, where they are this package's."""
    pool: dict[int, list[State]] = field(default_factory=dict)
    """Sampled whole solutions by the problem's number: methods that choose among samples share them."""
    generators: Mapping[str, StepGenerator] = field(default_factory=dict)
    """The other models that methods ask for (:attr:`Search.models`), by name; they count into ``costs``, too."""

    def scores(self, states: Sequence[State], reduction: Reduction | None = None) -> list[float | None]:
        """Scores of states, by a reduction of those of their steps (None: what suits the value); a state without words,
        which nothing can judge, has none.

        Raises:
            ConfigError: there is no value.
        """
        if self.value is None:
            raise ConfigError("the method needs a step scorer and there is none: give --scorer")
        return for_some(_worded(states), states, partial(self.value.values, reduction=reduction))

    def judged(self, states: Sequence[State], reduction: Reduction | None = None) -> list[StateScores]:
        """What the scorer says of states, read once: their scores as :meth:`scores`, and one for every step, None where
        there is none (no words, or cut off by the scorer's context).

        Raises:
            ConfigError: there is no value, or one that scores no steps.
        """
        judge = getattr(self.value, "judged", None)
        if judge is None:
            raise ConfigError("the method asks for scores of single steps and nothing gives them: give --scorer")
        said = for_some(_worded(states), states, partial(judge, reduction=reduction))
        return [each or (None, (None,) * len(state.steps)) for each, state in zip(said, states, strict=True)]

    def writer(self, model: str | None = None) -> StepGenerator:
        """The generator, or that of another model (:attr:`generators`).

        Raises:
            ConfigError: there is none of this name.
        """
        if model is None:
            return self.generator
        if model not in self.generators:
            raise ConfigError(f"the method works with {model}, which is not loaded: put it into Tools.generators")
        return self.generators[model]

    def samples(self, problems: Sequence[Problem], n: int) -> list[list[State]]:
        """The first ``n`` whole solutions of every problem, drawn once for all methods, and counted for each."""
        new = [problem for problem in problems if len(self.pool.get(problem.index, ())) < n]
        if new:
            before = {problem.index: Counter(self.costs[problem.index]) for problem in new}
            drawn = self.generator.complete([State(problem) for problem in new], n)
            self.pool |= {problem.index: states for problem, states in zip(new, drawn, strict=True)}
            self.costs |= before
        taken = [self.pool[problem.index][:n] for problem in problems]
        for problem, states in zip(problems, taken, strict=True):
            self.costs[problem.index]["continuations"] += sum(len(state.token_ids) for state in states)
        return taken

    def votes(self, groups: Sequence[Sequence[State]]) -> list[list[str | None]]:
        """For every group of finished solutions of one problem the keys of their answers: equal keys are equal answers;
        None: no answer was found, or the solution was cut off before one stood complete."""
        answers = [
            [extract_answer(each.text, self.grader.extractors, cut_off=each.end != "stop") for each in group]
            for group in groups
        ]
        return vote_keys(answers, self.grader)


class Search(ABC):
    """A test-time method: a frozen dataclass whose fields are its settings."""

    # No annotated class variable: jsonargparse reads a settings class's annotations with the names of its own module.
    @property
    def needs_scorer(self) -> bool:
        """Whether it asks a step scorer."""
        return True

    @property
    def at_once(self) -> int:
        """Partial solutions of a problem that it has at a time, >= 1: its setting ``n`` where it has one. A job
        takes so many problems at a time that they fill the engine's batch."""
        return int(getattr(self, "n", 1))

    form = ""  # how the name begins, with the settings that always stand in it: ``beam@{n}x{width}``

    @property
    def name(self) -> str:
        """Its name in rows and tables: ``form``, or else that of the class (``step_beam``), then the settings that
        differ from their defaults."""
        return self.named(self.form or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower())

    def named(self, head: str, *shown: str) -> str:
        """A head, then every setting that differs from its default: a word by itself (``_last``), anything else with
        the setting's name (``_theta-0.3``); what file names do not hold becomes ``-``.

        Args:
            head: kind of the method; settings in braces are filled in.
            shown: settings that the head tells otherwise.
        """
        words, shown = [head.format(**vars(self))], (*shown, *re.findall(r"{(\w+)}", head))
        for each in fields(cast(Any, self)):
            value = getattr(self, each.name)
            if each.name not in shown and value != each.default:
                words.append(value if isinstance(value, str) else f"{each.name}-{value}")
        return re.sub(r"[^\w@.+-]+", "-", "_".join(words))

    @property
    def models(self) -> tuple[str, ...]:
        """Models that it works with beside the policy, as they are loaded: names in :attr:`Tools.generators`."""
        return ()

    @abstractmethod
    def run(self, problems: Sequence[Problem], tools: Tools) -> list[list[Found]]:
        """Search solutions.

        Args:
            problems: any; what is found for one does not depend on the others.
            tools: what to work with.

        Returns:
            For each problem at least one completion, the method's answer first.
        """


def correct_ones(states: Sequence[State], grader: Grader) -> list[bool]:
    """Whether finished solutions have the ``answer`` of their rows."""
    rows = [state.problem.row for state in states]
    cut_off = [state.end == "length" for state in states]
    texts, answers = [state.text for state in states], [str(row["answer"]) for row in rows]
    return [each.verdict == "correct" for each in grader.grade(texts, answers, cut_off=cut_off, rows=rows)]


def no_logprobs(who: str) -> ConfigError:
    """An engine without the log-probabilities that someone needs."""
    return ConfigError(
        f"{who} reads the model's own log-probabilities, which this engine has at temperature 1 without top-p and "
        "top-k only: take these, or --engine Transformers"
    )


def _worded(states: Sequence[State]) -> list[bool]:
    return [bool(state.text.strip()) for state in states]


def ranked(scores: Sequence[float | None]) -> list[int]:
    """Numbers of scores, the highest first; equal ones as they came, and those that are missing last."""
    return sorted(range(len(scores)), key=lambda i: (math.inf if (score := scores[i]) is None else -score, i))
