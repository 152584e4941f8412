"""The few distributed operations a module needs, the same under every strategy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stepkd.errors import ConfigError


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce(values: Mapping[str, float | Tensor], device: torch.device, op: str = "sum") -> dict[str, float]:
    """Reduce named numbers over all ranks in one message.

    Args:
        values: the same names on every rank.
        device: where the message lives (the collective's device).
        op: ``sum`` or ``max``.

    Returns:
        The reduced numbers; without other ranks, the numbers themselves.
    """
    numbers = {name: float(value) for name, value in values.items()}
    if not numbers or not is_distributed():
        return numbers
    stacked = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    dist.all_reduce(stacked, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return dict(zip(numbers, stacked.tolist(), strict=True))


def all_names(names: Iterable[str]) -> list[str]:
    """The names that the ranks have, rank after rank; every rank must call it."""
    parts = [list(names)]
    if is_distributed():
        mine, parts = parts[0], [[]] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
    return [name for part in parts for name in part]


def union(names: Iterable[str]) -> list[str]:
    """All names that any rank has, sorted; every rank must call it."""
    return sorted(set(all_names(names)))


def check_micro_batches(strategy: Any, number: int) -> None:
    """Refuse what a strategy would silently get wrong.

    Args:
        strategy: Lightning's.
        number: micro-batches of an optimiser step.

    Raises:
        ConfigError: DeepSpeed, whose engine ends a step with every backward pass, and more than one micro-batch.
    """
    if number > 1 and type(strategy).__name__ == "DeepSpeedStrategy":
        raise ConfigError(
            f"the step has {number} micro-batches, and DeepSpeed takes the gradient of one: raise "
            "model.init_args.micro_batch_tokens until a step fits into one, or use recipes/strategy/fsdp2.yaml"
        )


def clip_in_engine(strategy: Any, limit: float | None) -> None:
    """Have DeepSpeed clip: its engine holds the gradients, and a clipped copy would change nothing.

    Args:
        strategy: Lightning's, before it has read its settings.
        limit: largest gradient norm; a ``gradient_clipping`` in DeepSpeed's own settings goes before it.
    """
    config = getattr(strategy, "config", None)
    if type(strategy).__name__ == "DeepSpeedStrategy" and isinstance(config, dict) and limit:
        config.setdefault("gradient_clipping", limit)


@contextmanager
def gradient_sync(wrapped: Any, enabled: bool) -> Iterator[None]:
    """Synchronise gradients in this backward pass, or only accumulate them locally.

    DDP skips its all-reduce inside ``no_sync``. FSDP2 goes on summing after every backward pass: what it adds up are a
    rank's shares, where without it every rank would hold a whole gradient between the micro-batches of a step.

    Args:
        wrapped: what the strategy trains: the module itself, or its DDP wrapper.
        enabled: False for every micro-batch but the last.
    """
    if isinstance(wrapped, nn.parallel.DistributedDataParallel) and not enabled:
        with wrapped.no_sync():
            yield
    else:
        yield
