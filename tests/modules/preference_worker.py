"""What the tests of preference modules share with the processes that they start: data, modules that record, one run.

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
from stepkd.data.feedback import FeedbackEncoder, PairEncoder
from stepkd.data.templates import get_template
from stepkd.models.spec import PolicyConfig, tiny_tokenizer
from stepkd.modules.dpo import DPOModule
from stepkd.modules.kto import KTOModule, ReferencePointConfig, StepKTOModule
from stepkd.modules.optim import OptimizerConfig
from stepkd.modules.preference import PreferenceModule, ReferenceConfig
from stepkd.runs.launcher import check_launch, trainer_defaults
from stepkd.steps.segment import get_segmenter
from stepkd.tasks.rows import Noise, make_rows

STEADY = OptimizerConfig(lr=1e-3, schedule="constant", warmup=0)
POLICY: dict[str, Any] = {"path": "tiny-0.1m", "dtype": "float64", "init_seed": 7}
OTHER = ReferenceConfig(path="tiny-0.1m")
"""A reference with other random weights than :data:`POLICY`, so that no log-ratio is zero."""


def full_precision_norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Llama's norm without its cast to float32.

    The cast comes whatever the weights' dtype. Gradients that are added before it (those of a prompt that several
    completions share) round otherwise than gradients that are added after it, to about 3e-8; without it, what the tests
    see is the packing alone.
    """
    return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def solutions(count: int = 8) -> list[dict[str, Any]]:
    """Two noisy solutions of every problem."""
    rows = []
    for k in range(2):
        for row in make_rows("modular:terms=2-5", count, seed=3, noise=Noise(rate=0.3, seed=k, kind="systematic")):
            rows.append({**row, "id": f"{row['id']}/{k}"})
    return rows


def feedback_examples(count: int = 8) -> list[Any]:
    """Completions with outcomes and step labels, some unlabelled."""
    rows = solutions(count)
    rows[1]["step_labels"] = [None] * len(rows[1]["step_labels"])
    rows[2].pop("outcome")
    return FeedbackEncoder(tiny_tokenizer(), get_template("task"), get_segmenter("newline")).examples(rows)


def pair_examples(count: int = 8) -> list[Any]:
    """Pairs of whole solutions, and of next steps after a prefix."""
    rows = solutions(count)
    pairs: list[dict[str, Any]] = []
    for i in range(count):
        a, b = rows[i], rows[count + i]
        if a["solution"] == b["solution"]:
            b = {**b, "solution": a["solution"][:-2] + "7\n", "steps": [*a["steps"][:-1], "#### 7\n"]}
        common = {"prompt": a["prompt"], "chosen_visits": 3 * i, "rejected_visits": i + 1}
        pairs.append({**common, "id": f"whole-{i}", "chosen": a["solution"], "rejected": b["solution"]})
        if a["steps"][-1] != "1\n":
            step = {"prefix": a["steps"][:-1], "chosen": a["steps"][-1], "rejected": "1\n"}
            pairs.append({**common, "id": f"step-{i}", **step})
    return PairEncoder(tiny_tokenizer(), get_template("task"), get_segmenter("newline")).examples(pairs)


class Recording(PreferenceModule):
    """Keeps the gradients of the last optimiser step (before clipping), the points, and the micro-batch shapes."""

    layout: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.gradients: dict[str, torch.Tensor] = {}
        self.shapes: list[tuple[int, ...]] = []
        self.shared = 0

    def _collate(self, examples: Any, *, is_dummy: bool = False) -> Any:
        return collate(examples, 0, share=self.shares_prompts, is_dummy=is_dummy, **self.layout)

    def loss_terms(self, micro_batch: Any) -> Any:
        self.shapes.append(tuple(micro_batch.input_ids_BT.shape))
        self.shared += micro_batch.shared_BT is not None
        return super().loss_terms(micro_batch)

    def _clip(self) -> float:
        named = self.model.trainable_parameters()
        self.gradients = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
        return super()._clip()


class KTO(Recording, KTOModule):
    """Records KTO."""


class StepKTO(Recording, StepKTOModule):
    """Records Step-KTO."""


class DPO(Recording, DPOModule):
    """Records DPO."""


def run(
    kind: type[Any],
    examples: list[Any],
    *,
    steps: int = 1,
    shuffle: bool = False,
    layout: dict[str, Any] | None = None,
    policy: dict[str, Any] | None = None,
    shares: bool = True,
    **settings: Any,
) -> Any:
    """Optimiser steps on exactly these examples, all of them in every batch."""
    defaults: dict[str, Any] = {"reference": OTHER, "optimizer": STEADY}
    module = kind(PolicyConfig(**{**POLICY, **(policy or {})}), **{**defaults, **settings})
    module.layout, module.shares = layout or {}, shares
    info = check_launch(os.environ, {})
    trainer = Trainer(
        **{**trainer_defaults(info), "accelerator": "cpu"},
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    plan = BatchPlan([e.size for e in examples], size=len(examples), shuffle=shuffle, seed=1)
    loader = StepLoader(examples, plan, rank=info.rank, world_size=info.world_size, position=lambda: module.position)
    trainer.fit(module, train_dataloaders=loader)
    return module


WEIGHTS: dict[str, Any] = {"class_weights": [1.5, 1.0]}
STEP_WEIGHTS: dict[str, Any] = {**WEIGHTS, "beta": 0.3, "loss_weights": {"step": 0.7}}


def main(out: str, num_rows: int) -> None:
    """Step-KTO with every kind of point, and DPO, over the ranks of this launch."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    LlamaRMSNorm.forward = full_precision_norm
    rows, results = feedback_examples(8)[:num_rows], {}
    for name, spec in (
        ("mismatch", ReferencePointConfig()),
        ("per_index", ReferencePointConfig(step="per_index")),
        ("batch", ReferencePointConfig(outcome="batch", step="batch")),
    ):
        module = run(StepKTO, rows, steps=2, shuffle=True, reference_point=spec, **STEP_WEIGHTS, micro_batch_tokens=120)
        results[name] = _facts(module) | {"averages": torch.tensor(module._estimator.averages)}
    results["dpo"] = _facts(run(DPO, pair_examples(8)[:num_rows], steps=2, shuffle=True, micro_batch_tokens=120))
    if module.trainer.global_rank == 0:
        torch.save(results, out)


def _facts(module: Any) -> dict[str, Any]:
    metrics = module.trainer.callback_metrics
    return {
        "world": module.trainer.world_size,
        "gradients": module.gradients,
        "metrics": {name: float(value) for name, value in metrics.items() if name.startswith("train/")},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]))
