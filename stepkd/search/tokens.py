"""What searches that decide on tokens have in common: partial solutions, and drafts of what comes next.

None asks a model for one token at a time. A draft is drawn ahead; where a token of it calls for a decision, the
tokens before it are kept, and what is decided for takes the place of the rest, which is thrown away and counted. What a
draft says up to a token does not depend on what is decided there, so that the result is that of going token by token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from stepkd.data.completion import Completion
from stepkd.errors import ConfigError
from stepkd.search.state import End, Name, Problem, State, StepGenerator, Tools
from stepkd.steps.text import text_from_ids

if TYPE_CHECKING:
    from stepkd.search.generate import SampledSteps


class Drawn(NamedTuple):
    """Tokens behind a solution so far."""

    token_ids: list[int]
    raw_logprobs: list[float]
    """Log-probabilities at temperature 1."""
    entropies: list[float]
    """Of the model's own distributions (temperature 1, before top-p and top-k); empty where nobody asked."""
    end: End
    """How the solution ends with them; ``step``: it is unfinished."""

    def part(self, start: int, end: int) -> Drawn:
        """Some of them; the solution is unfinished where others follow."""
        how = self.end if end >= len(self.token_ids) else "step"
        return Drawn(self.token_ids[start:end], self.raw_logprobs[start:end], self.entropies[start:end], how)


@dataclass(eq=False)
class Writing:
    """A partial solution."""

    problem: Problem
    token_ids: list[int] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    end: End = "step"
    trace: list[dict[str, Any]] = field(default_factory=list)

    def add(self, drawn: Drawn) -> None:
        """Append tokens."""
        self.token_ids += drawn.token_ids
        self.raw_logprobs += drawn.raw_logprobs
        self.end = drawn.end if drawn.token_ids else self.end


def sampled_steps(generator: StepGenerator, method: str) -> SampledSteps:
    """The generator, where it is one that samples from an engine.

    Raises:
        ConfigError: it is another one, which has no tokens to decide on.
    """
    from stepkd.search.generate import SampledSteps

    if isinstance(generator, SampledSteps):
        return generator
    raise ConfigError(f"{method} decides on tokens, and {type(generator).__name__} gives steps: take SampledSteps")


def longest(generator: SampledSteps, problem: Problem) -> int:
    """Longest solution of a problem in tokens; none at all where the prompt fills the model's context."""
    room, most = generator.room(State(problem)), generator.sampling.longest
    return most if room is None else min(room, most)


class Drafter:
    """Draws tokens behind partial solutions.

    Args:
        tools: whose generator has the engine, and counts the tokens.
        method: who asks, for messages.
    """

    def __init__(self, tools: Tools, method: str) -> None:
        self.generator = sampled_steps(tools.generator, method)
        self.eos = self.generator.policy.eos_ids
        self.stops = self.generator.sampling.stop

    def draw(
        self,
        wanted: Iterable[tuple[Writing, Name]],
        most: int | None = None,
        *,
        greedy: bool = False,
        until: tuple[str, ...] = (),
        entropies: bool = False,
    ) -> list[Drawn]:
        """Continue partial solutions, which are left as they are.

        Args:
            wanted: unfinished solutions, each with what keys the noise beside its problem.
            most: tokens, at least 1; None: up to the solution's end.
            greedy: take the most likely tokens in place of sampling.
            until: strings that end a draft.
            entropies: whether they are wanted.

        Raises:
            ConfigError: entropies that the engine cannot tell.
            DataError: a prompt that fills the model's context.
        """
        given = list(wanted)
        spec = replace(self.generator.sampling, n=1, stop=(*until, *self.stops))
        if greedy:
            spec = replace(spec, temperature=0.0, top_p=1.0, top_k=0)
        left = [max(1, longest(self.generator, each.problem) - len(each.token_ids)) for each, _ in given]
        places = [
            (each.problem, each.token_ids, name, own if most is None else min(own, most))
            for (each, name), own in zip(given, left, strict=True)
        ]
        drawn = self.generator.draw(places, spec, entropies=entropies) if places else []
        return [self._drawn(each, own) for (each, _), (own,) in zip(given, drawn, strict=True)]

    def state(self, writing: Writing, drawn: Drawn | None = None) -> State:
        """A partial solution, cut into steps, with what may come behind it."""
        new = Drawn([], [], [], writing.end) if drawn is None else drawn
        ids, raw = [*writing.token_ids, *new.token_ids], [*writing.raw_logprobs, *new.raw_logprobs]
        return self.generator.cut(writing.problem, ids, raw, new.end)

    def one(self, writing: Writing, token_id: int, logprob: float) -> Drawn:
        """A token that may come next."""
        return Drawn([token_id], [logprob], [], self._standing(writing, [token_id])[1])

    def _drawn(self, writing: Writing, completion: Completion) -> Drawn:
        ids = completion.token_ids.tolist()
        kept, end = self._standing(writing, ids)
        if completion.raw_logprobs is None:
            raise ConfigError(
                "search by tokens reads the model's own log-probabilities, which this engine has at temperature 1 "
                "without top-p and top-k only: take these, or --engine Transformers"
            )
        entropies = [] if completion.entropies is None else completion.entropies[:kept].tolist()
        return Drawn(ids[:kept], completion.raw_logprobs[:kept].tolist(), entropies, end)

    def _standing(self, writing: Writing, new: Sequence[int]) -> tuple[int, End]:
        """How many of new tokens are kept, and how the solution ends with them; strings that end it may have begun
        before them."""
        before = len(writing.token_ids)
        if self.stops:
            whole = text_from_ids(self.generator.policy.tokenizer, (*writing.token_ids, *new))
            ends = [at + len(stop) for stop in self.stops if (at := whole.text.find(stop)) >= 0]
            if ends:
                return bisect_left(whole.char_ends, min(ends)) + 1 - before, "stop"
        if new[-1] in self.eos:
            return len(new), "stop"
        full = before + len(new) >= longest(self.generator, writing.problem)
        return len(new), "length" if full else "step"
