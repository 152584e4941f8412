"""Helpers for module tests: one optimiser step of a tiny model with its gradients, and its brute-force twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F

from stepkd.data.batching import BatchPlan
from stepkd.data.collate import MicroBatch, collate
from stepkd.data.encode import Encoder, Example
from stepkd.data.loader import StepLoader
from stepkd.data.templates import get_template
from stepkd.models import Policy, PolicySpec
from stepkd.models.tiny import tiny_tokenizer
from stepkd.modules import OptimizerSpec, SFTModule
from stepkd.steps import get_segmenter
from stepkd.tasks import make_rows

Gradients = dict[str, torch.Tensor]


class Recorder(SFTModule):
    """Keeps the gradients of the last optimiser step (before clipping) and the micro-batch shapes."""

    padding_side = "right"
    pad_to: int | None = None

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.gradients: Gradients = {}
        self.shapes: list[tuple[int, ...]] = []

    def _collate(self, examples: Sequence[Example], *, is_filler: bool = False) -> MicroBatch:
        side: Any = self.padding_side
        return collate(examples, 0, padding_side=side, pad_to=self.pad_to, is_filler=is_filler)

    def loss_terms(self, micro_batch: MicroBatch) -> Any:
        self.shapes.append(tuple(micro_batch.input_ids_BT.shape))
        return super().loss_terms(micro_batch)

    def _clip(self) -> float:
        named = self.model.trainable_parameters()
        self.gradients = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
        return super()._clip()


def quiet_trainer(**settings: Any) -> Trainer:
    """A trainer without files and output."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**defaults, **settings})


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """16 solutions of very different lengths."""
    rows = make_rows("modular:terms=2-9", 16, seed=3)
    return Encoder(tiny_tokenizer(), get_template("task"), get_segmenter("newline")).examples(rows)


@pytest.fixture(scope="session")
def trainer() -> Callable[..., Trainer]:
    """Factory of quiet trainers."""
    return quiet_trainer


@pytest.fixture(scope="session")
def one_step() -> Callable[..., Recorder]:
    """Run one optimiser step of SFT on exactly these examples; returns the module with what it recorded."""

    def run(
        rows: Sequence[Example],
        *,
        dtype: str = "float64",
        padding_side: str = "right",
        pad_to: int | None = None,
        trainer: dict[str, Any] | None = None,
        policy: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Recorder:
        optimizer = settings.pop("optimizer", OptimizerSpec(lr=1e-3, schedule="constant", warmup=0))
        spec: Any = {"path": "tiny-0.1m", "dtype": dtype, **(policy or {})}
        module = Recorder(PolicySpec(**spec), optimizer, **settings)
        module.padding_side, module.pad_to = padding_side, pad_to
        plan = BatchPlan([example.length for example in rows], size=len(rows), shuffle=False)
        quiet_trainer(**(trainer or {})).fit(module, train_dataloaders=StepLoader(rows, plan))
        return module

    return run


@pytest.fixture(scope="session")
def brute_force(examples: list[Example]) -> tuple[float, Gradients]:
    """Loss and gradients from plain logits, one unpadded row at a time, divided by the number of completion tokens."""
    policy = Policy.load(PolicySpec(path="tiny-0.1m", dtype="float64"))
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        ids = torch.tensor([[*example.prompt_ids, *example.completion_ids]])
        logits = policy.model(input_ids=ids).logits[0]
        start = len(example.prompt_ids)
        total = total + F.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum")
    loss = total / sum(len(example.completion_ids) for example in examples)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.fixture(scope="session")
def distance() -> Callable[[Gradients, Gradients], float]:
    """Relative norm of the difference of two sets of gradients, over all parameters at once."""

    def measure(a: Gradients, b: Gradients) -> float:
        assert set(a) == set(b)
        assert a, "no gradients at all"
        gap = sum(float((a[name] - b[name]).norm() ** 2) for name in a) ** 0.5
        return gap / sum(float(b[name].norm() ** 2) for name in b) ** 0.5

    return measure
