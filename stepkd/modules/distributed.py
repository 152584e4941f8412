"""The few distributed operations a module needs, the same under every strategy; and which strategies those are.

A strategy trains on several ranks as one process does when a test compares the two: only those are taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from stepkd.errors import ConfigError

TESTED = (SingleDeviceStrategy, DDPStrategy)
"""Lightning's own; a class of ours says so by ``matches_one_process``."""
OPTIONS = {"process_group_backend", "timeout", "find_unused_parameters", "gradient_as_bucket_view"}
"""Options under which the tests, too, found the training of one process."""
_DEFAULTS = {
    name: parameter.default
    for function in (DistributedDataParallel.__init__, DDPStrategy.__init__)
    for name, parameter in signature(function).parameters.items()
}


def _is_distributed() -> bool:
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
    if not numbers or not _is_distributed():
        return numbers
    stacked = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    dist.all_reduce(stacked, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return dict(zip(numbers, stacked.tolist(), strict=True))


def union(names: Iterable[str]) -> list[str]:
    """All names that any rank has, sorted; every rank must call it."""
    parts = [set(names)]
    if _is_distributed():
        mine, parts = parts[0], [set()] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
    return sorted(set.union(*parts))


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
        limit: largest gradient norm; a ``gradient_clipping`` in DeepSpeed's own settings overrides it.
    """
    config = getattr(strategy, "config", None)
    if type(strategy).__name__ == "DeepSpeedStrategy" and isinstance(config, dict) and limit:
        config.setdefault("gradient_clipping", limit)


def gradient_sync(wrapped: Any, enabled: bool) -> AbstractContextManager[Any]:
    """Synchronise gradients in this backward pass, or only accumulate them locally.

    DDP skips its all-reduce inside ``no_sync``. FSDP2 goes on summing after every backward pass: what it adds up are a
    rank's shares, where without it every rank would hold a whole gradient between the micro-batches of a step.

    Args:
        wrapped: what the strategy trains: the module itself, or its DDP wrapper.
        enabled: False for every micro-batch but the last.
    """
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not enabled else nullcontext()


def check_strategy(strategy: Any) -> None:
    """Refuse a strategy that is not known to average gradients as one process would; warn of an untested one.

    Args:
        strategy: what ``trainer.strategy`` holds: one of Lightning's names, a ``class_path`` with ``init_args``, or a
            strategy.

    Raises:
        ConfigError: it is not on the list; the message names the overlay to use instead.
    """
    name, kind, options = _resolved(strategy)
    extra = sorted(key for key, value in options.items() if key not in OPTIONS and value != _DEFAULTS.get(key))
    tested = kind in TESTED or "matches_one_process" in vars(kind)
    if name == "auto" or (tested and not extra):
        return
    started = "start_method" not in extra
    own = (issubclass(kind, TESTED) or hasattr(kind, "matches_one_process")) and not kind.__module__.startswith(
        "lightning."
    )
    if kind is not DeepSpeedStrategy and not (own and started):
        options_too = f" with {', '.join(extra)}" if tested else ""
        raise ConfigError(
            f"trainer.strategy: {name}{options_too} is not supported: nobody has compared its training with that of "
            "one process. To shard weights, gradients and optimiser state over the ranks, use `--config "
            "recipes/strategy/fsdp2.yaml`; for a whole model on every rank, recipes/strategy/ddp.yaml"
        )
    rank_zero_warn(
        f"trainer.strategy: {name} is untested: compare train/grad_norm of the first steps with a run on one device "
        "(recipes/strategy/fsdp2.yaml is tested)",
        stacklevel=1,  # always the same line: the warning is shown once
    )


def _resolved(strategy: Any) -> tuple[str, type, dict[str, Any]]:
    """Name, class and options; ``object`` where there is no such strategy."""
    if isinstance(strategy, dict):
        module, _, name = str(strategy["class_path"]).rpartition(".")
        given = {**(strategy.get("init_args") or {}), **(strategy.get("dict_kwargs") or {})}
        return name, getattr(import_module(module), name), given
    if not isinstance(strategy, str):
        given = {"start_method": getattr(strategy, "_start_method", "popen"), **getattr(strategy, "_ddp_kwargs", {})}
        return type(strategy).__name__, type(strategy), given
    entry: dict[str, Any] = dict(StrategyRegistry).get(strategy, {})
    return strategy, entry.get("strategy", object), entry.get("init_params", {})
