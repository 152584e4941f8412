"""Rows of two teachers, and one run of GKD on them; as a script it is one rank of it, and the argument the output."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from stepkd.data.batching import BatchPlan, StepLoader
from stepkd.models.sharding import whole_tensor
from stepkd.models.spec import PolicyConfig
from stepkd.runs.launcher import check_launch, trainer_defaults
from stepkd.teachers.config import Local, Routed
from stepkd.training.sharded import FSDP2Strategy


def _script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gkd, kdrl = _script("gkd_worker"), _script("kdrl_worker")
WIDE, NARROW = Local("tiny-0.5m", dtype="float64"), Local("tiny-0.1m", dtype="float64")


def routed_examples(count: int, names: Sequence[str]) -> list[Any]:
    """Solutions of very different lengths, whose rows name teachers in turn."""
    found = gkd.examples(count)
    return [replace(each, row={**each.row, "teacher": names[i % len(names)]}) for i, each in enumerate(found)]


class Recorded(gkd.GKD):  # type: ignore[misc]
    """Keeps whole gradients, and whose rows it read."""

    seen: set[str]

    def loss_terms(self, micro_batch: Any) -> Any:
        if not micro_batch.is_dummy:
            self.seen |= {each.row["teacher"] for each in micro_batch.examples}
        return super().loss_terms(micro_batch)

    def _clip(self) -> float:
        named = self.model.trainable_parameters()
        self.gradients = {n: whole_tensor(p.grad.detach()).clone() for n, p in named if p.grad is not None}
        return super(gkd.GKD, self)._clip()


def run() -> Any:
    """One optimiser step on two rows, each of another teacher."""
    info, cut = check_launch(os.environ, {}), os.environ.get("STRATEGY") == "fsdp2"
    teachers = {"math": replace(WIDE, sharded=cut), "code": replace(NARROW, sharded=cut)}
    module = Recorded(PolicyConfig(**gkd.POLICY), Routed(teachers), source=gkd.DATA, optimizer=gkd.STEADY)
    module.seen = set()
    trainer = Trainer(
        **{**trainer_defaults(info), "accelerator": "cpu"},
        strategy=FSDP2Strategy() if cut else "auto",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = routed_examples(2, ("math", "code"))
    plan = BatchPlan([each.size for each in rows], size=2, shuffle=False)
    loader = StepLoader(rows, plan, rank=info.rank, world_size=info.world_size, position=lambda: module.position)
    trainer.fit(module, train_dataloaders=loader)
    return module


if __name__ == "__main__":
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    LlamaRMSNorm.forward = kdrl.full_precision_norm
    torch.set_num_threads(1)
    done = run()
    torch.save({"gradients": done.gradients, "teachers": sorted(done.seen)}, f"{sys.argv[1]}.{done.global_rank}")
