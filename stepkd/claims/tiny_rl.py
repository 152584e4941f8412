"""Tiny policies trained on rewards, with or without a teacher: what the quick start and the claims share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepkd.claims.tiny import NEW_TOKENS, fit_and_export, tiny_data

PROMPTS, GROUP = 32, 8
"""Prompts per optimiser step, and completions of each."""


def train_tiny_rl(
    folder: Path,
    *,
    start: str | Path,
    teacher: str | Path | None,
    task: str,
    demonstrations: int,
    steps: int,
    lr: float,
    seed: int,
    kd: Mapping[str, Any] | None = None,
    policy_loss: Mapping[str, Any] | None = None,
    step_credit: Mapping[str, Any] | None = None,
    max_new_tokens: int = NEW_TOKENS,
    progress: bool = False,
    reuse: bool = False,
) -> Path:
    """Train a tiny policy by GRPO, on-policy distillation or KDRL, on the CPU, and export it.

    Args:
        folder: where the run's metrics and model go; made when missing.
        start: folder of the model to go on from.
        teacher: folder of the teacher; None: rewards alone.
        task: tiny-world task with its settings.
        demonstrations: different problems in the training set.
        steps: optimiser steps of 32 prompts with 8 completions each.
        lr: peak learning rate (constant after 10% warm-up).
        seed: seed of data, order and sampling.
        kd, policy_loss, step_credit: fields of :class:`stepkd.modules.KDSpec`, ``PolicyLossSpec``, ``StepCreditSpec``.
        max_new_tokens: longest sampled completion.
        progress: print the reward while training.
        reuse: return the model that an earlier call left in ``folder``, if it is whole.

    Returns:
        The exported model folder, ``folder/model``.
    """
    model = folder / "model"
    if reuse and model.is_dir():
        return model
    from stepkd.models import PolicySpec
    from stepkd.modules import KDRLModule, KDSpec, OptimizerSpec, PolicyLossSpec, RolloutSpec, StepCreditSpec
    from stepkd.teachers import TeacherSpec

    data = tiny_data(task, demonstrations, seed, batch=PROMPTS)
    module = KDRLModule(
        PolicySpec(path=str(start)),
        teacher=None if teacher is None else TeacherSpec(path=str(teacher)),
        rollout=RolloutSpec(group_size=GROUP, max_new_tokens=max_new_tokens, max_rows=PROMPTS * GROUP),
        policy_loss=PolicyLossSpec(**(policy_loss or {})),
        kd=KDSpec(**(kd or {})),
        step_credit=None if step_credit is None else StepCreditSpec(**step_credit),
        optimizer=OptimizerSpec(lr=lr, schedule="constant", warmup=0.1),
        micro_batch_tokens=16_384,
        seed=seed,
    )
    return fit_and_export(folder, module, data, steps=steps, progress=progress)
