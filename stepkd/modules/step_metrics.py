"""What an optimiser step logs: sums over its micro-batches and ranks, and the means that follow."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepkd.losses import LossTerms
from stepkd.modules.distributed import all_reduce


def accumulate(totals: dict[str, Tensor], terms: LossTerms) -> None:
    """Add the terms of a micro-batch to the sums of its step, in place."""
    for name, value in terms.sums.items():
        totals[f"sum/{name}"] = totals.get(f"sum/{name}", torch.zeros_like(value)) + value.detach()
    for name, (value, count) in terms.metrics.items():
        for part, number in (("metric", value), ("count", count)):
            totals[f"{part}/{name}"] = totals.get(f"{part}/{name}", torch.zeros_like(number)) + number


def step_values(
    counts: Mapping[str, float],
    sums: Mapping[str, Tensor],
    last: LossTerms,
    weights: Mapping[str, float],
    tokens: float,
    device: torch.device,
) -> tuple[dict[str, float], float]:
    """Reduce a step over all ranks.

    Args:
        counts: denominators of the components, reduced already.
        sums: what :func:`accumulate` made; empty on a rank that had only fillers.
        last: any terms of the step, for the names: every rank sends the same ones.
        weights: factors of the components.
        tokens: of this rank.
        device: of the collectives.

    Returns:
        Means of components, ``loss`` and metrics; and the tokens of all ranks.
    """
    names = [f"sum/{name}" for name in last.sums]
    names += [f"{part}/{name}" for name in last.metrics for part in ("metric", "count")]
    totals = all_reduce({"tokens": tokens, **{name: sums.get(name, 0.0) for name in names}}, device)
    values = {name: totals[f"sum/{name}"] / counts[name] if counts[name] else 0.0 for name in last.sums}
    values["loss"] = sum(weights.get(name, 1.0) * values[name] for name in last.sums)
    values |= {
        name: totals[f"metric/{name}"] / totals[f"count/{name}"] for name in last.metrics if totals[f"count/{name}"]
    }
    return values, totals["tokens"]
