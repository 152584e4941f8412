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
    schedule: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = "cosine"
    """``constant``, ``linear``, ``cosine`` or ``warmup_stable_decay`` (decay over the last fifth)."""
    warmup: float = 0.03
    """Warm-up: a share of all steps when below 1, else a number of steps."""
    min_lr_ratio: float = 0.0
    """Final learning rate over the peak, in [0, 1], for ``cosine`` and ``warmup_stable_decay``."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 only measures it."""

    def __post_init__(self) -> None:
        check_bounds(
            "optimizer.",
            self,
            lr="(0, inf)",
            weight_decay="[0, inf)",
            beta1="[0, 1)",
            beta2="[0, 1)",
            warmup="[0, inf)",
            min_lr_ratio="[0, 1]",
            max_grad_norm="[0, inf)",
        )
        if self.min_lr_ratio and self.schedule in ("constant", "linear"):
            raise ConfigError(
                f"optimizer.min_lr_ratio has no effect on schedule {self.schedule!r}: drop it or use cosine"
            )

    def warmup_steps(self, total_steps: int | None) -> int:
        """Number of warm-up steps."""
        if self.warmup >= 1:
            return int(self.warmup)
        return 0 if total_steps is None else round(self.warmup * total_steps)


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
    return torch.optim.AdamW(groups, lr=spec.lr, betas=(spec.beta1, spec.beta2), eps=spec.eps)


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
            "trainer.max_steps (or trainer.max_epochs with batches measured in sequences)"
        )
    warmup, total = spec.warmup_steps(total_steps), total_steps or 0
    name: str = spec.schedule
    extra: dict[str, Any] | None = None
    if name == "constant":
        name = "constant_with_warmup"
    elif name == "warmup_stable_decay":
        extra = {"num_decay_steps": max(1, (total - warmup) // 5), "min_lr_ratio": spec.min_lr_ratio}
    elif name == "cosine" and spec.min_lr_ratio:
        name, extra = "cosine_with_min_lr", {"min_lr_rate": spec.min_lr_ratio}
    return get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=extra)
