"""Branching where the next token is uncertain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stepkd.errors import ConfigError, check_bounds
from stepkd.scorers.scorer import Reduction
from stepkd.search.beam import event
from stepkd.search.state import Found, Name, Problem, Search, Tools, found, ranked
from stepkd.search.tokens import Drafter, Drawn, Writing


@dataclass(frozen=True, kw_only=True)
class EntropyBranching(Search):
    """Sampling that tries several ways on where the next token is uncertain (Cautious Next Token Prediction, Wang et
    al. 2025, arXiv 2507.03038).

    At every token ``K = floor(k_min + (k_max - k_min) * clip((H - low) / (high - low), 0, 1))`` trials, H its entropy
    at temperature 1. Where K is above 1, each is drawn up to a punctuation mark, and one of them is kept as a whole;
    all trials of all problems are drawn at once.

    Entropy and the least perplexity ``exp(-mean log p)`` are those of the paper's algorithm 1, of the model itself. Its
    released code (wyzjack/CNTP, commit 105b096), from which K and the defaults are, takes both from the distribution
    that is sampled from; the algorithm's K is ``max(1, min(k_max, floor((H - low) / (high - low) * k_max)))``. A mark
    ends a trial there only as a token of its own, here wherever it occurs.

    An entropy takes the probabilities of all tokens: the transformers engine has them, vLLM's do not, and are refused.
    """

    k_min: int = 1
    """Trials of a token that is certain, at least 1; with 1 it is sampled as ever."""
    k_max: int = 40
    """Trials of a token of high entropy, at least k_min; 40 in the released code, and 1 is sampling."""
    low: float = 0.01
    """Entropy in nats up to which there are k_min trials, at least 0; 0.01 for GSM8K in the released scripts."""
    high: float = 1.5
    """Entropy in nats from which there are k_max trials, above low; 1.5 in the released scripts."""
    until: tuple[str, ...] = (".", ",", "\n", "?", "!", ":", ";", ")", "]", "}")
    """Strings that end a trial, at least one; these are the released code's. Where none comes, the longest step bounds
    a trial; the first one, which was begun before the uncertain token, is then shorter than the others by what came
    before that token."""
    choose: Literal["perplexity", "scorer"] = "perplexity"
    """Which trial is kept: that of least perplexity, as in the paper, or that of the step scorer's highest score."""
    reduction: Reduction | None = None
    """From the step scorer's scores to one: product, min, mean or last; null takes what suits their meaning."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "until", (self.until,) if isinstance(self.until, str) else tuple(self.until))
        check_bounds("", self, k_min="[1, inf)", low="[0, inf)")
        if self.k_max < self.k_min:
            raise ConfigError(f"k_max={self.k_max}: must be at least k_min={self.k_min}")
        if not self.low < self.high < math.inf:
            raise ConfigError(f"high={self.high}: must be finite, and above low={self.low}")
        if not self.until or not all(self.until):
            raise ConfigError(f"until={self.until}: a trial needs strings to end at, and none of them empty")
        if self.choose == "perplexity" and self.reduction is not None:
            raise ConfigError(f"reduction={self.reduction}: perplexity has no scores to reduce; drop it")

    @property
    def needs_scorer(self) -> bool:
        """Whether it asks a step scorer."""
        return self.choose == "scorer"

    @property
    def name(self) -> str:
        """See :attr:`~stepkd.search.state.Search.name`."""
        return self.named(f"entropy_branching@{self.k_max}", "k_max")

    def trials(self, entropy: float) -> int:
        """K of a token.

        Args:
            entropy: in nats, at least 0.
        """
        share = min(max((entropy - self.low) / (self.high - self.low), 0.0), 1.0)
        return math.floor(self.k_min + (self.k_max - self.k_min) * share)

    def run(self, problems: Sequence[Problem], tools: Tools) -> list[list[Found]]:
        """See :meth:`~stepkd.search.state.Search.run`."""
        drafter = Drafter(tools, self.name)
        solutions = [Writing(problem) for problem in problems]
        branches = self.k_max > 1  # else a draft is the solution
        until, most = (self.until, drafter.generator.max_step_tokens) if branches else ((), None)
        going = solutions
        while going := [each for each in going if each.end == "step"]:
            wanted = [(each, _trial(each, 0)) for each in going]
            forks = []
            for each, draft in zip(going, drafter.draw(wanted, most, until=until, entropies=branches), strict=True):
                counts = [self.trials(entropy) for entropy in draft.entropies]
                at = next((number for number, count in enumerate(counts) if count > 1), len(draft.token_ids))
                each.add(draft.part(0, at))
                if at < len(draft.token_ids):
                    forks.append((each, draft.part(at, len(draft.token_ids)), counts[at]))
            more = iter(
                drafter.draw([(each, _trial(each, j)) for each, _, k in forks for j in range(1, k)], most, until=until)
            )
            # The rest of the draft, which was drawn before anything was known of the entropy, is one of the trials.
            self._choose(
                drafter, tools, [(each, [rest, *(next(more) for _ in range(1, k))]) for each, rest, k in forks]
            )
        return [[found(drafter.state(each), trace=each.trace)] for each in solutions]

    def _choose(self, drafter: Drafter, tools: Tools, forks: Sequence[tuple[Writing, Sequence[Drawn]]]) -> None:
        """Keep one of the trials of every solution."""
        states = [drafter.state(each, trial) for each, trials in forks for trial in trials]
        if self.needs_scorer:
            scores = tools.scores(states, self.reduction)
        else:  # of perplexities the inverse, so that the highest is best
            means = [float(np.mean(trial.raw_logprobs)) for _, trials in forks for trial in trials]
            scores = [math.exp(mean) for mean in means]
        scored = iter(zip(states, scores, strict=True))
        for each, trials in forks:
            shown = [next(scored) for _ in trials]
            best = ranked([score for _, score in shown])[0]
            about = {
                "step": len(shown[best][0].steps) - 1,
                "token": len(each.token_ids),
                "entropy": trials[0].entropies[0],
            }
            each.trace.append(event("branch", shown, **about, kept=[best]))
            each.add(trials[best])


def _trial(each: Writing, number: int) -> Name:
    """Key of a trial; the first one of all has that of a whole solution."""
    return ("token", len(each.token_ids), number) if each.token_ids or number else ()
