"""phi-Decoding (Xu et al. 2025, arXiv 2503.13288): search without a scorer, by looking ahead.

A round: every beam draws next steps; those that are too unlikely are dropped (in-width pruning); every one that is left
is continued to the end, its *foresight*. A step counts by its *advantage* A, how much more likely its foresight is than
the one before, F_t - F_{t-1} in mean log-probability per token, and by its *alignment* C, the share of all foresight
paths that say something like its own. Steps are drawn by both; where most paths say the same, or after the last round,
the beams are completed and one completion is drawn (in-depth pruning).

What the paper and its released code (xufangzhi/phi-Decoding, commit 2c8e874) say differs; ``variant`` names which:

================== ============================================= =====================================================
                   paper                                         code
================== ============================================= =====================================================
weight of a step   exp(R / 0.6), R = softmax(A / 0.6) +          mean of softmax(A / 0.1) and softmax(C)
                   softmax(C / 0.6) (equations 3, 7; alg. 1)
in-width pruning   keeps those at mean - k sd and above          those above it; filled up to as many as there are beams
answer             drawn by the same weights                     two clusters; of the larger one by softmax(A / 0.1)
stop at a share    0.7                                           0.69
earliest stop      after min_rounds (4)                          in the fifth round, whose steps it forgets: four steps
                                                                 after five rounds of foresight
few paths          not said                                      fewer than M non-empty ones: drawn from all of them by
                                                                 softmax(A / 0.1) without clusters, where all are empty
                                                                 by softmax(-A / 0.1); this is what becomes of finished
                                                                 solutions, which it completes again
no clustering      not said                                      advantages alone
================== ============================================= =====================================================

The step values of the paper's figure 7 are those of the code: 0.1318 is half a softmax(C) over clusters of 2 and 1.
In both: M = N = 4, rounds 4 to 8, K = 3, k = 1; steps at temperature 0.6, foresight at 1.

The last three rows of the code are not built: either variant stops after min_rounds, and keeps the steps drawn in that
round, which saves a round of foresight. A finished solution looks ahead by its newest step, and competes with advantage
0 while it is kept. Inferred, because neither says it: equation 3's temperature (0.6, that of its parts); fewer clusters
where fewer paths differ; one start of k-means. Also different from the code: words of one character count, without
which one-digit answers would be alike (it takes scikit-learn's tokens).
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, ClassVar, Literal

import numpy as np

from stepkd.errors import ModelError, check_bounds
from stepkd.randomness import generator
from stepkd.search.best_of_n import answered
from stepkd.search.state import Found, Problem, Search, State, Step, Tools, Trace, event, for_some, no_logprobs
from stepkd.statistics import FloatArray

_COMPLETION = 1 << 20  # no sample's number: else the last completions would be the foresight from the same places


@dataclass
class _Candidate:
    """A solution that a step leads to, and what it was continued with."""

    state: State
    before: float = 0.0  # mean log-probability of the foresight one step before
    confidence: float = 0.0  # mean log-probability of its newest step
    foresight: float = 0.0  # mean log-probability
    text: str = ""  # of the foresight: what is clustered
    end: State | None = None

    @property
    def is_open(self) -> bool:
        return self.state.end == "step"


@dataclass(frozen=True, kw_only=True)
class PhiDecoding(Search):
    """phi-Decoding; needs an engine with log-probabilities."""

    needs_scorer: ClassVar[bool] = False
    form = "phi_{variant}@{beams}x{rollouts}"

    variant: Literal["paper", "code"] = "paper"
    """Which of paper and released code, which differ in weights, pruning and the last choice, is followed."""
    beams: int = 4
    """Solutions that are kept after each round (M), at least 1; 4 in the paper."""
    rollouts: int = 4
    """Next steps drawn of each of them (N), at least 1; 4 in the paper."""
    clusters: int = 3
    """Clusters of foresight paths (K), at least 1; 3 in the paper, 1 leaves the alignment out."""
    min_rounds: int = 4
    """Rounds before the search may stop early, at least 1; 4 in most of the paper's runs, max_rounds turns it off."""
    max_rounds: int = 8
    """Rounds after which the solutions are completed, at least 1; 8 in most of the paper's runs."""
    threshold: float = 0.7
    """Share of the largest cluster at which the search stops early, in (0, 1]; 0.7 in the paper, 0.69 in its code."""
    foresight_temperature: float | None = None
    """Temperature of foresight and completion, at least 1e-4; null takes that of the steps. The code has 1, and 0.6 for
    steps."""

    def __post_init__(self) -> None:
        bounds = dict.fromkeys(("beams", "rollouts", "clusters", "min_rounds", "max_rounds"), "[1, inf)")
        more = {"threshold": "(0, 1]", "foresight_temperature": "[1e-4, inf)"}
        check_bounds("", self, **bounds, **more)

    @property
    def at_once(self) -> int:
        """See :attr:`~stepkd.search.state.Search.at_once`."""
        return self.beams * self.rollouts

    def run(self, problems: Sequence[Problem], tools: Tools) -> list[list[Found]]:
        """See :meth:`~stepkd.search.state.Search.run`.

        Raises:
            ConfigError: the engine gives no log-probabilities.
        """
        beams = [[_Candidate(State(problem))] for problem in problems]
        traces: list[Trace] = [[] for _ in problems]
        stopped: set[int] = set()
        for step in range(self.max_rounds):
            going = [i for i, own in enumerate(beams) if i not in stopped and any(each.is_open for each in own)]
            if not going:
                break
            flat = [each.state for i in going for each in beams[i] if each.is_open]
            drawn = iter(tools.generator.propose(flat, self.rollouts * (1 if step else self.beams)))
            for i in going:
                new = [
                    _Candidate(each.state.then(own), each.before, _mean(own))
                    for each in beams[i]
                    if each.is_open
                    for own in next(drawn)
                ]
                kept = self._kept(new, problems[i], step, traces[i])
                beams[i] = [*(each for each in beams[i] if not each.is_open), *(new[k] for k in kept)]
            self._look_ahead([each for i in going for each in beams[i]], tools)
            for i in going:
                beams[i], share = self._drawn(beams[i], problems[i], step, traces[i])
                if step + 1 >= self.min_rounds and share >= self.threshold:
                    stopped.add(i)
        for each in (each for each in chain(*beams) if each.is_open):  # else the foresight is drawn once more
            each.state = replace(each.state, path=(*each.state.path, _COMPLETION))
        self._look_ahead([*chain(*beams)], tools)
        return [self._answer(*each) for each in zip(beams, problems, traces, strict=True)]

    def _look_ahead(self, candidates: Sequence[_Candidate], tools: Tools) -> None:
        """Continue every unfinished candidate to the end; the foresight of a finished one is its newest step."""
        complete = partial(tools.generator.complete, n=1, temperature=self.foresight_temperature)
        drawn = for_some([each.is_open for each in candidates], [each.state for each in candidates], complete)
        for each, ends in zip(candidates, drawn, strict=True):
            each.end, each.foresight, each.text = each.state, each.confidence, each.state.steps[-1]
            if ends:
                (each.end,) = ends
                rest = each.end.since(each.state)
                each.foresight, each.text = _mean(rest), rest.text

    def _kept(self, new: Sequence[_Candidate], problem: Problem, step: int, trace: Trace) -> list[int]:
        """In-width pruning: which of the new candidates are looked ahead from."""
        confidence = np.array([each.confidence for each in new])
        margin = confidence - (confidence.mean() - confidence.std())
        # Equal confidences, whose mean may be off by rounding, lie on the bound: it belongs to the paper's steps alone.
        inside = margin > (1e-12 if self.variant == "code" else -1e-12)
        if self.variant == "code" and (missing := self.beams - int(inside.sum())) > 0:
            others = np.flatnonzero(~inside)
            weights = _softmax(confidence[others] / 0.1)
            inside[others[self._draw(weights, missing, problem, "width", step)]] = True
        kept: list[int] = np.flatnonzero(inside).tolist()
        scored = [(each.state, each.confidence) for each in new]
        trace.append(event("prune", scored, step=step, kept=kept))
        return kept

    def _drawn(
        self, group: Sequence[_Candidate], problem: Problem, step: int, trace: Trace
    ) -> tuple[list[_Candidate], float]:
        """The beams of the next round, and the share of the largest cluster."""
        advantages, labels = self._judged(group, self.clusters, problem, step)
        shares = np.bincount(labels)[labels] / len(labels)
        weights = step_weights(advantages, shares, self.variant)
        kept = self._draw(weights, self.beams, problem, "steps", step).tolist()
        scored = [(each.state, weight) for each, weight in zip(group, weights.tolist(), strict=True)]
        more = {"advantages": advantages.tolist(), "clusters": labels.tolist(), "kept": kept}
        trace.append(event("foresight", scored, step=step, **more))
        return [replace(group[i], before=group[i].foresight) for i in kept], float(shares.max())

    def _answer(self, group: Sequence[_Candidate], problem: Problem, trace: Trace) -> list[Found]:
        """The completions, the one that is drawn first."""
        code = self.variant == "code"
        advantages, labels = self._judged(group, 2 if code else self.clusters, problem, -1)
        sizes = np.bincount(labels)
        if code:
            weights = _softmax(np.where(labels == sizes.argmax(), advantages / 0.1, -np.inf))
        else:
            weights = step_weights(advantages, sizes[labels] / len(labels), self.variant)
        winner, scores = int(self._draw(weights, 1, problem, "answer")[0]), weights.tolist()
        more = {"advantages": advantages.tolist(), "clusters": labels.tolist(), "kept": [winner]}
        trace.append({"event": "choice", "scores": scores, **more})
        return answered([each.end or each.state for each in group], scores, winner, trace)

    def _judged(
        self, group: Sequence[_Candidate], clusters: int, problem: Problem, step: int
    ) -> tuple[FloatArray, np.ndarray[Any, Any]]:
        """Advantage and cluster of every foresight."""
        noise = generator(problem.seed, "phi", "clusters", problem.index, step)
        labels = text_clusters([each.text for each in group], clusters, noise)
        return np.array([each.foresight - each.before for each in group]), labels

    def _draw(self, weights: FloatArray, size: int, problem: Problem, purpose: str, *step: int) -> np.ndarray[Any, Any]:
        """Numbers drawn one after the other without replacement, as many as there are at most."""
        size = min(size, int((weights > 0).sum()))
        return generator(problem.seed, "phi", purpose, problem.index, *step).choice(
            len(weights), size=size, replace=False, p=weights
        )


def step_weights(advantages: FloatArray, shares: FloatArray, variant: Literal["paper", "code"]) -> FloatArray:
    """Chances of steps to be drawn first; see the table above.

    Args:
        advantages: gain of each step in mean log-probability (nats per token).
        shares: of all paths, those in the cluster of its foresight, in (0, 1].
        variant: whose rule.

    Returns:
        Numbers that sum to 1.
    """
    if variant == "code":
        return (_softmax(advantages / 0.1) + _softmax(shares)) / 2
    return _softmax((_softmax(advantages / 0.6) + _softmax(shares / 0.6)) / 0.6)


def word_vectors(texts: Sequence[str]) -> FloatArray:
    """TF-IDF of texts in scikit-learn's form: counts times ln((1 + texts) / (1 + texts with the word)) + 1.

    Args:
        texts: at least one; words count in lower case.

    Returns:
        A row of length 1 for every text, in the order of the sorted words; 0 without words.
    """
    counted = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    words = sorted(set().union(*counted))
    counts = np.array([[count[word] for word in words] for count in counted], dtype=float).reshape(len(texts), -1)
    vectors = counts * (np.log((1 + len(texts)) / (1 + np.count_nonzero(counts, axis=0))) + 1)
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-300))


def text_clusters(texts: Sequence[str], clusters: int, noise: np.random.Generator) -> np.ndarray[Any, Any]:
    """Group texts by their words: k-means on TF-IDF.

    Args:
        texts: at least one.
        clusters: groups at most, at least 1; no more than there are texts of different words.
        noise: where k-means starts (k-means++).

    Returns:
        A number from 0 for every text.
    """
    from scipy.cluster.vq import kmeans2

    vectors = word_vectors(texts)
    groups = min(clusters, len(np.unique(vectors, axis=0)))
    if groups == 1:
        return np.zeros(len(texts), dtype=int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a cluster may run empty; none of the texts is in it then
        return np.asarray(kmeans2(vectors, groups, minit="++", iter=20, rng=noise)[1])


def _mean(step: Step) -> float:
    """Mean log-probability of tokens.

    Raises:
        ConfigError: it is not known.
        ModelError: it is not finite.
    """
    if step.logprob is None:
        raise no_logprobs("phi-decoding (also with foresight_temperature)")
    if not math.isfinite(step.logprob):
        raise ModelError(f"a step of phi-decoding has the log-probability {step.logprob}: take another dtype (float32)")
    return step.logprob / max(1, len(step.token_ids))


def _softmax(x: FloatArray) -> FloatArray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()
