"""Stop, on every rank and with the rows' names, before a non-finite loss or gradient reaches the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from stepkd.data.collate import MicroBatch
from stepkd.errors import TrainingError
from stepkd.modules.distributed import all_reduce, is_distributed

if TYPE_CHECKING:
    from stepkd.modules.base import StepModule

_SHOWN = 16


def require_finite(module: StepModule, losses: list[Tensor], norm: float, micro: list[MicroBatch]) -> None:
    """Check the losses of all micro-batches and the gradient norm, between the backward passes and the optimiser step.

    Args:
        module: whose step it is.
        losses: scalar loss of each micro-batch of this rank.
        norm: global gradient norm.
        micro: the micro-batches.

    Raises:
        TrainingError: on all ranks alike, naming the rows of the offending micro-batches, whichever rank had them.
    """
    finite = torch.isfinite(torch.stack(losses)).tolist()
    bad = [name for ok, batch in zip(finite, micro, strict=True) if not ok for name in batch.ids]
    norm_is_bad = norm != norm or norm == float("inf")
    if not all_reduce({"bad": float(bool(bad) or norm_is_bad)}, module.device, op="max")["bad"]:
        return
    bad = _gather(bad)
    if bad:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        what = f"the loss is not finite in a micro-batch with rows {', '.join(bad[:_SHOWN])}{more}"
    else:
        rows = [name for batch in micro for name in batch.ids][:_SHOWN]
        what = f"the losses are finite but the gradient norm is {norm} (rows of this rank: {', '.join(rows)}, ...)"
    raise TrainingError(
        f"step {module.global_step}: {what}. The weights were not changed; lower "
        "optimizer.lr, look at these rows, or train in float32 / bf16-mixed"
    )


def _gather(names: list[str]) -> list[str]:
    if not is_distributed():
        return names
    parts: list[list[str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, names)
    return [name for part in parts for name in part or ()]
