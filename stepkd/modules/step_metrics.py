"""What an optimiser step measures: sums over its micro-batches and ranks, whether they are finite, and its speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import Tensor, nn

from stepkd.data.collate import Batch
from stepkd.errors import MachineError, TrainingError
from stepkd.losses import LossTerms
from stepkd.models.machine import memory_peak
from stepkd.modules.distributed import all_reduce, union
from stepkd.runs.process import STOP_REQUEST

_SHOWN = 16
"""Rows that a message names at most."""


def accumulate(totals: dict[str, Any], terms: LossTerms, read: Callable[[Tensor], Any] = Tensor.detach) -> None:
    """Add the terms of a micro-batch to sums, in place: ``sum/LOSS``, and ``metric/NAME`` over ``number/NAME``.

    Args:
        totals: the sums.
        terms: what is added.
        read: what is kept of a tensor: itself in training, which waits for no device, and its number in validation.
    """
    named = {f"sum/{name}": value for name, value in terms.sums.items()}
    for name, (value, number) in terms.metrics.items():
        named |= {f"metric/{name}": value, f"number/{name}": number}
    for name, value in named.items():
        totals[name] = totals.get(name, 0) + read(value)


def means(
    totals: Mapping[str, float], names: Iterable[str], weights: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """What is logged of sums over all micro-batches and ranks.

    Args:
        totals: as :func:`accumulate` names them, and ``count/LOSS``, the denominators.
        names: of the losses.
        weights: factors of the losses; missing ones are 1.

    Returns:
        Means of the losses for which something counts, with their weighted sum, ``loss``; and of the metrics.
    """
    counts = {name: totals.get(f"count/{name}", 0.0) for name in names}
    losses = {name: totals[f"sum/{name}"] / count for name, count in counts.items() if count}
    if losses:
        losses["loss"] = sum(weights.get(name, 1.0) * value for name, value in losses.items())
    metrics = {key.partition("/")[2]: value for key, value in totals.items() if key.startswith("metric/")}
    numbers = {name: totals[f"number/{name}"] for name in metrics}
    return losses, {name: value / numbers[name] for name, value in metrics.items() if numbers[name]}


def require_counts(counts: Mapping[str, float], *, step: int, batches: int) -> None:
    """Make sure that an optimiser step has something to learn from.

    Args:
        counts: by component, over all ranks.
        step: its number, for the message.
        batches: how many batches in a row had these counts.

    Raises:
        TrainingError: all counts are 0.
    """
    if not any(counts.values()):
        raise TrainingError(
            f"step {step}: no example of {batches} batch(es) in a row has a single target ({', '.join(counts)} all 0); "
            "look at max_length, at what the method counts, and at the rows"
        )


def require_finite(
    losses: list[Tensor], norm: float, micro: list[Batch], *, step: int, device: torch.device, begins: bool = False
) -> None:
    """Check the losses of all micro-batches and the gradient norm, between the backward passes and the optimiser step.

    Args:
        losses: scalar loss of each micro-batch of this rank.
        norm: global gradient norm.
        micro: the micro-batches.
        step: optimiser steps taken so far, for the message.
        device: of the collective.
        begins: whether it is the first step of its batch, which a request to stop may still give up.

    Raises:
        Preempted: on all ranks; a rank was asked to stop, and so perhaps was its served teacher, which then says NaN.
        MachineError: the same in a later step of a batch.
        TrainingError: on all ranks alike, naming the rows of the offending micro-batches, whichever rank had them.
    """
    finite = torch.isfinite(torch.stack(losses)).tolist()
    bad = [name for ok, batch in zip(finite, micro, strict=True) if not ok for name in batch.ids]
    norm_is_bad = norm != norm or norm == float("inf")
    own = {"bad": float(bool(bad) or norm_is_bad), "asked": float(bool(STOP_REQUEST))}
    found = all_reduce(own, device, op="max")
    if not found["bad"]:
        return
    if found["asked"]:
        if begins:
            raise STOP_REQUEST.preempted()
        raise MachineError(
            f"step {step}: asked to stop, and the loss is not finite in the middle of a batch, as where a served "
            "teacher went first; --resume continues from last.ckpt"
        )
    if bad := union(bad):
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        what = f"the loss is not finite in a micro-batch with rows {', '.join(bad[:_SHOWN])}{more}"
    else:
        rows = [name for batch in micro for name in batch.ids][:_SHOWN]
        what = f"the losses are finite but the gradient norm is {norm} (rows of this rank: {', '.join(rows)}, ...)"
    raise TrainingError(
        f"step {step}: {what}. The weights were not changed; lower "
        "optimizer.lr, look at these rows, or train in float32 / bf16-mixed"
    )


class Throughput:
    """Rate over the time between two calls of :meth:`measure`.

    For MFU a token costs ``2 N`` operations in the forward pass, ``2 N`` for gradients of activations and ``2
    N_trainable`` for those of weights; attention scores and recomputation are not counted, as usual (Chowdhery et al.
    2022, arXiv 2204.02311, appendix B, without the attention term).
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        parameters = list(model.parameters())
        self.flops_per_token = sum((6.0 if p.requires_grad else 4.0) * p.numel() for p in parameters)
        # Lightning knows the peak of CUDA devices and TPUs; for anything else there is no honest figure, so no MFU.
        self.peak_flops = get_available_flops(device, dtype) if device.type == "cuda" else None
        self.device = device
        self._last = time.perf_counter()

    def measure(self, tokens: float, world_size: int = 1) -> dict[str, float]:
        """Rates since the last call.

        Args:
            tokens: tokens trained on since then, over all ranks.
            world_size: devices that shared the work.
        """
        now = time.perf_counter()
        seconds, self._last = max(now - self._last, 1e-9), now
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else memory_peak() or 0
        result = {
            "perf/tokens_per_second": tokens / seconds,
            "perf/step_seconds": seconds,
            "perf/memory_gib": peak / 2**30,
        }
        if self.peak_flops:
            result["perf/mfu"] = self.flops_per_token * tokens / seconds / (self.peak_flops * world_size)
        return result

    def restart(self) -> None:
        """Leave out time that was not training (validation, checkpoints)."""
        self._last = time.perf_counter()
