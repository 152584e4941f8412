"""Labels from the final answer alone: outcome supervision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from stepkd.errors import DataError, check_choice
from stepkd.labels.labeller import Solution, StepLabels


class OutcomeLabeller:
    """Label by whether the final answer is right.

    Args:
        scope: ``last``: the last step only, as an outcome reward model is trained; ``all``: every step gets the
            outcome, the crudest guess at a process label.
    """

    def __init__(self, scope: Literal["last", "all"] = "last") -> None:
        check_choice("scope", scope, ("last", "all"))
        self.scope = scope

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """See :class:`~stepkd.labels.labeller.Labeller`; labels are true or false.

        Raises:
            DataError: a solution that was not graded.
        """
        return [StepLabels(self._labels(solution)) for solution in solutions]

    def _labels(self, solution: Solution) -> tuple[bool | None, ...]:
        if solution.correct is None:
            raise DataError(
                "whether its answer is right is not known: give rows with an 'answer', or an 'outcome' of true or "
                "false",
                path=solution.id,
                column="answer",
            )
        before: bool | None = solution.correct if self.scope == "all" else None
        return (*[before] * (len(solution.steps) - 1), solution.correct)

    def provenance(self) -> dict[str, Any]:
        """What the labels came from."""
        return {"labeller": "outcome", "scope": self.scope}
