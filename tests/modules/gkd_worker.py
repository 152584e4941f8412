"""What the tests of distillation share with the processes that they start: data, a module that records, one run.

As a script it is one rank of a data-parallel run: arguments are the output file and the number of rows.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from lightning.pytorch import Trainer

from stepkd.data.batching import BatchPlan, StepLoader
from stepkd.data.collate import collate
from stepkd.data.completion import Completion
from stepkd.data.encode import Encoder
from stepkd.data.templates import get_template
from stepkd.models.spec import PolicyConfig, tiny_tokenizer
from stepkd.modules.gkd import GKDModule
from stepkd.modules.gkd_settings import JSD, ReverseKL, SourceConfig
from stepkd.modules.optim import OptimizerConfig
from stepkd.runs.launcher import check_launch, trainer_defaults
from stepkd.sampling.engine import SamplingConfig
from stepkd.steps.segment import get_segmenter
from stepkd.tasks.rows import Noise, make_rows
from stepkd.teachers.config import Local

STEADY = OptimizerConfig(lr=1e-3, schedule="constant", warmup=0)
POLICY: dict[str, Any] = {"path": "tiny-0.1m", "dtype": "float64", "init_seed": 7}
TEACHER = Local("tiny-0.5m", dtype="float64")
"""Wider than the student."""
DATA = SourceConfig(lmbda=0.0)
OWN = SourceConfig(lmbda=1.0, sampling=SamplingConfig(max_new_tokens=12))


def examples(count: int = 8) -> list[Completion]:
    """Solutions of very different lengths."""
    rows = make_rows("modular:terms=2-9", count, seed=3)
    return Encoder(tiny_tokenizer(), get_template("task"), get_segmenter("newline")).examples(rows)


def noisy_examples(count: int = 8) -> list[Completion]:
    """Solutions of which some have incorrect steps."""
    rows = make_rows("modular:terms=2-6", count, seed=3, noise=Noise(rate=0.3))
    return Encoder(tiny_tokenizer(), get_template("task"), get_segmenter("newline")).examples(rows)


class GKD(GKDModule):
    """Keeps the gradients of the last optimiser step (before clipping), what it sampled, and the micro-batch shapes."""

    layout: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.gradients: dict[str, torch.Tensor] = {}
        self.shapes: list[tuple[int, ...]] = []
        self.written: list[dict[str, tuple[int, ...]]] = []
        self.drawn: list[str] = []

    def _collate(self, examples: Any, *, is_dummy: bool = False) -> Any:
        return collate(examples, 0, is_dummy=is_dummy, **self.layout)

    def draw_source(self) -> Any:
        self.drawn.append(super().draw_source())
        return self.drawn[-1]

    def sample(self, batch: Any, source: Any) -> Any:
        found = super().sample(batch, source)
        self.written.append({example.id: tuple(example.token_ids.tolist()) for example in found})
        return found

    def loss_terms(self, micro_batch: Any) -> Any:
        self.shapes.append(tuple(micro_batch.input_ids_BT.shape))
        return super().loss_terms(micro_batch)

    def _clip(self) -> float:
        named = self.model.trainable_parameters()
        self.gradients = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
        return super()._clip()


def run(
    rows: list[Completion],
    *,
    steps: int = 1,
    size: int | None = None,
    layout: dict[str, Any] | None = None,
    **settings: Any,
) -> GKD:
    """Optimiser steps on exactly these examples, all of them in every batch unless ``size`` says otherwise."""
    policy = PolicyConfig(**{**POLICY, **settings.pop("policy", {})})
    module = GKD(policy, **{"teacher": TEACHER, "source": DATA, "optimizer": STEADY, **settings})
    module.layout = layout or {}
    info = check_launch(os.environ, {})
    trainer = Trainer(
        **{**trainer_defaults(info), "accelerator": "cpu"},
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    plan = BatchPlan([e.size for e in rows], size=size or len(rows), shuffle=True, seed=1)
    loader = StepLoader(rows, plan, rank=info.rank, world_size=info.world_size, position=lambda: module.position)
    trainer.fit(module, train_dataloaders=loader)
    return module


def facts(module: GKD) -> dict[str, Any]:
    """What a run left."""
    metrics = module.trainer.callback_metrics
    return {
        "world": module.trainer.world_size,
        "gradients": module.gradients,
        "metrics": {name: float(value) for name, value in metrics.items() if name.startswith("train/")},
        "written": module.written,
    }


def main(out: str, num_rows: int) -> None:
    """Given completions and sampled ones, over the ranks of this launch."""
    rows, results = examples(num_rows), {}
    for name, settings in (
        ("data", {"divergence": JSD(beta=0.3)}),
        ("own", {"source": OWN, "divergence": ReverseKL(), "average": "sequences"}),
    ):
        module = run(rows, steps=2, micro_batch_tokens=120, chunk_size=5, **settings)
        results[name] = facts(module)
        torch.save(results, f"{out}.{module.global_rank}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]))
