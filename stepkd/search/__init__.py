"""Test-time methods over one pair: a generator that proposes steps, and a value (or step scorer) that judges them.

* :mod:`~stepkd.search.state`: `Problem`, `Step`, `State` (a solution so far); the protocols `StepGenerator` (propose
  next steps, complete solutions) and `StateValue` (estimate states); `Search`, what a method is, and the `Tools` that
  it works with, which count what it spends.
* :mod:`~stepkd.search.generate`: `SampledSteps`, steps from a language model, cut by any segmenter; `ContinuationValue`
  (share of correct continuations), `ScorerValue` (a reward model, a prompted judge, an exact checker).
* Choosing among whole solutions: :mod:`~stepkd.search.best_of_n` (`Greedy`, `BestOfN`).
* Step by step: :mod:`~stepkd.search.beam` (`Beam`, also as DVTS, and `ParticleFilter`), :mod:`~stepkd.search.phi`
  (`PhiDecoding`, which looks ahead and asks no scorer).
* Token by token: :mod:`~stepkd.search.tokens` (drafts of what comes next; `EntropyBranching`, `Speculative`),
  :mod:`~stepkd.search.value_guided` (`ValueGuided`).
* With drafts: :mod:`~stepkd.search.revise` (`VerifyRevise`, the policy revises; `Refine`, a trained refiner does).
* With a tree: :mod:`~stepkd.search.tree` (nodes, priors, PUCT selection and backup, in pure Python, and step
  preference pairs of trees) and :mod:`~stepkd.search.mcts` (`tree_search` of many problems in lockstep; `MCTS`, an
  answer from a tree).

``stepkd search`` compares the methods on a benchmark (:mod:`stepkd.evaluation.search`), ``stepkd pairs tree`` makes
pairs (:mod:`stepkd.labels.tree_pairs`); both are resumable jobs.
"""

from __future__ import annotations

from stepkd.lazy import lazily

_HOMES = {
    "beam": "Beam ParticleFilter",
    "best_of_n": "BestOfN Greedy",
    "generate": "ContinuationValue SampledSteps ScorerValue",
    "mcts": "MCTS PairTreeConfig Reference TreeConfig tree_search",
    "phi": "PhiDecoding",
    "revise": "Refine VerifyRevise",
    "state": "Costs Found Problem Search State StateValue Step StepGenerator Tools found ranked",
    "tokens": "EntropyBranching Speculative",
    "tree": "Decision FoundPairs Node Option PairConfig SearchTree tree_pairs",
    "value_guided": "ValueGuided",
}

__getattr__ = lazily(__name__, _HOMES)
