"""Optimiser and learning-rate schedule, the same for every method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from stepkd.errors import ConfigError, check_bounds


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with warm-up and decay."""

    lr: float = 1e-5
    """Peak learning rate, > 0. About 1e-5 for all weights of a small model, 1e-4 to 2e-4 for LoRA."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices; vectors (norms, biases) never decay."""
    beta1: float = 0.9
    """Decay of the first moment, in [0, 1)."""
    beta2: float = 0.95
    """Decay of the second moment, in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate goes on after the warm-up: ``constant``, or to 0 at the end of the run by a ``linear`` or,
    as most papers have it, a ``cosine`` decay."""
    warmup: float = 0.03
    """Warm-up: a share of all steps when below 1, else a number of steps, >= 0."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm, >= 0; 0 only measures it."""

    def __post_init__(self) -> None:
        check_bounds("optimizer.", self, lr="(0, inf)", weight_decay="[0, inf)", beta1="[0, 1)", beta2="[0, 1)")
        check_bounds("optimizer.", self, warmup="[0, inf)", max_grad_norm="[0, inf)")


def build_optimizer(spec: OptimizerConfig, parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; only matrices decay.

    Raises:
        ConfigError: nothing is trainable.
    """
    if not parameters:
        raise ConfigError("no trainable parameters: set policy.lora, or load the policy unquantised")
    matrices = [p for _, p in parameters if p.dim() >= 2]
    vectors = [p for _, p in parameters if p.dim() < 2]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((matrices, spec.weight_decay), (vectors, 0.0))
        if group
    ]
    return torch.optim.AdamW(groups, lr=spec.lr, betas=(spec.beta1, spec.beta2), eps=spec.eps, fused=True)


def put_back(groups: Sequence[dict[str, Any]], optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """Let an optimiser and its schedule go by their own settings, and not by those that a checkpoint brought along.

    Args:
        groups: settings of each parameter group, as they were when it was built.
        optimizer, schedule: after their state was restored.
    """
    schedule.base_lrs = [group["initial_lr"] for group in groups]
    schedule._last_lr = [
        f(schedule.last_epoch) * lr for f, lr in zip(schedule.lr_lambdas, schedule.base_lrs, strict=True)
    ]
    for group, own, lr in zip(optimizer.param_groups, groups, schedule._last_lr, strict=True):
        group.update(own, lr=lr)


def build_schedule(spec: OptimizerConfig, optimizer: torch.optim.Optimizer, total_steps: int | None) -> Any:
    """Learning-rate schedule per optimiser step (transformers' own).

    Args:
        spec: the settings.
        optimizer: whose learning rate it sets.
        total_steps: optimiser steps of the whole run; None when the run has no planned end.

    Raises:
        ConfigError: a decaying schedule, or a warm-up given as a share, without a planned end.
    """
    from transformers import get_scheduler

    if total_steps is None and (spec.schedule != "constant" or 0 < spec.warmup < 1):
        raise ConfigError(
            f"optimizer.schedule={spec.schedule!r} with warmup={spec.warmup} needs to know where the run ends: set "
            "trainer.max_steps or trainer.max_epochs"
        )
    total = total_steps or 0
    warmup = int(spec.warmup) if spec.warmup >= 1 else round(spec.warmup * total)
    name = "constant_with_warmup" if spec.schedule == "constant" else spec.schedule
    return get_scheduler(name, optimizer, warmup, total)
