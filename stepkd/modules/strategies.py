"""Which strategies train on several ranks as one process does: those on a list, each compared in the tests."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn
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
