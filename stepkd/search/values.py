"""How good a state is: by finishing it several times, or by what a step scorer says of it.

In a tree the rewards of the steps telescope: without discount, a step counts by the states that the walks through it
end in. So a state's value must speak of all its steps. Scores that say whether *a step* is right are multiplied (the
chance that all are right), those that estimate the future are taken from the newest step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

from stepkd.errors import ConfigError, check_choice
from stepkd.grading import Grader
from stepkd.scorers.reductions import Reduction, default_reduction, reduce_scores
from stepkd.scorers.scorer import Solutions, StepScorer
from stepkd.search.protocols import State, StepGenerator


class RolloutValue:
    """Share of right answers among simulated continuations; the outcome itself where the solution is over.

    Args:
        generator: continues states.
        grader: compares final answers with the problem's ``answer``.
        rollouts: continuations per state, >= 1.

    Raises:
        ConfigError: ``rollouts`` is not positive.
    """

    def __init__(self, generator: StepGenerator, grader: Grader, *, rollouts: int = 4) -> None:
        if rollouts < 1:
            raise ConfigError(f"rollouts={rollouts}: must be at least 1")
        self.generator = generator
        self.grader = grader
        self.rollouts = rollouts

    def values(self, states: Sequence[State]) -> list[float | None]:
        """See :class:`~stepkd.search.protocols.StateValue`."""
        going = [state for state in states if state.correct is None]
        endings = self.generator.complete(going, self.rollouts) if going else []
        texts = [state.text + ending.text for state, group in zip(going, endings, strict=True) for ending in group]
        answers = [str(state.problem.row["answer"]) for state in going for _ in range(self.rollouts)]
        cut_off = [ending.end == "length" for group in endings for ending in group]
        grades = iter(self.grader.grade(texts, answers, cut_off=cut_off))
        return [
            sum(next(grades).verdict == "correct" for _ in range(self.rollouts)) / self.rollouts
            if state.correct is None
            else float(state.correct)
            for state in states
        ]

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.search.protocols.StateValue`."""
        return {"value": "rollout", "rollouts": self.rollouts}


class ScorerValue:
    """What a step scorer says: a process reward model, a prompted judge, an exact checker.

    Args:
        scorer: scores the steps.
        reduction: from the scores of all steps to one: ``last`` (the newest step), ``product``, ``min`` or ``mean``;
            None: what suits the scorer's meaning.
        name: name of the value in the provenance.
    """

    def __init__(self, scorer: StepScorer, *, reduction: Reduction | None = None, name: str = "scorer") -> None:
        self.scorer = scorer
        self.reduction: Reduction = default_reduction(scorer.meaning) if reduction is None else reduction
        check_choice("reduction", self.reduction, get_args(Reduction))
        self.name = name

    def values(self, states: Sequence[State]) -> list[float | None]:
        """See :class:`~stepkd.search.protocols.StateValue`; states of one problem are scored together.

        No estimate has a state without words, and one of which the scorer could not read a step that counts.

        Raises:
            DataError: a score outside [0, 1].
        """
        steps = [[step for step in state.steps if step.strip()] for state in states]
        problems: dict[int, list[int]] = {}
        for i, state in enumerate(states):
            if steps[i]:
                problems.setdefault(state.problem.index, []).append(i)
        asked = [Solutions(states[group[0]].problem.row, [steps[i] for i in group]) for group in problems.values()]
        values: list[float | None] = [None] * len(states)
        for group, scored in zip(problems.values(), self.scorer.score(asked) if asked else [], strict=True):
            for i, scores in zip(group, scored, strict=True):
                values[i] = self._value(scores)
        return values

    def _value(self, scores: Sequence[float]) -> float | None:
        # Only the last step's score counts then; those before it may be missing.
        if self.reduction == "last":
            scores = scores[-1:]
        return None if math.isnan(scores[-1]) else reduce_scores(scores, self.reduction, meaning=self.scorer.meaning)

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.search.protocols.StateValue`."""
        return {"value": self.name, "reduction": self.reduction, "scorer": self.scorer.provenance()}
