"""The loss that a module makes of named sums."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stepkd.losses import LossTerms, component_scales


def reduce(
    sums: Mapping[str, Tensor],
    denominators: Mapping[str, float],
    *,
    weights: Mapping[str, float] | None = None,
    world_size: int = 1,
) -> Tensor:
    """Each sum divided by its count, weighed and added up, as the optimiser step does it."""
    return LossTerms(dict(sums)).scaled(component_scales(sums, denominators, weights or {}, world_size))
