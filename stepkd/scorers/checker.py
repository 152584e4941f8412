"""The exact checker of the tiny world as a scorer: the ceiling that a reward model is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from stepkd.errors import check_choice
from stepkd.scorers.scorer import Meaning, Solutions
from stepkd.tasks import check_row
from stepkd.tasks.base import Given


class CheckerScorer:
    """Scores 1.0 for a right step and 0.0 for a wrong one.

    Args:
        given: what a step is judged against, as in :meth:`stepkd.tasks.base.Task.check_step`.

    Raises:
        ConfigError: an unknown ``given``.
    """

    meaning: Meaning = "correctness"

    def __init__(self, *, given: Given = "truth") -> None:
        check_choice("given", given, get_args(Given))
        self.given: Given = given

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`.

        Raises:
            DataError: a row that is not of the tiny world.
        """
        return [
            [[float(right) for right in check_row(problem.row, steps, given=self.given)] for steps in problem.solutions]
            for problem in problems
        ]

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`."""
        return {"scorer": "checker", "given": self.given, "meaning": self.meaning}
