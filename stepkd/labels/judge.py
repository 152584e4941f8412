"""Labels from what scores steps: a prompted judge, a trained process reward model, the sums of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from stepkd.errors import DataError
from stepkd.labels.labeller import Solution, StepLabels
from stepkd.scorers.scorer import Solutions, StepScorer
from stepkd.steps.labels import check_threshold, passes


class ScorerLabeller:
    """Label by the scores of a :class:`~stepkd.scorers.scorer.StepScorer`.

    Args:
        scorer: what scores the steps.
        threshold: a step is right when its score is not below it, in (0, 1).
        soft: the scores themselves are the labels.
        name: name of the labeller in the provenance: ``judge``, ``prm``, ``arithmetic``.
    """

    def __init__(self, scorer: StepScorer, *, threshold: float = 0.5, soft: bool = False, name: str = "judge") -> None:
        check_threshold(threshold)
        self.scorer = scorer
        self.threshold = threshold
        self.soft = soft
        self.name = name

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """See :class:`~stepkd.labels.labeller.Labeller`.

        Neighbouring solutions of one problem are scored together, so that the scorer may read their prompt once. A
        step without a score (cut off by the scorer's context, or not the last one of an outcome scorer) has no label.
        The scores are kept in ``facts``, and as ``values`` where that is what the scorer estimates.

        Raises:
            DataError: the scorer's answer does not fit the solutions, or a score is outside [0, 1].
        """
        problems: list[list[Solution]] = []
        for solution in solutions:
            if problems and problems[-1][0].row == solution.row:
                problems[-1].append(solution)
            else:
                problems.append([solution])
        scored = self.scorer.score([Solutions(group[0].row, [list(s.steps) for s in group]) for group in problems])
        if [len(scores) for scores in scored] != [len(group) for group in problems]:
            raise DataError("the scorer gave another number of solutions than it was asked for")
        return [
            self._labels(solution, scores)
            for group, group_scores in zip(problems, scored, strict=True)
            for solution, scores in zip(group, group_scores, strict=True)
        ]

    def _labels(self, solution: Solution, scores: Sequence[float]) -> StepLabels:
        if len(scores) != len(solution.steps):
            raise DataError(f"the scorer gave {len(scores)} scores for {len(solution.steps)} steps", path=solution.id)
        wrong = [score for score in scores if not (math.isnan(score) or 0 <= score <= 1)]
        if wrong:
            raise DataError(f"the scorer gave {wrong[0]}: scores lie in [0, 1]", path=solution.id)
        known = tuple(None if math.isnan(score) else float(score) for score in scores)
        hard = tuple(passes(score, self.threshold) for score in known)
        return StepLabels(
            known if self.soft else hard,  # no values: a scorer's guess of the future is no rollout's success
            facts={"scores": list(known)},
        )

    def provenance(self) -> dict[str, Any]:
        """What the labels came from."""
        return {
            "labeller": self.name,
            "threshold": None if self.soft else self.threshold,
            "soft": self.soft,
            "meaning": self.scorer.meaning,
            "scorer": self.scorer.provenance(),
        }
