"""What the tests of KDRL share with the processes that they start: data, a module that records, one run.

As a script it is one rank of a data-parallel run: arguments are the output file and the number of rows.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from stepkd.data.batching import BatchPlan, StepLoader
from stepkd.data.completion import Completion
from stepkd.data.encode import Encoder
from stepkd.data.templates import get_template
from stepkd.models.spec import PolicyConfig, tiny_tokenizer
from stepkd.modules.kdrl import KDRLModule
from stepkd.modules.kdrl_settings import ExactKL, PolicyLossConfig, RolloutConfig, SampledKL
from stepkd.modules.optim import OptimizerConfig
from stepkd.modules.rewards import RewardConfig
from stepkd.modules.rollouts import Rollout
from stepkd.runs.launcher import check_launch, trainer_defaults
from stepkd.runs.logger import JsonlLogger
from stepkd.sampling.engine import SamplingConfig
from stepkd.steps.segment import get_segmenter
from stepkd.tasks.rows import make_rows
from stepkd.teachers.config import Local

STEADY = OptimizerConfig(lr=1e-3, schedule="constant", warmup=0)
POLICY: dict[str, Any] = {"path": "tiny-0.1m", "dtype": "float64", "init_seed": 7}
TEACHER = Local("tiny-0.5m", dtype="float64")
ROLLOUT = RolloutConfig(SamplingConfig(n=4, max_new_tokens=40))
REWARDS = [
    RewardConfig("length", options={"limit": 20}),
    RewardConfig("format", weight=0.5, options={"pattern": r"\d"}),
]
"""A random model is never correct; these tell its completions apart."""


def examples(count: int = 4) -> list[Completion]:
    """Problems of very different lengths."""
    rows = make_rows("modular:terms=2-9", count, seed=3)
    return Encoder(tiny_tokenizer(), get_template("task"), get_segmenter("newline")).examples(rows)


def full_precision_norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Llama's norm without its cast to float32, before which gradients of a shared prompt are added."""
    return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class KDRL(KDRLModule):
    """Keeps the gradients of every optimiser step (before clipping), and what it learnt from."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.kept: list[list[Rollout]] = []
        self.logged: list[dict[str, float]] = []

    def credit(self, rollouts: Any) -> list[Rollout]:
        self.kept.append(super().credit(rollouts))
        return self.kept[-1]

    def _clip(self) -> float:
        named = self.model.trainable_parameters()
        self.gradients.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})
        return super()._clip()

    def _log_step(self, *args: Any) -> None:
        super()._log_step(*args)
        metrics = self.trainer.callback_metrics
        self.logged.append({k.removeprefix("train/"): float(v) for k, v in metrics.items() if k.startswith("train/")})


def run(
    rows: list[Completion], *, steps: int = 1, size: int | None = None, folder: Path | None = None, **settings: Any
) -> KDRL:
    """Optimiser steps on these examples, all of them in every batch unless ``size`` says otherwise."""
    policy = PolicyConfig(**{**POLICY, **settings.pop("policy", {})})
    common = {"teacher": TEACHER, "rollout": ROLLOUT, "rewards": REWARDS, "optimizer": STEADY}
    module = KDRL(policy, **{**common, **settings})
    info = check_launch(os.environ, {})
    trainer = Trainer(
        **{**trainer_defaults(info), "accelerator": "cpu"},
        max_steps=steps,
        logger=False if folder is None else JsonlLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    plan = BatchPlan([e.size for e in rows], size=size or len(rows), shuffle=True, seed=1)
    loader = StepLoader(rows, plan, rank=info.rank, world_size=info.world_size, position=lambda: module.position)
    trainer.fit(module, train_dataloaders=loader)
    return module


def facts(module: KDRL) -> dict[str, Any]:
    """What a run left."""
    return {
        "gradients": module.gradients,
        "logged": module.logged,
        "written": [{(r.id, i): r.token_ids.tolist() for i, r in enumerate(kept)} for kept in module.kept],
        "world": module.trainer.world_size,
    }


def main(out: str, num_rows: int) -> None:
    """Over the ranks of this launch."""
    rows, results = examples(num_rows), {}
    for name, settings in (
        ("kdrl", {"kd": SampledKL(beta=0.3)}),
        ("dapo", {"kd": ExactKL(beta=0.3), "policy_loss": PolicyLossConfig(normalisation="dapo")}),
    ):
        module = run(rows, steps=2, micro_batch_tokens=120, chunk_size=5, **settings)
        results[name] = facts(module)
        torch.save(results, f"{out}.{module.global_rank}")


if __name__ == "__main__":
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    LlamaRMSNorm.forward = full_precision_norm
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]))
