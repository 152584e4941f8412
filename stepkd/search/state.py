"""What search works with: problems, solutions so far, what continues and judges them, and what a method is.

A method (:class:`Search`) is settings with ``run``: problems and :class:`Tools` in, completions out, for every problem
its answer first. It never sees the reference answer. All problems of a call go on together, so that every call of the
generator and of the value has the states of all of them; what is found for a problem does not depend on the others.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Protocol, cast

import numpy as np

from stepkd.data.completion import UNKNOWN, Completion
from stepkd.errors import ConfigError
from stepkd.grading.extract import extract_answer
from stepkd.grading.judge import vote_keys
from stepkd.grading.pool import Grader
from stepkd.scorers.scorer import Reduction

End = Literal["step", "stop", "length"]
"""How a step ends: the solution goes on (``step``), is over (``stop``: end token or stop string), or was cut off
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
    """Whether the final answer is correct; None: not known, or the solution goes on. Methods do not know it."""
    step_ends: tuple[int, ...] = ()
    """Exclusive ends of the steps in ``token_ids``."""
    end: End = "step"
    """How the newest step ended; ``step``: the solution goes on."""
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

    def first(self, steps: int, *name: int) -> State:
        """The solution as far as its first steps.

        Args:
            steps: from 0 to all of them.
            name: goes into its path, so that what is drawn from it is not what was drawn from there before.
        """
        length = self.step_ends[steps - 1] if steps else 0
        kept = State(self.problem, self.steps[:steps], self.token_ids[:length], (*self.path[:steps], *name))
        return replace(kept, step_ends=self.step_ends[:steps], logprob=None)


START = Step("", (), 0.0, "step")
"""What leads to a tree's root."""


class StepGenerator(Protocol):
    """Continues states. What it gives for a state depends on the state alone, not on the others of a call."""

    def propose(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[Step]]:
        """Draw ``n`` next steps of every state.

        Args:
            states: unfinished solutions, of any problems.
            n: steps per state, >= 1.
            temperature: in place of the generator's; 0 is greedy.

        Returns:
            For each state its steps by sample number; several may say the same.
        """
        ...

    def complete(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[State]]:
        """Continue every state ``n`` times to the end of the solution.

        Args:
            states: unfinished solutions, of any problems.
            n: continuations per state, >= 1.
            temperature: in place of the generator's; 0 is greedy.

        Returns:
            For each state its finished solutions by sample number, all of their steps told.
        """
        ...

    def provenance(self) -> dict[str, Any]:
        """What the steps come from.

        Returns:
            JSON values: model, sampling settings, segmenter, seed.
        """
        ...


class Writer(StepGenerator, Protocol):
    """A generator that answers other prompts, too: what revises drafts."""

    def asked(self, problem: Problem, prompt: Any) -> Problem | None:
        """A problem with another prompt, as the generator reads it.

        Args:
            problem: names the noise, as it would for its own prompt.
            prompt: text or chat messages, which go through the generator's template.

        Returns:
            The problem to start states of; None: the prompt leaves no room for a token.
        """
        ...

    def room(self, state: State) -> int | None:
        """Tokens that a solution may still have behind a state, below 0 where it is too long; None: no limit."""
        ...


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
        ...

    def provenance(self) -> dict[str, Any]:
        """What the values come from, as JSON values."""
        ...


class Costs(defaultdict[int, Counter[str]]):
    """What has been spent on every problem, by its number.

    ``steps``, ``continuations``, ``tokens``: tokens drawn for steps, for rests of solutions and in other ways, those
    thrown away included; ``scored_tokens``: tokens of prompt and solution that a scorer was given, each time that it
    was, and those that a critic wrote; ``scorer_calls``: solutions, whole or in part, that it was given; ``unscored``:
    those it had no score for;
    ``no_room``: prompts about drafts that left no room for an answer;
    ``drafted``, ``passes``: tokens of a small model that drafts, and forward passes of the one that it drafts for.
    """

    DRAWN: ClassVar = {"steps": "search_step", "continuations": "search_rest", "tokens": "search_rest"}
    """What tokens are drawn for, and the purpose that keys their noise."""
    APART: ClassVar = ("drafted", "passes", "no_room")
    """What is neither tokens of the policy nor of the scorer."""

    def __init__(self) -> None:
        super().__init__(Counter)

    def generated(self, index: int) -> int:
        """Tokens drawn for a problem."""
        return sum(self[index][name] for name in self.DRAWN)


@dataclass(frozen=True, eq=False)
class Found(Completion):
    """A completion that a method found, and how it came to be."""

    trace: tuple[Mapping[str, Any], ...] = field(default=(), kw_only=True)
    """Decisions on the way, in order: JSON values, each with ``event``, and ``step`` (from 0) where it is about one."""
    score: float | None = field(default=None, kw_only=True)
    """What the method ranked it by, the higher the better; None: nothing."""


def found(
    state: State, *, sample: int = 0, score: float | None = None, trace: Sequence[Mapping[str, Any]] = ()
) -> Found:
    """A state as a completion.

    Args:
        state: finished, or as far as the method came: it then counts as cut off.
        sample: its number among the problem's solutions, from 0.
        score: what it was ranked by.
        trace: see :attr:`Found.trace`.
    """
    return Found(
        np.array(state.problem.prompt_ids),
        np.array(state.token_ids),
        np.array(state.step_ends) if state.step_ends else UNKNOWN,
        finish="stop" if state.end == "stop" else "length",
        text=state.text,
        sample=sample,
        id=str(state.problem.row.get("id", state.problem.index)),
        row=state.problem.row,
        score=score,
        trace=tuple(trace),
    )


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
    generators: Mapping[str, Writer] = field(default_factory=dict)
    """The other models that methods ask for (:attr:`Search.models`), by name; they count into ``costs``, too."""

    def scores(self, states: Sequence[State], reduction: Reduction | None = None) -> list[float | None]:
        """Scores of states; one without words, which nothing can judge, has none.

        Args:
            states: of any problems.
            reduction: from the scores of their steps to one; None: what suits the value.

        Raises:
            ConfigError: there is no value.
        """
        if self.value is None:
            raise ConfigError("the method needs a step scorer and there is none: give --scorer")
        asked = [state for state in states if state.text.strip()]
        scored = iter(self.value.values(asked, reduction) if asked else [])
        return [next(scored) if state.text.strip() else None for state in states]

    def judged(
        self, states: Sequence[State], reduction: Reduction | None = None
    ) -> list[tuple[float | None, tuple[float | None, ...]]]:
        """What the scorer says of states, read once: their scores as :meth:`scores`, and one for every step, None where
        there is none (no words, or cut off by the scorer's context).

        Raises:
            ConfigError: there is no value, or one that scores no steps.
        """
        judge = getattr(self.value, "judged", None)
        if judge is None:
            raise ConfigError("the method asks for scores of single steps and nothing gives them: give --scorer")
        asked = [state for state in states if state.text.strip()]
        said = iter(judge(asked, reduction) if asked else [])
        return [next(said) if state.text.strip() else (None, (None,) * len(state.steps)) for state in states]

    def writer(self, model: str | None = None) -> Writer:
        """What answers prompts about drafts.

        Args:
            model: name of another model; None: the generator itself.

        Raises:
            ConfigError: there is no such model, or it has no prompt template.
        """
        found = self.generator if model is None else self.other(model)
        if not hasattr(found, "asked"):
            raise ConfigError(f"{type(found).__name__} answers no prompts about drafts: take SampledSteps")
        return cast(Writer, found)

    def other(self, model: str) -> Writer:
        """Another model.

        Args:
            model: its name in :attr:`generators`.

        Raises:
            ConfigError: there is none of this name.
        """
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

    @property
    def name(self) -> str:
        """Its name in rows and tables: that of the class (``step_beam``), then the settings that differ from their
        defaults."""
        return self.named(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower())

    def named(self, head: str, *shown: str) -> str:
        """A head, then every setting that differs from its default: a word by itself (``_last``), anything else with
        the setting's name (``_theta-0.3``); what file names do not hold becomes ``-``.

        Args:
            head: kind of the method, with the settings that always stand in its name.
            shown: which settings these are.
        """
        words = [head]
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


def doubtful(scores: Sequence[float | None], theta: float) -> int | None:
    """The first step with a score below ``theta``; None: no step has one."""
    return next((step for step, score in enumerate(scores) if score is not None and score < theta), None)


def ranked(scores: Sequence[float | None]) -> list[int]:
    """Numbers of scores, the highest first; equal ones as they came, and those that are missing last."""
    return sorted(range(len(scores)), key=lambda i: (math.inf if (score := scores[i]) is None else -score, i))
