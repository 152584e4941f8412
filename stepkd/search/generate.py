"""What a model does in a search: :class:`SampledSteps` proposes steps, and two values judge the states they lead to.

A step is what the segmenter cuts off a sampled continuation first. Where a string marks the end of a step, sampling
stops there; else the step's token budget is sampled and the rest thrown away. Two things follow from not looking
ahead: a blank line that the model writes as a token of its own behind a step's end opens the next step, and a step is
never blank unless the solution ends with it.

Noise is keyed by (seed, purpose, problem, the samples that led to the state, sample), so the steps of a state do not
depend on the batch it is in, on the rank, or on what else has been searched.

A state is as good as what comes of finishing it several times, or as a step scorer says. In a tree the rewards of the
steps telescope: without discount, a step counts by the states that the walks through it end in. So a state's value must
speak of all its steps. Scores that say whether *a step* is correct are multiplied (the chance that all are correct),
those that estimate the future are taken from the newest step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, Literal, get_args

from stepkd.data.completion import Completion
from stepkd.data.encode import Encoder
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, DataError, check_bounds, check_choice
from stepkd.grading.pool import Grader
from stepkd.models.checkpoint import sampled_by
from stepkd.models.policy import Policy
from stepkd.sampling.engine import Engine, SamplingConfig, decode_text
from stepkd.scorers.scorer import Reduction, Solutions, StepScorer, default_reduction, facts_of, reduce_scores
from stepkd.search.state import (
    Costs,
    End,
    Name,
    Problem,
    State,
    StateScores,
    Step,
    StepGenerator,
    correct_ones,
    for_some,
)
from stepkd.steps.confidence import SIGNAL_SEGMENTERS
from stepkd.steps.segment import get_segmenter, segment, segmenter_settings
from stepkd.steps.text import TokenizedText, text_from_ids

STEP_STOPS: dict[str, tuple[str, ...]] = {"newline": ("\n",), "blank_line": ("\n\n",)}
"""Strings that end a step, by segmenter."""

_REMEMBERED = 100_000  # scored solutions


@dataclass
class _Draft:
    """A continuation in the making."""

    state: State
    sample: int
    token_ids: list[int] = field(default_factory=list)
    raw_logprobs: list[float] | None = field(default_factory=list)
    finish: End = "length"

    def logprob(self, start: int, end: int) -> float | None:
        """Sum over some of its tokens."""
        return None if self.raw_logprobs is None else sum(self.raw_logprobs[start:end])


@dataclass(eq=False)
class SampledSteps:
    """Samples steps from a policy.

    Raises:
        ConfigError: a number out of range, greedy sampling, or a segmenter that needs more than the engine gives.
    """

    engine: Engine
    """Draws the tokens, and from now on keeps prefixes (:attr:`~stepkd.sampling.engine.Engine.keeps_prefixes`), whoever
    else it draws for."""
    policy: Policy
    """The engine's model, whose tokenizer turns ids into text."""
    sampling: SamplingConfig
    """Temperature, top-p, top-k, seed, strings that end a *solution* (``stop``), and ``max_new_tokens``, the longest
    completion of a state. ``n`` is not read."""
    segmenter: str = field(default="newline", kw_only=True)
    """Name of the segmenter; one that reads log-probabilities may be used, other signals may not."""
    max_step_tokens: int = field(default=128, kw_only=True)
    """Longest step in tokens, >= 1: one proposed that is longer is cut off, and ends the solution. Whole solutions
    (:meth:`complete`) may have longer ones."""
    max_tokens: int | None = field(default=None, kw_only=True)
    """Longest solution in tokens, >= 1, beyond which it is cut off; None: as long as the model's context."""
    costs: Costs = field(default_factory=Costs, kw_only=True)
    """Tokens drawn so far for steps and continuations are counted here."""
    template: PromptTemplate | None = field(default=None, kw_only=True)
    """How other prompts than the problem's are read; None: there are no such."""

    def __post_init__(self) -> None:
        check_bounds("", self, max_step_tokens="[1, inf)", max_tokens="[1, inf)")
        if self.sampling.temperature == 0:
            raise ConfigError("search needs different steps from one state: temperature 0 gives the same one always")
        kind = self.segmenter.partition(":")[0]
        if kind in SIGNAL_SEGMENTERS and kind != "adaptive_step":
            what = "reads signals that sampling does not give"
            raise ConfigError(f"segmenter {kind} {what}: take adaptive_step, or one of plain text")
        self._cut = get_segmenter(self.segmenter)
        self.engine.keeps_prefixes = True  # steps begin where others end

    def propose(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[Step]]:
        """See :class:`~stepkd.search.state.StepGenerator`.

        Raises:
            DataError: a state that fills the model's context.
        """
        drafts = [[_Draft(state, j) for j in range(n)] for state in states]
        stops = (*STEP_STOPS.get(self.segmenter, ()), *self.sampling.stop)
        own = self.sampling.temperature if temperature is None else temperature
        spec = replace(self.sampling, n=n, temperature=own, max_new_tokens=self.max_step_tokens, stop=stops)
        self._draw(drafts, spec, "steps")
        flat = [draft for group in drafts for draft in group]
        while blank := [draft for draft in flat if self._unfinished_blank(draft)]:
            self._draw([[draft] for draft in blank], replace(spec, n=1), "steps")
        return [[self._step(draft) for draft in group] for group in drafts]

    def complete(self, states: Sequence[State], n: int, *, temperature: float | None = None) -> list[list[State]]:
        """See :class:`~stepkd.search.state.StepGenerator`.

        Raises:
            DataError: a state that fills the model's context.
        """
        drafts = [[_Draft(state, j) for j in range(n)] for state in states]
        own = self.sampling.temperature if temperature is None else temperature
        self._draw(drafts, replace(self.sampling, n=n, temperature=own), "continuations")
        return [
            [self.cut(own.state, own.token_ids, own.raw_logprobs, own.finish, own.sample) for own in group]
            for group in drafts
        ]

    def asked(self, problem: Problem, prompt: Any) -> Problem | None:
        """See :class:`~stepkd.search.state.StepGenerator`.

        Raises:
            ConfigError: there is no template.
            DataError: a prompt that the template does not take.
        """
        if self.template is None:
            raise ConfigError("the method asks about drafts: the generator needs the model's prompt template")
        row = dict(problem.row) | {"prompt": prompt}
        ids = Encoder(self.policy.tokenizer, self.template, self._cut, max_length=10**9).prompt_ids(row)
        room = self.room(State(new := replace(problem, row=row, prompt_ids=ids)))
        return new if room is None or room >= 1 else None

    def steps(
        self, state: State, token_ids: Sequence[int], raw_logprobs: Sequence[float] | None, end: End, sample: int = 0
    ) -> list[Step]:
        """Tokens behind a state, cut into steps.

        Args:
            state: unfinished.
            token_ids: at least one.
            raw_logprobs: their log-probabilities at temperature 1; None: nobody has them.
            end: how the last step ends.
            sample: number of the sample that they are.
        """
        raw = None if raw_logprobs is None else list(raw_logprobs)
        draft = _Draft(state, sample, list(token_ids), raw, end)
        new, found = self._behind(draft), list[Step]()
        left = len(self._until_stop(state, new.text))
        for start, stop in (spans := segment(self._cut, new)):
            text = new.span_text(start, stop)[:left]
            left -= len(text)
            how: End = end if stop == spans[-1][1] else "step"
            own = 0 if start else sample
            found.append(Step(text, new.token_ids[start:stop], draft.logprob(start, stop), how, own))
        return found

    def cut(self, state: State, *tokens: Any) -> State:
        """The state with tokens behind it; see :meth:`steps`."""
        return reduce(State.then, self.steps(state, *tokens), state)

    def draw(
        self,
        wanted: Sequence[tuple[Problem, Sequence[int], Name, int]],
        spec: SamplingConfig,
        kind: Literal["steps", "continuations"] = "continuations",
        *,
        entropies: bool = False,
    ) -> list[list[Completion]]:
        """Draw tokens behind solutions so far, and count them.

        Args:
            wanted: of each the problem, the solution's tokens, what tells this from other draws for the problem, and
                the most tokens to draw, >= 1.
            spec: how to draw.
            kind: what they are counted as (:class:`~stepkd.search.state.Costs`).
            entropies: whether these are wanted.

        Returns:
            For each its ``spec.n`` continuations; the first ones are those of a smaller n.
        """
        drawn = self.engine.generate(
            [(*problem.prompt_ids, *ids) for problem, ids, _, _ in wanted],
            spec,
            purpose="search_step" if kind == "steps" else "search_rest",
            indices=[(problem.index, *name) for problem, _, name, _ in wanted],
            limits=[most for *_, most in wanted],
            entropies=entropies,
        )
        for (problem, *_), own in zip(wanted, drawn, strict=True):
            self.costs[problem.index][kind] += sum(len(each.token_ids) for each in own)
        return drawn

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.search.state.StepGenerator`."""
        cut = {"name": self.segmenter.partition(":")[0], **segmenter_settings(self._cut)}
        lengths = {"max_step_tokens": self.max_step_tokens, "max_tokens": self.max_tokens}
        return sampled_by(self.policy, self.sampling) | {"segmenter": cut} | lengths

    def room(self, state: State) -> int | None:
        """Tokens that a solution may still have behind a state; None: no limit is known."""
        context, limit = self.engine.max_length, self.max_tokens
        left = [] if context is None else [context - len(state.problem.prompt_ids)]
        left += [] if limit is None else [limit]
        return min(left) - len(state.token_ids) if left else None

    def _draw(self, drafts: Sequence[Sequence[_Draft]], spec: SamplingConfig, kind: Any) -> None:
        """Continue groups of drafts that say the same so far."""
        wanted = []
        for head, state in ((group[0], group[0].state) for group in drafts):
            if (room := self._room(head, spec.longest)) < 1:
                what = f"a prompt of {len(state.problem.prompt_ids)} tokens with {len(state.token_ids)} of solution"
                full = self.max_tokens is not None and len(state.token_ids) >= self.max_tokens
                limit = f"max_tokens={self.max_tokens}" if full else f"the model's context of {self.engine.max_length}"
                raise DataError(f"{what} fills {limit}: drop the problem", path=state.problem.id)
            name = ("sample", head.sample, "token", len(head.token_ids)) if head.token_ids else ()
            wanted.append((state.problem, (*state.token_ids, *head.token_ids), (*state.path, *name), room))
        for group, continuations in zip(drafts, self.draw(wanted, spec, kind), strict=True):
            for draft, continuation in zip(group, continuations, strict=True):
                draft.token_ids += continuation.token_ids.tolist()
                if draft.raw_logprobs is None or continuation.raw_logprobs is None:
                    draft.raw_logprobs = None
                else:
                    draft.raw_logprobs += continuation.raw_logprobs.tolist()
                draft.finish = continuation.finish

    def _room(self, draft: _Draft, longest: int) -> int:
        """Tokens that a draft of at most so many may still have."""
        room = self.room(draft.state)
        return (longest if room is None else min(longest, room)) - len(draft.token_ids)

    def _unfinished_blank(self, draft: _Draft) -> bool:
        return (
            draft.finish == "stop"
            and self._room(draft, self.max_step_tokens) >= 1
            and draft.token_ids[-1] not in self.policy.eos_ids
            and not (text := decode_text(self.policy.tokenizer, draft.token_ids)).strip()
            and self.sampling.before_stop(draft.state.text + text) == draft.state.text + text
        )

    def _behind(self, draft: _Draft) -> TokenizedText:
        """The new tokens and their text, decoded together with those before them."""
        start = len(draft.state.token_ids)
        # A segmenter on log-probabilities sees those of the new tokens alone: it is given only these tokens.
        whole = text_from_ids(self.policy.tokenizer, (*draft.state.token_ids, *draft.token_ids))
        before = whole.char_ends[start - 1] if start else 0
        return TokenizedText(
            whole.token_ids[start:],
            whole.text[before:],
            tuple(end - before for end in whole.char_ends[start:]),
            logprobs=None if draft.raw_logprobs is None else tuple(draft.raw_logprobs),
        )

    def _step(self, draft: _Draft) -> Step:
        new = self._behind(draft)
        _, end = segment(self._cut, new)[0]
        ids, text = new.token_ids[:end], new.span_text(0, end)
        how: End = "step" if end < len(new) else draft.finish
        stopped = self._until_stop(draft.state, text)
        if stopped != text:
            how, text = "stop", stopped
        elif how == "stop" and ids[-1] not in self.policy.eos_ids:
            # A stop string of the step's, not of the solution's; without words behind it, there was no room for more.
            how = "step" if text.strip() else "length"
        room = self.room(draft.state)
        if how == "step" and room is not None and room <= len(ids):
            how = "length"
        return Step(text, ids, draft.logprob(0, end), how, draft.sample)

    def _until_stop(self, state: State, text: str) -> str:
        """The new text before a string that ends the solution; such a string may begin in an earlier step."""
        return self.sampling.before_stop(state.text + text)[len(state.text) :]


@dataclass(eq=False)
class ContinuationValue:
    """Share of correct answers among simulated continuations; the outcome itself where the solution is over.

    Raises:
        ConfigError: ``continuations`` is not positive.
    """

    generator: StepGenerator
    """Continues states."""
    grader: Grader
    """Compares final answers with the problem's ``answer``."""
    continuations: int = field(default=4, kw_only=True)
    """Continuations per state, >= 1."""

    def __post_init__(self) -> None:
        check_bounds("", self, continuations="[1, inf)")

    def values(self, states: Sequence[State], reduction: Reduction | None = None) -> list[float | None]:
        """See :class:`~stepkd.search.state.StateValue`; there is nothing to reduce."""
        n = self.continuations
        ends = for_some([state.correct is None for state in states], states, partial(self.generator.complete, n=n))
        correct = iter(correct_ones([end for group in ends for end in group or ()], self.grader))
        return [
            float(bool(state.correct)) if group is None else sum(next(correct) for _ in group) / n
            for state, group in zip(states, ends, strict=True)
        ]

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.search.state.StateValue`."""
        return {"value": "continuation", "continuations": self.continuations}


class ScorerValue:
    """What a step scorer says: a process reward model, a prompted judge, an exact checker.

    Args:
        scorer: scores the steps.
        reduction: from the scores of all steps to one: ``last`` (the newest step), ``product``, ``min`` or ``mean``;
            None: what suits the scorer's meaning.
        name: name of the value in the provenance.
        costs: what is scored is counted there.
    """

    def __init__(
        self,
        scorer: StepScorer,
        *,
        reduction: Reduction | None = None,
        name: str = "scorer",
        costs: Costs | None = None,
    ) -> None:
        self.scorer = scorer
        self.reduction: Reduction = default_reduction(scorer.meaning) if reduction is None else reduction
        check_choice("reduction", self.reduction, get_args(Reduction))
        self.name, self.costs = name, Costs() if costs is None else costs
        self._known: dict[tuple[int, tuple[str, ...]], tuple[list[float], int]] = {}  # scores, tokens of critiques

    def values(self, states: Sequence[State], reduction: Reduction | None = None) -> list[float | None]:
        """See :class:`~stepkd.search.state.StateValue`; states of one problem are scored together.

        No estimate has a state without words, and one of which the scorer could not read a step that counts.

        Raises:
            DataError: a score outside [0, 1].
        """
        return [value for value, _ in self.judged(states, reduction)]

    def judged(self, states: Sequence[State], reduction: Reduction | None = None) -> list[StateScores]:
        """Values of states, and the scores of all their steps; see :meth:`~stepkd.search.state.Tools.judged`.

        Raises:
            DataError: a score outside [0, 1].
        """
        scores = self.step_scores(states)
        judged = [(self.reduced(*each, reduction), each[1]) for each in zip(states, scores, strict=True)]
        for state, (value, _) in zip(states, judged, strict=True):
            self.costs[state.problem.index]["unscored"] += value is None
        return judged

    def step_scores(self, states: Sequence[State]) -> list[tuple[float | None, ...]]:
        """Scores of every state's steps, None for one without words or a score; what was scored before is not read
        again, and counts in :attr:`costs` all the same, with what a critic wrote of it."""
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        keys = [(state.problem.index, tuple(step for step in state.steps if step.strip())) for state in states]
        problems: dict[int, dict[tuple[str, ...], Any]] = {}
        for key, state in zip(keys, states, strict=True):
            if key[1] and key not in self._known:
                problems.setdefault(key[0], {})[key[1]] = state.problem.row
        asked = [Solutions(next(iter(steps.values())), list(steps)) for steps in problems.values()]
        for (index, steps), scored in zip(problems.items(), self.scorer.score(asked) if asked else [], strict=True):
            for each, own in zip(steps, scored, strict=True):
                self._known[index, each] = list(own), facts_of(own).get("generated_tokens", 0)
        found = []
        for key, state in zip(keys, states, strict=True):
            scores, written = self._known.get(key, ((), 0))
            if key[1]:
                self.costs[key[0]]["scorer_calls"] += 1
                self.costs[key[0]]["scored_tokens"] += len(state.problem.prompt_ids) + len(state.token_ids) + written
            known = iter(scores)
            by_step = [next(known) if step.strip() else math.nan for step in state.steps]
            found.append(tuple(None if math.isnan(score) else float(score) for score in by_step))
        return found

    def reduced(self, state: State, scores: Sequence[float | None], reduction: Reduction | None = None) -> float | None:
        """One score of those of a state's steps; None where one that counts is missing.

        Args:
            state: without words it has none.
            scores: of its steps.
            reduction: from the scores of all steps to one; None: its own.
        """
        reduction = reduction or self.reduction
        words = [step.strip() for step in state.steps]
        own = [math.nan if score is None else score for score, step in zip(scores, words, strict=True) if step]
        own = own[-1:] if reduction == "last" else own  # those before it may be missing then
        return reduce_scores(own, reduction, meaning=self.scorer.meaning) if own else None

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.search.state.StateValue`."""
        return {"value": self.name, "reduction": self.reduction, "scorer": self.scorer.provenance()}
