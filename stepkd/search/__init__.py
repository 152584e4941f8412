"""Test-time methods over one pair: a generator that proposes steps, and a value (or step scorer) that judges them.

* :mod:`~stepkd.search.tree`: `Problem`, `State` (a solution so far), `Step`; the protocols `StepGenerator`
  (propose next steps, complete solutions) and `StateValue` (estimate states): a method needs nothing else. Nodes,
  priors, PUCT selection and backup; pure Python, by the formulas of the paper.
* :mod:`~stepkd.search.generate`: `SampledSteps`, steps from a language model, cut by any segmenter; `ContinuationValue`
  (share of correct continuations), `ScorerValue` (a reward model, a prompted judge, an exact checker).
* :mod:`~stepkd.search.mcts`: `tree_search`, Monte-Carlo tree search of many problems in lockstep: the leaves of all
  trees are expanded in one batch, and every tree is as if it were searched alone; and `MCTS`, an answer from a tree.
  :mod:`~stepkd.search.pairs`: `tree_pairs`, step preference pairs along the chosen path with values and visit counts.
* :mod:`~stepkd.search.revise` and :mod:`~stepkd.search.refine`: drafts that are verified and revised, by the policy
  itself or by a trained refiner.
* :mod:`~stepkd.search.particles`: `ParticleFilter`, which draws solutions again by their scores at every step.
* :mod:`~stepkd.search.phi`: `PhiDecoding`, which looks ahead and asks no scorer.

``stepkd pairs tree`` runs all of this as a resumable job (:mod:`stepkd.labels.tree_pairs`).
"""

from __future__ import annotations

from stepkd.lazy import lazily

_HOMES = {
    "entropy": "EntropyBranching",
    "generate": "ContinuationValue SampledSteps ScorerValue",
    "mcts": "MCTS Reference TreeConfig tree_search",
    "pairs": "FoundPairs PairConfig PairTreeConfig tree_pairs",
    "particles": "ParticleFilter",
    "phi": "PhiDecoding",
    "refine": "Refine",
    "revise": "VerifyRevise",
    "state": "Costs Found Problem Search State StateValue Step StepGenerator Tools",
    "speculative": "Speculative",
    "tree": "Decision Node Option SearchTree",
    "value_guided": "ValueGuided",
}

__getattr__ = lazily(__name__, _HOMES)
