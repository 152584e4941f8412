"""What a labeller is: tokenised solutions in, one label per step out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from stepkd.steps import Span


@dataclass(frozen=True)
class Solution:
    """One solution to label, in one tokenisation."""

    id: str
    """Unique over the job, ``<problem id>/<sample>``."""
    index: int
    """Number of the solution in the whole job; keys whatever is drawn for it."""
    row: Mapping[str, Any]
    """Problem row: ``id``, ``prompt``, ``answer``; rows of the tiny world also carry ``task`` and ``meta``."""
    prompt_ids: tuple[int, ...]
    """Prompt as the sampler read it."""
    completion_ids: tuple[int, ...]
    """Sampled (or tokenised) ids, the end token included where there is one."""
    spans: tuple[Span, ...]
    """Step spans: a partition of ``range(len(completion_ids))``."""
    steps: tuple[str, ...]
    """Text of every step, separators included."""
    correct: bool | None
    """Whether the final answer is right; None: not graded."""
    finish: Literal["stop", "length"] = "stop"
    """``length``: the solution was cut off."""


@dataclass(frozen=True)
class StepLabels:
    """What a labeller says of one solution."""

    labels: tuple[bool | int | float | None, ...]
    """One per step, all of one kind (bool, -1/0/1, or float in [0, 1]); None: not labelled."""
    values: tuple[float | None, ...] | None = None
    """Estimated chance per step that the answer comes out right from there, in [0, 1]; None: not estimated."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON values kept with the row: successes and trials per step, tokens generated, ..."""


class Labeller(Protocol):
    """Labels steps."""

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """Label every step of every solution; the result for a solution does not depend on the others."""
        ...

    def provenance(self) -> dict[str, Any]:
        """What the labels came from, as JSON values: labeller, model, number of rollouts, temperature, seed, ..."""
        ...
