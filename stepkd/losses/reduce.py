"""The factors of all sums that a loss is made of, from counts over the whole optimiser step and all ranks.

Every loss function in stepkd returns *named sums*. The denominators (how many tokens, steps or sequences) are counted
before the first backward, per component, over the whole optimiser step and all ranks. Dividing once, by these,
makes the loss independent of padding, micro-batch split, chunk size and world size. Weights within a sum (GRPO's 1/|y|)
are the method's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class LossTerms:
    """What a loss function returns for one micro-batch: sums that nothing has divided yet, and metrics.

    A script that has the whole batch at hand divides by its own counts::

        terms = stepkd.losses.dpo(chosen_logratios_P, rejected_logratios_P)
        loss = terms.sums["dpo"] / len(chosen_logratios_P)

    With several components, micro-batches or ranks, :func:`component_scales` says the factors.
    """

    sums: dict[str, Tensor]
    """Component name -> scalar sum over the micro-batch's items (tokens, steps, sequences), differentiable."""
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Metric name -> detached (sum, count) pair, added over micro-batches and ranks, then divided for logging."""
    loss: Tensor | None = None
    """The components' sum, each times its :func:`component_scales`, where the loss function made it itself to take
    gradients in the forward pass; the sums are detached then, for the log. None: :meth:`scaled` makes it of them."""

    def scaled(self, scales: Mapping[str, float]) -> Tensor:
        """The loss of this micro-batch, ready for ``backward``.

        Args:
            scales: factor of every component's sum, from :func:`component_scales`; ``loss`` holds them already.

        Returns:
            A scalar: ``loss`` where there is one, else the sums, each times its scale.

        Raises:
            KeyError: a component without a scale.
        """
        if self.loss is not None:
            return self.loss
        first, *others = (value * scales[name] for name, value in self.sums.items())
        return sum(others, first)


def component_scales(
    names: Iterable[str], denominators: Mapping[str, float], weights: Mapping[str, float], world_size: int
) -> dict[str, float]:
    """Factor of every component's sum in the loss: ``weight * world_size / denominator``, or 0 where nothing counts.

    Times the sums of a micro-batch, and added up, they give a loss that, summed over micro-batches and averaged over
    ranks, is that of the whole batch.

    Args:
        names: of the components.
        denominators: per component, the count over all micro-batches of the optimiser step and all ranks, >= 0. A
            component whose count is 0 (an empty class) contributes exactly zero but stays in the graph, so that every
            rank runs the same backward.
        weights: per component factor; missing ones are 1.
        world_size: number of data-parallel ranks whose gradients the strategy *averages* (DDP, FSDP); the loss is
            multiplied by it so that the averaged gradient is that of the global loss.

    Returns:
        For each name its factor, >= 0 where its weight is.

    Raises:
        KeyError: a component without denominator.
        ValueError: a denominator that is negative or not finite.
    """
    scales = {}
    for name in names:
        count = float(denominators[name])
        if not 0 <= count < float("inf"):
            raise ValueError(f"denominator of {name!r} is {count}: must be a finite count >= 0")
        scales[name] = 0.0 if count == 0 else weights.get(name, 1.0) * world_size / count
    return scales


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
