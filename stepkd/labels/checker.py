"""Labels from the tiny world's exact checkers: free, and true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from stepkd.errors import DataError, check_choice
from stepkd.labels.labeller import Solution, StepLabels
from stepkd.tasks import Given, check_row


class CheckerLabeller:
    """Ask the task that generated the problem.

    Args:
        given: ``truth``: a step is right iff it is what the problem demands at its place; ``claims``: iff it follows
            from what the steps before it claim.
    """

    def __init__(self, given: Given = "truth") -> None:
        check_choice("given", given, get_args(Given))
        self.given = given

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """See :class:`~stepkd.labels.labeller.Labeller`; labels are true or false.

        Raises:
            DataError: a row that no task of the tiny world generated.
        """
        return [StepLabels(tuple(self._check(solution))) for solution in solutions]

    def _check(self, solution: Solution) -> list[bool]:
        if "task" not in solution.row or "meta" not in solution.row:
            raise DataError(
                "no exact checker for this row: it has no 'task' and 'meta' (rows of source 'task' have them); use "
                "another labeller",
                path=solution.id,
            )
        return check_row(solution.row, solution.steps, given=self.given)

    def provenance(self) -> dict[str, Any]:
        """What the labels came from."""
        return {"labeller": "checker", "given": self.given}
