"""The only place where a loss is divided.

Every loss function in stepkd returns *named sums*. The denominators (how many tokens, steps or sequences) are counted
before the first backward, per component, over the whole optimiser step and all ranks. Dividing here, once, makes the
loss independent of padding, micro-batch split, chunk size and world size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class LossTerms:
    """What a loss function returns for one micro-batch."""

    sums: dict[str, Tensor]
    """Component name -> scalar sum over the micro-batch's items (tokens, steps, sequences), differentiable."""
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Metric name -> detached (sum, count) pair, added over micro-batches and ranks, then divided for logging."""
    loss: Tensor | None = None
    """The components' sum, each times its :func:`component_scales`, where the loss function made it itself to take
    gradients in the forward pass; the sums are detached then, for the log. None: :meth:`scaled` makes it of them."""

    def scaled(self, scales: Mapping[str, float]) -> Tensor:
        """The loss: ``loss`` where the loss function made it, else the sums, each times its scale."""
        if self.loss is not None:
            return self.loss
        first, *others = (value * scales[name] for name, value in self.sums.items())
        return sum(others, first)


def component_scales(
    names: Iterable[str], denominators: Mapping[str, float], weights: Mapping[str, float], world_size: int
) -> dict[str, float]:
    """Factor of every component's sum in the loss: ``weight * world_size / denominator``, or 0 where nothing counts.

    See :func:`reduce` for arguments and errors.
    """
    if world_size < 1:
        raise ValueError(f"world_size={world_size}: must be at least 1")
    scales = {}
    for name in names:
        if name not in denominators:
            raise ValueError(f"no denominator for loss component {name!r}: count it before the first backward")
        count = float(denominators[name])
        if not 0 <= count < float("inf"):
            raise ValueError(f"denominator of {name!r} is {count}: must be a finite count >= 0")
        scales[name] = 0.0 if count == 0 else weights.get(name, 1.0) * world_size / count
    return scales


def reduce(
    sums: Mapping[str, Tensor],
    denominators: Mapping[str, float],
    *,
    weights: Mapping[str, float] | None = None,
    world_size: int = 1,
) -> Tensor:
    """Weighted sum of components, each divided by its own global denominator.

    Args:
        sums: scalar sums of this micro-batch on this rank.
        denominators: per component, the count over all micro-batches of the optimiser step and all ranks, >= 0. A
            component whose count is 0 (an empty class) contributes exactly zero but stays in the graph, so that every
            rank runs the same backward.
        weights: per component factor; missing ones are 1.
        world_size: number of data-parallel ranks whose gradients the strategy *averages* (DDP, FSDP); the loss is
            multiplied by it so that the averaged gradient is that of the global loss.

    Returns:
        Scalar loss. Summed over micro-batches and averaged over ranks it is the loss of the whole batch.

    Raises:
        ValueError: a component without denominator, a denominator that is negative or not finite, a weight for a
            component that is not there, a sum that is not a scalar, or a world size below 1.
    """
    weights = {} if weights is None else weights
    if unknown := set(weights) - set(sums):
        raise ValueError(f"weights for {sorted(unknown)}, but the loss has only {sorted(sums)}")
    scales = component_scales(sums, denominators, weights, world_size)
    for name, value in sums.items():
        if value.dim() != 0:
            raise ValueError(f"loss component {name!r} has shape {tuple(value.shape)}: must be a scalar sum")
    return LossTerms(dict(sums)).scaled(scales)


def segment_sum(values_N: Tensor, segment_N: Tensor, num_segments: int) -> Tensor:
    """Sum values by segment: token log-probabilities to steps or sequences.

    Args:
        values_N: N values.
        segment_N: N segment numbers in ``[0, num_segments)``; a negative number leaves the value out.
        num_segments: number of segments S, >= 0.

    Returns:
        S sums, in the dtype of ``values_N``; empty segments are 0. Differentiable.
    """
    if (segment_N < 0).any():
        kept = segment_N >= 0
        values_N, segment_N = values_N[kept], segment_N[kept]
    return torch.zeros(num_segments, dtype=values_N.dtype, device=values_N.device).index_add(0, segment_N, values_N)
