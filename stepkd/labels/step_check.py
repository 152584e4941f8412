"""Whether a candidate step is right: by a step scorer or the tiny world's exact checker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepkd.errors import DataError
from stepkd.labels.pair_settings import StepPairSpec
from stepkd.scorers.load import ScorerOptions, load_scorer
from stepkd.scorers.scorer import Solutions, StepScorer
from stepkd.steps.labels import passes

Asked = tuple[Mapping[str, Any], Sequence[str], Sequence[str]]
"""Problem row, the steps before, and candidates for the next step."""


class StepCheck:
    """Passes the candidate steps that a scorer does not put below a threshold.

    Args:
        scorer: scores steps in [0, 1].
        threshold: lowest score that passes.
    """

    def __init__(self, scorer: StepScorer, threshold: float = 0.5) -> None:
        self.scorer = scorer
        self.threshold = threshold

    def passes(self, asked: Sequence[Asked]) -> list[list[bool]]:
        """Whether each candidate passes; one without a score (cut off by the scorer's context) does not.

        Raises:
            DataError: the scorer's answer does not fit what it was asked.
        """
        used = [number for number, (_, _, candidates) in enumerate(asked) if candidates]
        found: list[list[bool]] = [[] for _ in asked]
        if not used:
            return found
        scored = self.scorer.score(
            [Solutions(row, [[*before, step] for step in steps]) for row, before, steps in (asked[i] for i in used)]
        )
        for number, scores in zip(used, scored, strict=True):
            _, before, candidates = asked[number]
            if len(scores) != len(candidates) or any(len(values) != len(before) + 1 for values in scores):
                raise DataError("the scorer gave another number of scores than it was asked for")
            found[number] = [passes(values[-1], self.threshold) is True for values in scores]
        return found

    def provenance(self) -> dict[str, Any]:
        """What the check asks, as JSON values."""
        return {"threshold": self.threshold, "meaning": self.scorer.meaning, "scorer": self.scorer.provenance()}


def make_step_check(spec: StepPairSpec) -> StepCheck:
    """The check that a pair job's settings name: ``judge``, else the exact checker.

    Raises:
        ConfigError, ModelError: a scorer that cannot be loaded.
    """
    if spec.judge is None:
        return StepCheck(load_scorer("checker"), spec.threshold)
    options = ScorerOptions(reference=spec.reference, dtype=spec.dtype, device=spec.device, max_rows=spec.max_rows)
    return StepCheck(load_scorer(spec.judge, options), spec.threshold)
