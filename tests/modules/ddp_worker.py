"""One rank of a data-parallel run of two optimiser steps; rank 0 writes losses and final weights.

Started by test_distributed.py through torchrun, accelerate, or plainly. Arguments: output file, number of
rows, and optionally the number of a row whose loss is infinite (with finite gradients, on one rank only), or
``prm`` for a reward model with either head in place of SFT. In the environment, ``STRATEGY=fsdp2`` cuts it up and
``ADAPT=1`` trains LoRA adapters and computes activations again.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from stepkd.data.batching import BatchPlan, StepLoader
from stepkd.data.collate import Batch
from stepkd.data.encode import Encoder, LabelRule
from stepkd.data.step_encode import StepEncoder
from stepkd.data.templates import get_template
from stepkd.errors import TrainingError
from stepkd.losses import LossTerms
from stepkd.models.sharding import whole_tensor
from stepkd.models.spec import Classifier, LabelTokens, LoRAConfig, PolicyConfig, tiny_tokenizer
from stepkd.models.step_head import resolve_ids
from stepkd.modules.base import StepModule
from stepkd.modules.optim import OptimizerConfig
from stepkd.modules.prm import PQM, PRMModule, StepCrossEntropy
from stepkd.modules.sft import SFTModule
from stepkd.runs.launcher import check_launch, trainer_defaults
from stepkd.runs.process import leave_group
from stepkd.steps.segment import get_segmenter
from stepkd.tasks.rows import Noise, make_rows
from stepkd.training.sharded import FSDP2Strategy

ADAPTED: dict[str, Any] = {"lora": LoRAConfig(r=4), "gradient_checkpointing": True}
TINY = PolicyConfig(path="tiny-0.1m", dtype="float64", **(ADAPTED if os.environ.get("ADAPT") else {}))
STEADY = OptimizerConfig(lr=1e-3, schedule="constant", warmup=0)


class Gradients(StepModule):
    """Keeps the gradients of the last optimiser step, before clipping."""

    def _clip(self) -> float:
        self.gradients = {n: whole_tensor(p.grad.detach()).clone() for n, p in self.model.trainable_parameters()}
        return super()._clip()


class PRMRecorder(Gradients, PRMModule):
    labelled = 0

    def loss_terms(self, micro_batch: Batch) -> LossTerms:
        self.labelled += 0 if micro_batch.is_dummy else len(micro_batch.read_L)
        return super().loss_terms(micro_batch)


class Recorder(Gradients, SFTModule):
    poison = ""
    summed: tuple[bool, ...] = ()

    def loss_terms(self, micro_batch: Batch) -> LossTerms:
        block = [p for name, p in self.model.trainable_parameters() if ".layers.0." in name]
        self.summed += (all(p.grad is not None for p in block),)
        terms = super().loss_terms(micro_batch)
        if self.poison in micro_batch.ids:
            terms.sums["ce"] = terms.sums["ce"] + float("inf")
        return terms


def train_reward_models(out: str, num_rows: int) -> None:
    rows = make_rows("modular:terms=2-9", num_rows, seed=5, noise=Noise(rate=0.3))
    results = {}
    for kind in ("label_tokens", "classifier"):
        head = {"label_tokens": LabelTokens, "classifier": Classifier}[kind]()
        encoder = StepEncoder(
            tiny_tokenizer(),
            get_template("task"),
            format=head.format,
            marker_id=resolve_ids(head, tiny_tokenizer()).marker,
            labels=LabelRule(),
        )
        module = PRMRecorder(
            TINY, head, optimizer=STEADY, losses=[StepCrossEntropy([2.0, 1.0]), PQM()], micro_batch_tokens=150
        )
        result = train(module, encoder.examples(rows))
        labelled = [module.labelled]
        if dist.is_initialized():
            labelled = [0] * dist.get_world_size()
            dist.all_gather_object(labelled, module.labelled)
        results[kind] = result | {"labelled": labelled}
    if results["classifier"]["rank"] == 0:
        torch.save(results, out)


def main(out: str, num_rows: int, poison: int | None = None) -> None:
    rows = make_rows("modular:terms=2-9", num_rows, seed=5)
    examples = Encoder(tiny_tokenizer(), get_template("task"), get_segmenter("newline")).examples(rows)
    module = Recorder(TINY, STEADY, micro_batch_tokens=150)
    if poison is not None:
        module.poison = examples[poison].id
    try:
        result = train(module, examples)
    except TrainingError as error:
        os.write(1, f"RANK {os.environ.get('RANK', 0)} STOPPED: {error}\n".encode())  # in one piece
        return
    if result["rank"] == 0:
        torch.save(result | {"summed": module.summed}, out)


def train(module: Any, examples: list[Any]) -> dict[str, Any]:
    """Two optimiser steps, and what they left."""
    info = check_launch(os.environ, {})
    trainer = Trainer(
        **{**trainer_defaults(info), "accelerator": "cpu"},
        strategy=FSDP2Strategy() if os.environ.get("STRATEGY") == "fsdp2" else "auto",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    plan = BatchPlan([e.size for e in examples], size=len(examples), shuffle=True, seed=1)
    loader = StepLoader(examples, plan, rank=info.rank, world_size=info.world_size, position=lambda: module.position)
    trainer.fit(module, train_dataloaders=loader)
    return {
        "rank": trainer.global_rank,
        "world": trainer.world_size,
        "loss": float(trainer.callback_metrics["train/loss"]),
        "tokens": float(trainer.callback_metrics["train/tokens"]),
        "gradients": module.gradients,
        "weights": {n: whole_tensor(p.detach()) for n, p in module.model.trainable_parameters()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[3:] == ["prm"]:
        train_reward_models(sys.argv[1], int(sys.argv[2]))
    else:
        main(sys.argv[1], *map(int, sys.argv[2:]))
    leave_group()
