"""What searches that decide on tokens have in common: partial solutions, and drafts of what comes next.

None asks a model for one token at a time. A draft is drawn ahead; where a token of it calls for a decision, the
tokens before it are kept, and what is decided for takes the place of the rest, which is thrown away and counted. What a
draft says up to a token does not depend on what is decided there, so that the result is that of going token by token.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from stepkd.errors import ConfigError, check_bounds
from stepkd.search.state import (
    End,
    Found,
    Name,
    Problem,
    Search,
    State,
    StepGenerator,
    Tools,
    Trace,
    event,
    found,
    no_logprobs,
    ranked,
)
from stepkd.steps.text import text_from_ids

if TYPE_CHECKING:
    from stepkd.search.generate import SampledSteps


class Tokens(NamedTuple):
    """Tokens of a solution, one after the other."""

    ids: list[int]
    raw_logprobs: list[float]
    """Log-probabilities at temperature 1."""
    entropies: list[float]
    """Of the model's own distributions (temperature 1, before top-p and top-k); empty where nobody asked."""
    end: End
    """How the solution ends with them; ``step``: it is unfinished."""

    def part(self, start: int, end: int) -> Tokens:
        """Some of them; the solution is unfinished where others follow."""
        how = self.end if end >= len(self.ids) else "step"
        return Tokens(self.ids[start:end], self.raw_logprobs[start:end], self.entropies[start:end], how)


NONE = Tokens([], [], [], "step")


@dataclass(eq=False)
class Writing:
    """A partial solution."""

    problem: Problem
    said: Tokens = NONE
    trace: Trace = field(default_factory=list)

    def add(self, new: Tokens) -> None:
        """Append tokens."""
        ids, raw, _, end = self.said
        self.said = Tokens(ids + new.ids, raw + new.raw_logprobs, [], new.end if new.ids else end)


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
    ) -> list[Tokens]:
        """Continue partial solutions, which are left as they are.

        Args:
            wanted: unfinished solutions, each with what keys the noise beside its problem.
            most: tokens, at least 1; None: up to the solution's end.
            greedy: take the most likely tokens in place of sampling.
            until: strings that end a draft.
            entropies: whether they are wanted.

        Raises:
            ConfigError: entropies or log-probabilities that the engine does not give.
            DataError: a prompt that fills the model's context.
        """
        spec = replace(self.generator.sampling, n=1, stop=(*until, *self.stops))
        spec = replace(spec, temperature=0.0, top_p=1.0, top_k=0) if greedy else spec
        given, places = list(wanted), []
        for each, name in given:
            left = max(1, longest(self.generator, each.problem) - len(each.said.ids))
            places.append((each.problem, each.said.ids, name, left if most is None else min(left, most)))
        found = []
        drawn = self.generator.draw(places, spec, entropies=entropies) if places else []
        for (each, _), (own,) in zip(given, drawn, strict=True):
            if own.raw_logprobs is None:
                raise no_logprobs("search by tokens")
            kept, end = self._standing(each, own.token_ids.tolist())
            asked = [] if own.entropies is None else own.entropies[:kept].tolist()
            found.append(Tokens(own.token_ids[:kept].tolist(), own.raw_logprobs[:kept].tolist(), asked, end))
        return found

    def state(self, writing: Writing, new: Tokens = NONE) -> State:
        """A partial solution, cut into steps, with what may come behind it."""
        whole = Writing(writing.problem, writing.said)
        whole.add(new)
        return self.generator.cut(State(writing.problem), *whole.said[:2], whole.said.end)

    def one(self, writing: Writing, token_id: int, logprob: float) -> Tokens:
        """A token that may come next."""
        return Tokens([token_id], [logprob], [], self._standing(writing, [token_id])[1])

    def decided(
        self,
        kind: str,
        forks: Sequence[tuple[Writing, Sequence[Tokens]]],
        score: Callable[[list[State]], Sequence[float | None]],
        about: Callable[[Tokens], dict[str, Any]],
    ) -> list[int]:
        """Which of the tokens that may come next are kept of every solution: those of the highest score.

        Args:
            kind: the event's name, which goes into the trace.
            forks: solutions, each with what may come next.
            score: scores solutions with what came next.
            about: what else the trace says, by the first tokens.
        """
        states = [[self.state(writing, option) for option in options] for writing, options in forks]
        scores, kept = iter(score([*chain(*states)])), []
        for (writing, options), own in zip(forks, states, strict=True):
            shown = [(state, next(scores)) for state in own]
            kept.append(best := ranked([score for _, score in shown])[0])
            place = {"step": len(own[best].steps) - 1, "token": len(writing.said.ids)}
            writing.trace.append(event(kind, shown, **place, **about(options[0]), kept=[best]))
        return kept

    def _standing(self, writing: Writing, new: Sequence[int]) -> tuple[int, End]:
        """How many of new tokens are kept, and how the solution ends with them; strings that end it may have begun
        before them."""
        before = len(writing.said.ids)
        if self.stops:
            whole = text_from_ids(self.generator.policy.tokenizer, (*writing.said.ids, *new))
            ends = [at + len(stop) for stop in self.stops if (at := whole.text.find(stop)) >= 0]
            if ends:
                return bisect_left(whole.char_ends, min(ends)) + 1 - before, "stop"
        if new[-1] in self.eos:
            return len(new), "stop"
        full = before + len(new) >= longest(self.generator, writing.problem)
        return len(new), "length" if full else "step"


MARKS = (".", ",", "\n", "?", "!", ":", ";", ")", "]", "}")
"""Strings that end a trial: the released code's. Where none comes, the longest step bounds it; the first trial, which
was begun before the uncertain token, is then shorter than the others by what came before that token."""


@dataclass(frozen=True, kw_only=True)
class EntropyBranching(Search):
    """Sampling that tries several ways on where the next token is uncertain (Cautious Next Token Prediction, Wang et
    al. 2025, arXiv 2507.03038).

    At every token ``K = floor(1 + (k_max - 1) * clip((H - low) / (high - low), 0, 1))`` trials, H its entropy at
    temperature 1. Where K is above 1, each is drawn up to a punctuation mark, and one of them is kept as a whole;
    all trials of all problems are drawn at once.

    Entropy and the least perplexity ``exp(-mean log p)`` are those of the paper's algorithm 1, of the model itself. Its
    released code (wyzjack/CNTP, commit 105b096), from which K and the defaults are, takes both from the distribution
    that is sampled from; the algorithm's K is ``max(1, min(k_max, floor((H - low) / (high - low) * k_max)))``. A mark
    ends a trial there only as a token of its own, here wherever it occurs.

    An entropy takes the probabilities of all tokens: the transformers engine has them, vLLM's do not, and are refused.
    """

    needs_scorer: ClassVar[bool] = False
    form = "entropy_branching@{k_max}"

    k_max: int = 40
    """Trials of a token of high entropy, at least 1, which is sampling; 40 in the released code."""
    low: float = 0.01
    """Entropy in nats up to which a token is sampled as ever, at least 0; 0.01 for GSM8K in the released scripts."""
    high: float = 1.5
    """Entropy in nats from which there are k_max trials, above low; 1.5 in the released scripts."""

    def __post_init__(self) -> None:
        check_bounds("", self, k_max="[1, inf)", low="[0, inf)")
        if not self.low < self.high < math.inf:
            raise ConfigError(f"high={self.high}: must be finite, and above low={self.low}")

    def trials(self, entropy: float) -> int:
        """K of a token.

        Args:
            entropy: in nats, at least 0.
        """
        share = min(max((entropy - self.low) / (self.high - self.low), 0.0), 1.0)
        return math.floor(1 + (self.k_max - 1) * share)

    def run(self, problems: Sequence[Problem], tools: Tools) -> list[list[Found]]:
        """See :meth:`~stepkd.search.state.Search.run`."""
        drafter = Drafter(tools, self.name)
        solutions = [Writing(problem) for problem in problems]
        branches = self.k_max > 1  # else a draft is the solution
        until, most = (MARKS, drafter.generator.max_step_tokens) if branches else ((), None)
        going = solutions
        while going := [each for each in going if each.said.end == "step"]:
            wanted = [(each, _trial(each, 0)) for each in going]
            forks: list[tuple[Writing, list[Tokens]]] = []
            others: list[tuple[Writing, Name]] = []
            for each, draft in zip(going, drafter.draw(wanted, most, until=until, entropies=branches), strict=True):
                counts = [self.trials(entropy) for entropy in draft.entropies]
                at = next((number for number, count in enumerate(counts) if count > 1), len(draft.ids))
                each.add(draft.part(0, at))
                if at < len(draft.ids):
                    # The rest of the draft, drawn before anything was known of the entropy, is one of the trials.
                    forks.append((each, [draft.part(at, len(draft.ids))]))
                    others += [(each, _trial(each, number)) for number in range(1, counts[at])]
            trials = dict(forks)
            for (each, _), trial in zip(others, drafter.draw(others, most, until=until), strict=True):
                trials[each].append(trial)
            # Of perplexities the inverse, so that the highest is best.
            scores = [math.exp(np.mean(trial.raw_logprobs)) for _, own in forks for trial in own]
            kept = drafter.decided("branch", forks, lambda _: scores, lambda first: {"entropy": first.entropies[0]})  # noqa: B023
            for (each, own), number in zip(forks, kept, strict=True):
                each.add(own[number])
        return [[found(drafter.state(each), trace=each.trace)] for each in solutions]


def _trial(each: Writing, number: int) -> Name:
    """Key of a trial; the first one of all has that of a whole solution."""
    return ("token", len(each.said.ids), number) if each.said.ids or number else ()


@dataclass(frozen=True, kw_only=True)
class Speculative(Search):
    """Exact speculative sampling (Leviathan et al. 2022, arXiv 2211.17192), with SpecDec++'s stop rule where there is a
    head (Huang et al. 2024, arXiv 2405.19715): see :mod:`stepkd.sampling.speculative`.

    Solutions are distributed as the model samples them alone, at fewer forward passes of it: cheap samples of a large
    teacher. That holds as far as both contexts reach: where the draft's is the shorter one, it cuts solutions off.
    Temperature, top-p and top-k are those of the search's sampling; the transformers engine alone does it. Of a
    problem's costs, ``continuations`` are the tokens of its solutions, ``drafted`` those that the small model drew, and
    ``passes`` the large one's forward passes.
    """

    needs_scorer: ClassVar[bool] = False

    draft: str
    """Model that drafts, of the same vocabulary: a run, a folder, a hub id or a GGUF file."""
    length: int = 5
    """Most tokens of a draft, at least 1; 20 with a head in the paper."""
    head: str | None = None
    """File of an acceptance head for this draft (``train_acceptance_head(...).save``); null: all drafts have the full
    length."""
    threshold: float = 0.3
    """Probability of a rejection so far at which a head ends a draft, in (0, 1); the paper's repository has 0.3 and
    0.7."""
    shortest: int = 2
    """Fewest tokens of a draft that a head ends, at least 1; 2 in the paper."""
    n: int = 1
    """Samples of a problem, at least 1; the first one is the answer."""

    def __post_init__(self) -> None:
        check_bounds("", self, length="[1, inf)", threshold="(0, 1)", shortest="[1, inf)", n="[1, inf)")

    @property
    def models(self) -> tuple[str, ...]:
        """See :attr:`~stepkd.search.state.Search.models`."""
        return (self.draft,)

    def run(self, problems: Sequence[Problem], tools: Tools) -> list[list[Found]]:
        """See :meth:`~stepkd.search.state.Search.run`; one solution after the other.

        Raises:
            ConfigError: another engine, or a head of another draft.
            ModelError: a draft of another vocabulary.
        """
        from stepkd.sampling.acceptance import AcceptanceHead
        from stepkd.sampling.speculative import Speculator, Stop
        from stepkd.sampling.transformers_engine import TransformersEngine

        generator, drafts = (sampled_steps(each, self.name) for each in (tools.generator, tools.writer(self.draft)))
        if not isinstance(generator.engine, TransformersEngine):
            raise ConfigError(
                f"{self.name} reads the probabilities of all tokens, which {type(generator.engine).__name__} does not "
                "give (vLLM has speculative decoding of its own): take --engine Transformers"
            )
        head = None if self.head is None else AcceptanceHead.load(self.head).to(generator.policy.device)
        stop = Stop(self.length, head, self.threshold, self.shortest)
        speculator = Speculator(generator.policy, drafts.policy, stop)
        results: list[list[Found]] = []
        for problem in problems:
            results.append([])
            spec = replace(generator.sampling, max_new_tokens=max(1, longest(generator, problem)))
            for number in range(self.n):
                drawn, drafted, accepted, passes = speculator.sample(problem.prompt_ids, spec, problem.index, number)
                ids, new = drawn.token_ids.tolist(), {"drafted": drafted, "passes": passes}
                tools.costs[problem.index].update(new, continuations=len(ids))
                state = generator.cut(State(problem), ids, drawn.raw_logprobs.tolist(), drawn.finish)
                trace = [{"event": "speculation", "tokens": len(ids), **new, "accepted": accepted}]
                results[-1].append(found(state, sample=number, trace=trace))
        return results
