"""Value-guided decoding: a step scorer decides on the tokens that the model is unsure of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from stepkd.data.completion import Completion
from stepkd.errors import check_bounds
from stepkd.randomness import generator as stream
from stepkd.scorers.scorer import Reduction
from stepkd.search.state import Found, Problem, Search, Tools, found
from stepkd.search.tokens import NONE, Drafter, Tokens, Writing

if TYPE_CHECKING:
    from stepkd.sampling.engine import Scores


@dataclass(eq=False)
class _Guided(Writing):
    """A solution whose next tokens have been drafted."""

    places: tuple[list[int], int] | None = None
    """Numbers of tokens in the order in which they are to be decided on, and how many; None: those that are unsure."""
    draft: Tokens = NONE
    likely: Scores | None = None
    """The most likely tokens at every position of the draft as it was drawn."""

    def take(self, number: int) -> None:
        """Have the first tokens of the draft stand."""
        self.add(self.draft.part(0, number))
        self.draft = self.draft.part(number, len(self.draft.ids))


@dataclass(frozen=True, kw_only=True)
class ValueGuided(Search):
    """Greedy decoding in which a step scorer decides on tokens that the model is unsure of (AdaptiveStep's token-level
    value-guided decoding, Liu et al. 2025, arXiv 2502.13943).

    Where the most likely token's probability is below the threshold, each of the most likely tokens is put behind the
    solution so far, which is scored as if its last step ended there, and the best is kept; of equal ones the likeliest.

    As in the paper's released code (Lux0926/ASPRM, ``evaluation/math/TVD/tvd.py``), save for how an end token is told
    (by its id), and that the scorer is given the solution cut into steps; theirs reads one step with its mark at the
    end, and takes the score there: ``reduction: last``. An end token that is the most likely one ends the solution
    without a call; as a candidate it is scored as the solution without it.
    """

    form = "value_guided@{candidates}"

    threshold: float = 0.55
    """Probability of the most likely token below which the scorer is asked, in [0, 1]; 0.55 is the released code's for
    mathematics, and 0.28 that for programs. Take it from your model's own probabilities; 0 is greedy decoding."""
    candidates: int = 8
    """Tokens that are scored, at least 1, which is greedy decoding; 8 in the released code."""
    placement: Literal["unsure", "random"] = "unsure"
    """Whether the scorer is asked where the model is unsure, or as often at tokens drawn at random, which tells what
    the placement is worth; less often where a solution ends before so many tokens (compare the calls)."""
    ahead: int = 32
    """Tokens that are drafted at a time, at least 1; what is behind another choice is thrown away, and counted."""
    reduction: Reduction | None = None
    """From step scores to one: product, min, mean or last; null takes what suits the scorer's meaning."""

    def __post_init__(self) -> None:
        check_bounds("", self, threshold="[0, 1]", candidates="[1, inf)", ahead="[1, inf)")

    def run(self, problems: Sequence[Problem], tools: Tools) -> list[list[Found]]:
        """See :meth:`~stepkd.search.state.Search.run`."""
        drafter = Drafter(tools, self.name)
        solutions = [_Guided(problem) for problem in problems]
        if self.placement == "random":
            for each, places in zip(solutions, self._places(problems, tools, drafter.eos), strict=True):
                each.places = places
        going: list[_Guided] = solutions
        while going := [each for each in going if each.said.end == "step"]:
            self._look_ahead(drafter, [each for each in going if not each.draft.ids])
            forks = []
            for each in going:
                at = self._next(each, drafter.eos)
                each.take(len(each.draft.ids) if at is None else at)
                forks += [] if at is None else [(each, self._options(drafter, each))]
            best = drafter.decided(
                "rerank",
                forks,
                lambda states: tools.scores(states, self.reduction),
                lambda first: {"confidence": math.exp(first.raw_logprobs[0])},
            )
            for (each, options), number in zip(forks, best, strict=True):
                each.draft = options[number] if number else each.draft
                each.take(1)
        return [[found(drafter.state(each), trace=each.trace)] for each in solutions]

    def _places(self, problems: Sequence[Problem], tools: Tools, eos: frozenset[int]) -> list[tuple[list[int], int]]:
        """As many tokens of every problem as are unsure, anywhere in a solution as long as the one that they are in:
        all its tokens in random order, since others take the place of those behind the new solution's end. Finding out
        how many there are costs the method nothing: its rival has paid for it."""
        before = {problem.index: Counter(tools.costs[problem.index]) for problem in problems}
        guided = replace(self, placement="unsure").run(problems, tools)
        tools.costs |= before
        places = []
        for problem, (answer, *_) in zip(problems, guided, strict=True):
            length = len(answer.token_ids) - (int(answer.token_ids[-1]) in eos)
            order = stream(problem.seed, "value-guided", problem.index).permutation(length)
            places.append((order.tolist(), len(answer.trace)))
        return places

    def _look_ahead(self, drafter: Drafter, new: Sequence[_Guided]) -> None:
        """Draft; where something is to be decided on, with the most likely tokens at every position."""
        for each, draft in zip(new, drafter.draw([(each, ()) for each in new], self.ahead, greedy=True), strict=True):
            each.draft, each.likely = draft, None
        asking = [each for each in new if self._next(each, drafter.eos) is not None]
        texts = [
            Completion(np.array([*each.problem.prompt_ids, *each.said.ids]), np.array(each.draft.ids))
            for each in asking
        ]
        engine, most = drafter.generator.engine, min(self.candidates, drafter.generator.policy.vocab_size)
        for each, likely in zip(asking, engine.score(texts, most) if texts else [], strict=True):
            each.likely = likely

    def _next(self, each: _Guided, eos: frozenset[int]) -> int | None:
        """The first token of the draft that is to be decided on; an end token never is."""
        ids, at = each.draft.ids, len(each.said.ids)
        if each.places is None:
            asked = [n for n, logprob in enumerate(each.draft.raw_logprobs) if math.exp(logprob) < self.threshold]
        else:
            order, most = each.places
            room = math.inf if each.draft.end == "step" else sum(token_id not in eos for token_id in ids)
            asked = [place - at for place in order if 0 <= place - at < room][: most - len(each.trace)]
        return min((n for n in asked if n < len(ids) and ids[n] not in eos), default=None)

    def _options(self, drafter: Drafter, each: _Guided) -> list[Tokens]:
        """The draft's token, and the other most likely ones."""
        assert each.likely is not None
        place = -len(each.draft.ids)
        first, logprob = each.draft.ids[0], each.draft.raw_logprobs[0]
        likely = zip(each.likely.ids_Tk[place].tolist(), each.likely.logps_Tk[place].tolist(), strict=True)
        options = [(first, logprob), *((other, own) for other, own in likely if other != first)]
        return [drafter.one(each, *option) for option in options[: self.candidates]]
