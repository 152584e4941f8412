"""What a step scorer is: problems with solutions in, one probability per step out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stepkd.steps import Meaning

__all__ = ["Meaning", "Solutions", "StepScorer", "score_one"]


@dataclass(frozen=True)
class Solutions:
    """One problem with the solutions to score; they share the prompt."""

    row: Mapping[str, Any]
    """Problem row: ``prompt``, and for checkers ``task`` and ``meta``; a judge may use ``answer`` or ``solution``."""
    solutions: Sequence[Sequence[str]]
    """Step texts of every solution, each with at least one step; separators at a step's end are optional."""


class StepScorer(Protocol):
    """Scores steps."""

    meaning: Meaning
    """What the scores estimate; decides the default reduction."""

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        """Score every step.

        Args:
            problems: problems with their solutions.

        Returns:
            For each problem and solution one number in [0, 1] per step: the higher, the better. An outcome scorer
            gives its one number to the last step, and NaN to the steps before it. A solution that does not fit into
            the model's context gets NaN for the steps that were cut off.
        """
        ...

    def provenance(self) -> dict[str, Any]:
        """What the scores came from, as JSON values: model, format, settings."""
        ...


def score_one(scorer: StepScorer, prompt: str, steps: Sequence[str]) -> list[float]:
    """Scores of one solution's steps: the simplest use of a scorer."""
    return scorer.score([Solutions({"id": "0", "prompt": prompt}, [steps])])[0][0]
