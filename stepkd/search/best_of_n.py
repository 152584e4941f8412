"""Choosing among sampled solutions: the methods, and what each is expected to be worth at every number of samples.

A method takes N samples as they come. What a method is worth at k is the expectation over all subsets of k of a
problem's N samples, not one lucky draw: exact for best-of-k, majority and pass@k, and for the weighted vote as long as
the subsets are few. PRM800K's own evaluation (openai/prm800k) estimates the same expectation from 400 drawn subsets.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike

from stepkd.errors import ConfigError, DataError, check_bounds
from stepkd.randomness import generator
from stepkd.scorers.scorer import Reduction
from stepkd.search.state import Found, Problem, Scored, Search, State, Tools, Trace, found, ranked
from stepkd.statistics import FloatArray

Vote = Literal["max", "majority", "weighted", "soft"]
"""How one of several solutions is taken: the highest score, the most frequent answer, the answer with the highest sum
of scores, or one drawn by softmax of the scores."""


@dataclass(frozen=True, kw_only=True)
class Greedy(Search):
    """One solution of the most likely tokens."""

    needs_scorer: ClassVar[bool] = False

    def run(self, problems: Sequence[Problem], tools: Tools) -> list[list[Found]]:
        """See :meth:`~stepkd.search.state.Search.run`."""
        drawn = tools.generator.complete([State(problem) for problem in problems], 1, temperature=0.0)
        return [[found(state) for state in states] for states in drawn]


@dataclass(frozen=True, kw_only=True)
class BestOfN(Search):
    """Several samples, of which one is chosen: self-consistency (Wang et al. 2022, arXiv 2203.11171) with ``majority``,
    best-of-N (Cobbe et al. 2021, arXiv 2110.14168) with ``max``, its soft form (arXiv 2512.19905) with ``soft``."""

    n: int = 8
    """Samples of a problem, at least 1; all methods of a job choose among the same ones."""
    vote: Vote = "weighted"
    """How one is taken; a weighted vote is what a scorer helps most in the literature. ``majority`` asks no scorer."""
    reduction: Reduction | None = None
    """From step scores to one: product, min, mean or last; null takes what suits the scorer's meaning."""
    temperature: float = 0.1
    """Temperature of a soft choice on scores in [0, 1], above 0: towards 0 it takes the best, high up any one."""

    def __post_init__(self) -> None:
        check_bounds("", self, n="[1, inf)", temperature="(0, inf)")
        if self.vote == "majority" and self.reduction is not None:
            raise ConfigError(f"reduction={self.reduction}: a majority vote has no scores to reduce; drop it")
        if self.vote != "soft" and self.temperature != BestOfN.temperature:
            raise ConfigError(
                f"temperature={self.temperature}: only vote soft draws by it, and vote is {self.vote}; drop it"
            )

    @property
    def needs_scorer(self) -> bool:
        """Whether it asks a step scorer."""
        return self.vote != "majority"

    @property
    def name(self) -> str:
        """See :attr:`~stepkd.search.state.Search.name`."""
        kind = {"majority": "self_consistency", "max": "best_of_n"}.get(self.vote, f"best_of_n_{self.vote}")
        return self.named(kind + "@{n}", "vote")

    def run(self, problems: Sequence[Problem], tools: Tools) -> list[list[Found]]:
        """See :meth:`~stepkd.search.state.Search.run`."""
        samples = tools.samples(problems, self.n)
        flat = [state for states in samples for state in states]
        scores = iter(tools.scores(flat, self.reduction) if self.needs_scorer else [None] * len(flat))
        groups = [[(state, next(scores)) for state in states] for states in samples]
        return elected(tools, groups, [[] for _ in problems], self.vote, self.temperature, of_all=True)


def elected(
    tools: Tools,
    groups: Sequence[Sequence[Scored]],
    traces: Sequence[Trace],
    vote: Vote,
    temperature: float = 1.0,
    *,
    of_all: bool = False,
) -> list[list[Found]]:
    """The solutions of every problem as completions, the one that a vote takes first.

    Args:
        tools: compares the answers.
        groups: for each problem its solutions, with their scores.
        traces: of each problem, to which the choice is added.
        vote: see :data:`Vote`.
        temperature: of a soft choice.
        of_all: whether solutions that were cut off may be taken while others are whole.
    """
    results, states_of = [], [[state for state, _ in group] for group in groups]
    keys: Sequence[Sequence[str | None]] = [[None] * len(group) for group in groups]
    keys = tools.votes(states_of) if vote in ("majority", "weighted") else keys
    for group, states, votes, trace in zip(groups, states_of, keys, traces, strict=True):
        scores, may = [score for _, score in group], range(len(group)) if of_all else eligible(states)
        own = [scores[i] for i in may]
        if vote == "soft":
            taken = soft_choice(own, temperature, states[0].problem.seed, states[0].problem.index)
        else:
            taken = choice(own, [votes[i] for i in may], vote)
        told = {"steps": ["".join(state.steps[-1:]) for state in states], "scores": scores, "votes": votes}
        trace.append({"event": "choice", "vote": vote, **told, "kept": [may[taken]]})
        results.append(answered(states, scores, may[taken], trace))
    return results


def eligible(states: Sequence[State]) -> Sequence[int]:
    """Numbers of the solutions that an answer is taken from: those that were not cut off; all, where every one was."""
    return [i for i, state in enumerate(states) if state.end == "stop"] or range(len(states))


def answered(
    states: Sequence[State], scores: Sequence[float | None], winner: int, trace: Sequence[Mapping[str, Any]]
) -> list[Found]:
    """Solutions of a problem as completions, the answer first, with the trace; the others in their order.

    Args:
        states: see :func:`~stepkd.search.state.found`.
        scores: of each.
        winner: number of the answer.
        trace: see :attr:`~stepkd.search.state.Found.trace`.
    """
    order = [winner, *(i for i in range(len(states)) if i != winner)]
    return [found(states[i], sample=i, score=scores[i], trace=trace if i == winner else ()) for i in order]


def choice(scores: Sequence[float | None], votes: Sequence[str | None], vote: Vote) -> int:
    """Which of several solutions a vote takes.

    Args:
        scores: of the solutions, in [0, 1]; None ranks last and adds nothing to a weighted vote.
        votes: keys of their answers; None wins nothing.
        vote: ``max``, ``majority`` or ``weighted``.

    Returns:
        The number of a solution: of the winning answer the one with the highest score, of equal ones the first; of
        answers with equal votes the one that came first. Where no answer was found, as ``max``.
    """
    keys = [] if vote == "max" else [key for key in votes if key is not None]
    if not keys:
        return ranked(scores)[0]
    weight = dict.fromkeys(keys, 0.0)
    for key, score in zip(votes, scores, strict=True):
        if key is not None:
            weight[key] += 1.0 if vote == "majority" else score or 0.0
    top = max(weight.values())
    winner = next(key for key in weight if weight[key] >= top - TIE * abs(top))
    return next(i for i in ranked(scores) if votes[i] == winner)


def soft_choice(scores: Sequence[float | None], temperature: float, *key: int | str) -> int:
    """Draw a solution by softmax(score / temperature); arXiv 2512.19905.

    Args:
        scores: of the solutions; None is drawn only where all are.
        temperature: above 0.
        key: of the draw: seed and what it is for.
    """
    logits = np.array([-np.inf if score is None else score / temperature for score in scores])
    if np.isneginf(logits).all():
        logits = np.zeros(len(logits))
    weights = np.exp(logits - logits.max())
    return int(generator(int(key[0]), "soft-choice", *key[1:]).choice(len(weights), p=weights / weights.sum()))


# --- expectations over all subsets of k samples -----------------------------------------------------------------------

MAX_EXACT_SUBSETS = 2_000
"""Most subsets a weighted vote enumerates; beyond it, subsets are drawn."""
SUBSET_DRAWS = 400
"""Subsets drawn per problem and k for a weighted vote."""
TIE = 1e-9
"""Vote weights within this relative distance of the highest are tied: sums in another order differ by rounding."""


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> FloatArray:
    """Unbiased probability that k of n samples, drawn without replacement, hold a correct one (Chen et al. 2021, eq.
    1).

    Args:
        n: samples per problem, integers >= 1, any shape.
        c: correct samples per problem, 0 <= c <= n, same shape as ``n`` after broadcasting.
        k: samples drawn, 1 <= k <= min(n).

    Returns:
        Float array of the broadcast shape, values in [0, 1].

    Raises:
        ConfigError: counts out of range, or k larger than some n.
    """
    n_arr, c_arr = np.broadcast_arrays(np.asarray(n, dtype=np.float64), np.asarray(c, dtype=np.float64))
    if (n_arr < 1).any() or (c_arr < 0).any() or (c_arr > n_arr).any():
        raise ConfigError("pass@k needs n >= 1 and 0 <= c <= n for every problem")
    if k < 1 or (n_arr < k).any():
        raise ConfigError(_too_few_samples("pass", k, int(n_arr.min()) if n_arr.size else 0))
    # prod (n-c-j)/(n-j) = C(n-c, k) / C(n, k): k factors in [0, 1], no large binomials.
    all_incorrect = np.ones(n_arr.shape)
    for j in range(k):
        all_incorrect = all_incorrect * np.maximum(n_arr - c_arr - j, 0.0) / (n_arr - j)
    return np.asarray(1.0 - all_incorrect, dtype=np.float64)


def maj_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """Exact expected accuracy of a majority vote over k of the n samples drawn without replacement.

    Ties are split evenly, so the value does not depend on the order of the samples. None (unparsed) takes a place in
    the draw but never wins; a draw of only None counts as incorrect. An elected class counts by the share of its
    samples that are correct, which is 0 or 1 for a consistent grader.

    No subset is enumerated: k draws without replacement are independent binomials given their sum, so a product of the
    answers' polynomials, kept by how many answers share the top, holds the chance of every outcome.

    Args:
        answers: (n,) equivalence-class keys.
        correct: (n,) whether each sample was judged correct.
        k: votes, 1 <= k <= n.

    Returns:
        Expected accuracy in [0, 1].

    Raises:
        ConfigError: different lengths, or k out of range.
    """
    n = len(answers)
    if len(correct) != n:
        raise ConfigError(f"maj@k got {n} answers but {len(correct)} verdicts")
    if not 1 <= k <= n:
        raise ConfigError(_too_few_samples("maj", k, n))
    size = Counter(answer for answer in answers if answer is not None)
    hits = Counter(answer for answer, good in zip(answers, correct, strict=True) if answer is not None and good)
    expected = 0.0
    for top in range(1, min(k, max(size.values(), default=0)) + 1):
        # [answers with top votes so far, votes drawn so far]: probability, and that times the sum of their shares.
        tied = min(k // top, len(size))
        chance, won = np.zeros((2, tied + 1, k + 1))
        unparsed = n - sum(size.values())
        chance[0, : unparsed + 1] = _binomial(unparsed, k / n)[: k + 1]
        for key, count in size.items():
            votes = _binomial(count, k / n)
            before, chance, won_before, won = chance, np.zeros_like(chance), won, np.zeros_like(won)
            for drawn in range(min(top, count + 1)):
                chance[:, drawn:] += votes[drawn] * before[:, : k + 1 - drawn]
                won[:, drawn:] += votes[drawn] * won_before[:, : k + 1 - drawn]
            if count >= top:
                joins = votes[top] * before[:-1, : k + 1 - top]
                chance[1:, top:] += joins
                won[1:, top:] += votes[top] * won_before[:-1, : k + 1 - top] + joins * hits[key] / count
        expected += float((won[1:, k] / np.arange(1, tied + 1)).sum())
    return min(1.0, expected / float(_binomial(n, k / n)[k]))


@lru_cache(maxsize=4096)
def _binomial(n: int, p: float) -> FloatArray:
    """Probabilities of 0..n successes in n trials, 0 < p <= 1."""
    from scipy.stats import binom

    probabilities = np.asarray(binom.pmf(np.arange(n + 1), n, p), dtype=np.float64)
    probabilities.flags.writeable = False  # shared between callers
    return probabilities


def best_of_k(scores: Sequence[float | None], correct: Sequence[bool], k: int) -> float:
    """Exact expected accuracy of taking the highest-scored of k samples drawn without replacement.

    With a samples scored above a group of g equal ones, the group holds the highest score of the draw with probability
    ``[C(N-a, k) - C(N-a-g, k)] / C(N, k)``; within it every sample is equally likely to be taken.

    Args:
        scores: (N,) finite scores on any scale; None ranks below all, and the None share their rank.
        correct: (N,) whether each sample is correct.
        k: samples drawn, 1 <= k <= N.

    Returns:
        Expected accuracy in [0, 1].

    Raises:
        DataError: different lengths, or a score that is not finite.
        ConfigError: k out of range.
    """
    ranks, hits = _ranks(scores, len(correct), k), np.asarray(correct, dtype=np.float64)
    _, group, size = np.unique(-ranks, return_inverse=True, return_counts=True)
    share = np.bincount(group, weights=hits) / size
    missed = _missed(hits.size, k)
    through = np.cumsum(size)
    return float(np.clip(((missed[through - size] - missed[through]) * share).sum(), 0.0, 1.0))


def weighted_vote_at_k(
    scores: Sequence[float | None],
    votes: Sequence[str | None],
    correct: Sequence[bool],
    k: int,
    *,
    seed: int = 0,
    key: str = "",
) -> float:
    """Expected accuracy of the answer with the highest sum of scores among k samples drawn without replacement.

    Exact (all subsets) up to `MAX_EXACT_SUBSETS` subsets, else the mean over `SUBSET_DRAWS` drawn ones. As in
    :func:`maj_at_k`: ties are split evenly, an answer counts by the share of its samples
    that are correct, and a draw without any answer is incorrect; so equal scores above 0 give exactly maj@k.

    Args:
        scores: (N,) scores >= 0; None adds nothing to its answer.
        votes: (N,) keys of the answers; None (no answer found) never wins, whatever its score.
        correct: (N,) whether each sample is correct.
        k: samples drawn, 1 <= k <= N.
        seed, key: seed of the drawn subsets and the problem's id; different scores see the same subsets.

    Returns:
        Expected accuracy in [0, 1].

    Raises:
        DataError: different lengths, or a score that is negative or not finite.
        ConfigError: k out of range.
    """
    n = len(correct)
    ranks = _ranks(scores, n, k)
    weights = np.where(np.isneginf(ranks), 0.0, ranks)
    if (weights < 0).any():
        raise DataError(f"score {float(weights.min())!r} is negative: a weighted vote needs scores >= 0")
    names = sorted({vote for vote in votes if vote is not None})
    if not names:
        return 0.0
    member = np.array([[vote == name for name in names] for vote in votes], dtype=np.float64)
    share = np.asarray(correct, dtype=np.float64) @ member / member.sum(axis=0)
    chosen = _subsets(n, k, seed, key)
    present = chosen @ member > 0
    totals = np.where(present, chosen @ (weights[:, None] * member), -np.inf)
    top = totals.max(axis=1, keepdims=True)
    wins = present & (totals >= top - TIE * np.abs(np.where(present.any(axis=1, keepdims=True), top, 0.0)))
    won = wins @ share / np.maximum(wins.sum(axis=1), 1)
    return float(np.clip(won.mean(), 0.0, 1.0))


@lru_cache(maxsize=1024)
def _missed(n: int, k: int) -> FloatArray:
    """(n + 1,) probability that a draw of k of n samples holds none of the a highest, a = 0..n."""
    return 1.0 - pass_at_k(n, np.arange(n + 1), k)


@lru_cache(maxsize=8)
def _all_subsets(n: int, k: int) -> FloatArray:
    members = np.array(list(combinations(range(n), k)))
    return np.asarray((members[:, :, None] == np.arange(n)).any(axis=1), dtype=np.float64)


def _subsets(n: int, k: int, seed: int, key: str) -> FloatArray:
    """(subsets, n) of 0 and 1 with k ones in each row: all of them, or a keyed draw."""
    if math.comb(n, k) <= MAX_EXACT_SUBSETS:
        return _all_subsets(n, k)
    order = generator(seed, "weighted-vote", key, k).random((SUBSET_DRAWS, n)).argsort(axis=1)
    return np.asarray(order < k, dtype=np.float64)


def _ranks(scores: Sequence[float | None], n: int, k: int) -> FloatArray:
    """The scores of n samples, of which k are drawn; -inf for an unscored one."""
    ranks = np.array([-math.inf if score is None else score for score in scores], dtype=np.float64)
    if ranks.size != n or not (ranks < math.inf).all():
        raise DataError(f"{n} samples need a finite score each, or None for an unscored one; found {list(scores)}")
    if not 1 <= k <= n:
        raise ConfigError(f"k={k} samples of {n} cannot be drawn; it must lie between 1 and {n}")
    return ranks


def _too_few_samples(metric: str, k: int, n: int) -> str:
    return f"{metric}@{k} needs 1 <= k <= samples per problem, and there are {n}; draw more samples or lower k"
