"""Arguments of Lightning's Trainer that a run cannot honour: refused by name, with what to set instead.

All others take effect. ``tests/training/test_trainer_settings.py`` holds the list of them, so that a new argument of
Lightning's is looked at before it counts as one of them.
"""

from __future__ import annotations

from typing import Any

from stepkd.errors import ConfigError
from stepkd.modules.distributed import check_strategy

CONVERTED = ("bf16-true", "64", "transformer-engine")
"""What Lightning's names of precisions begin with that convert a module as a whole."""
_CLIP = "set model.init_args.optimizer.max_grad_norm"
_AVERAGE = "no averaged weights are kept; model.init_args.optimizer.schedule lowers the learning rate at the end"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "accumulate_grad_batches": (
        (None, 1),
        "one batch is one optimiser step. Set data.init_args.global_batch_size, and model.init_args.micro_batch_tokens "
        "for memory",
    ),
    "barebones": ((None, False), "a run always keeps its metrics and checkpoints"),
    "enable_checkpointing": (
        (None, True),
        "checkpoint.every_n_steps says how often a run writes its state; null keeps none",
    ),
    "gradient_clip_algorithm": ((None,), f"gradients are clipped by their norm: {_CLIP}"),
    "gradient_clip_val": ((None, 0), _CLIP),
    "model_registry": ((None,), "use `stepkd export RUN --to FOLDER`, then `hf upload ID FOLDER`"),
    "overfit_batches": ((None, 0), "set data.init_args.train.limit to a few rows, and trainer.max_epochs"),
    "plugins": (
        (None, []),
        "set trainer.precision, model.init_args.policy.quantization or trainer.strategy; the launcher decides the "
        "cluster, and checkpoints are always written as one file",
    ),
    "sync_batchnorm": ((None, False), "language models have no batch normalisation"),
    "use_distributed_sampler": ((None, True), "every rank always gets its own share of each batch"),
}
"""Values that change nothing, and what to do in place of others."""
CALLBACKS = {
    "LearningRateFinder": "set model.init_args.optimizer.lr, and try a few values for some steps each "
    "(--config debug, --trainer.max_steps 30)",
    "BatchSizeFinder": "set model.init_args.micro_batch_tokens; `stepkd doctor --recipe ...` measures the memory",
    "GradientAccumulationScheduler": REFUSED["accumulate_grad_batches"][1],
    "StochasticWeightAveraging": _AVERAGE,
    "WeightAveraging": _AVERAGE,
    "EMAWeightAveraging": _AVERAGE,
}
"""Callbacks of Lightning's that need automatic optimisation, and what to do in place of them."""


def check_trainer_settings(settings: dict[str, Any], subcommand: str) -> None:
    """Refuse what would have no effect.

    Args:
        settings: arguments of the Trainer, as parsed.
        subcommand: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        ConfigError: a setting without effect, a strategy that is not supported, or a training without an end.
    """
    for name, (neutral, instead) in REFUSED.items():
        if (value := settings.get(name)) not in neutral:
            raise ConfigError(f"trainer.{name}: {value} has no effect here: {instead}")
    callbacks = settings.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        name = str(callback.get("class_path")).rpartition(".")[2]
        if name in CALLBACKS:
            raise ConfigError(
                f"trainer.callbacks: {name} does not work here, because it needs Lightning's automatic optimisation, "
                f"and a step here is several micro-batches with one denominator: {CALLBACKS[name]}"
            )
    precision = str(settings.get("precision"))
    if precision.startswith(CONVERTED):
        raise ConfigError(
            f"trainer.precision {precision}: the weights' dtype is the model's own here, so set "
            "model.init_args.policy.dtype (bfloat16 with LoRA, float64), or trainer.precision bf16-mixed"
        )
    limits = (
        settings.get("max_steps", -1) != -1,
        settings.get("max_epochs") not in (None, -1),
        settings.get("max_time"),
        settings.get("fast_dev_run"),
    )
    if subcommand == "fit" and not any(limits):
        raise ConfigError("the run has no end: set trainer.max_steps (or trainer.max_epochs)")
    check_strategy(settings.get("strategy", "auto"))
