"""One rank of a data-parallel run of two optimiser steps; rank 0 writes losses and final weights.

Started by test_distributed.py through torchrun, accelerate, or plainly. Arguments: output file, number of
rows, and optionally the number of a row whose loss is infinite (with finite gradients, on one rank only).
"""

from __future__ import annotations

import os
import sys

import torch
from lightning.pytorch import Trainer

from stepkd.data.batching import BatchPlan
from stepkd.data.collate import MicroBatch
from stepkd.data.encode import Encoder
from stepkd.data.loader import StepLoader
from stepkd.data.templates import get_template
from stepkd.errors import TrainingError
from stepkd.launch import check_launch, trainer_defaults
from stepkd.losses import LossTerms
from stepkd.models import PolicySpec
from stepkd.models.tiny import tiny_tokenizer
from stepkd.modules import OptimizerSpec, SFTModule
from stepkd.steps import get_segmenter
from stepkd.tasks import make_rows


class Recorder(SFTModule):
    poison = ""

    def loss_terms(self, micro_batch: MicroBatch) -> LossTerms:
        terms = super().loss_terms(micro_batch)
        if self.poison in micro_batch.ids:
            terms.sums["ce"] = terms.sums["ce"] + float("inf")
        return terms

    def _clip(self) -> float:
        self.gradients = {n: p.grad.detach().clone() for n, p in self.model.trainable_parameters()}
        return super()._clip()


def main(out: str, num_rows: int, poison: int | None = None) -> None:
    torch.set_num_threads(1)
    rows = make_rows("modular:terms=2-9", num_rows, seed=5)
    examples = Encoder(tiny_tokenizer(), get_template("task"), get_segmenter("newline")).examples(rows)
    info = check_launch(os.environ, {})
    module = Recorder(
        PolicySpec(path="tiny-0.1m", dtype="float64"),
        OptimizerSpec(lr=1e-3, schedule="constant", warmup=0),
        micro_batch_tokens=150,
    )
    if poison is not None:
        module.poison = examples[poison].id
    trainer = Trainer(
        **{**trainer_defaults(info), "accelerator": "cpu"},
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    plan = BatchPlan([e.length for e in examples], size=len(examples), shuffle=True, seed=1)
    loader = StepLoader(examples, plan, rank=info.rank, world_size=info.world_size, position=lambda: module.position)
    try:
        trainer.fit(module, train_dataloaders=loader)
    except TrainingError as error:
        os.write(1, f"RANK {info.rank} STOPPED: {error}\n".encode())  # in one piece
        return
    if trainer.is_global_zero:
        torch.save(
            {
                "world": trainer.world_size,
                "loss": float(trainer.callback_metrics["train/loss"]),
                "tokens": float(trainer.callback_metrics["train/tokens"]),
                "gradients": module.gradients,
                "weights": {n: p.detach() for n, p in module.model.trainable_parameters()},
            },
            out,
        )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
