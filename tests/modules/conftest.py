"""Helpers for module tests: one optimiser step of a tiny model with its gradients, and its brute-force twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F

from stepkd.data.batching import BatchPlan, StepLoader
from stepkd.data.collate import Batch, collate
from stepkd.data.completion import Completion
from stepkd.data.encode import Encoder, LabelRule
from stepkd.data.step_encode import StepEncoder
from stepkd.data.templates import get_template
from stepkd.models.policy import Policy
from stepkd.models.spec import LabelTokens, PolicyConfig, StepHeadConfig, tiny_tokenizer
from stepkd.models.step_head import resolve_ids
from stepkd.modules.base import StepModule
from stepkd.modules.optim import OptimizerConfig
from stepkd.modules.prm import PRMModule
from stepkd.modules.sft import SFTModule
from stepkd.steps.segment import get_segmenter
from stepkd.tasks.rows import Noise, make_rows

Gradients = dict[str, torch.Tensor]
STEADY = OptimizerConfig(lr=1e-3, schedule="constant", warmup=0)


class Recording(StepModule):
    """Keeps the gradients of the last optimiser step (before clipping) and the micro-batch shapes."""

    padding_side = "right"
    pad_to: int | None = None

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.gradients: Gradients = {}
        self.shapes: list[tuple[int, ...]] = []

    def _collate(self, examples: Sequence[Completion], *, is_dummy: bool = False) -> Batch:
        side: Any = self.padding_side
        return collate(examples, 0, padding_side=side, pad_to=self.pad_to, is_dummy=is_dummy)

    def loss_terms(self, micro_batch: Batch) -> Any:
        self.shapes.append(tuple(micro_batch.input_ids_BT.shape))
        return super().loss_terms(micro_batch)

    def _clip(self) -> float:
        named = self.model.trainable_parameters()
        self.gradients = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
        return super()._clip()


class Recorder(Recording, SFTModule):
    """For SFT."""


class PRMRecorder(Recording, PRMModule):
    """For reward models."""


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
def examples() -> list[Completion]:
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
        rows: Sequence[Completion],
        *,
        dtype: str = "float64",
        padding_side: str = "right",
        pad_to: int | None = None,
        trainer: dict[str, Any] | None = None,
        policy: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Recorder:
        optimizer = settings.pop("optimizer", STEADY)
        spec: Any = {"path": "tiny-0.1m", "dtype": dtype, **(policy or {})}
        module = Recorder(PolicyConfig(**spec), optimizer, **settings)
        module.padding_side, module.pad_to = padding_side, pad_to
        plan = BatchPlan([example.size for example in rows], size=len(rows), shuffle=False)
        quiet_trainer(**(trainer or {})).fit(module, train_dataloaders=StepLoader(rows, plan))
        return module

    return run


@pytest.fixture(scope="session")
def brute_force(examples: list[Completion]) -> tuple[float, Gradients]:
    """Loss and gradients from plain logits, one unpadded row at a time, divided by the number of completion tokens."""
    policy = Policy.load(PolicyConfig(path="tiny-0.1m", dtype="float64"))
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        ids = torch.tensor([[*example.prompt_ids, *example.token_ids]])
        logits = policy.model(input_ids=ids).logits[0]
        start = len(example.prompt_ids)
        total = total + F.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum")
    loss = total / sum(len(example.token_ids) for example in examples)
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


# ---- reward models --------------------------------------------------------------------------------------------------


def encode_steps(head: StepHeadConfig, count: int = 16, rule: LabelRule | None = None, **columns: Any) -> list[Any]:
    """Solutions of very different lengths with correct and incorrect steps; a column is a function of these labels."""
    tokenizer = tiny_tokenizer()
    encoder = StepEncoder(
        tokenizer,
        get_template("task"),
        format=head.format,
        marker_id=resolve_ids(head, tokenizer).marker,
        num_classes=head.num_classes,
        labels=rule or LabelRule(after_error="keep"),
    )
    rows = make_rows("modular:terms=2-6", count, seed=3, noise=Noise(rate=0.3))
    for row in rows:
        row.update({name: make(row["step_labels"]) for name, make in columns.items()})
    return encoder.examples(rows)


def fresh_policy(head: StepHeadConfig, **settings: Any) -> Policy:
    """An untrained reward model."""
    policy = Policy.load(PolicyConfig(path="tiny-0.1m", **{"dtype": "float64", **settings}))
    policy.attach_step_head(head)
    return policy


def plain_step_logits(policy: Policy, example: Completion) -> torch.Tensor:
    """Class logits at every step of one unpadded row, without any of the code under test.

    Over the whole vocabulary they are log-probabilities, which a softmax over the labels alone would change.
    """
    ids = torch.tensor([[*example.prompt_ids, *example.token_ids]])
    at = torch.tensor(example.read_at) + len(example.prompt_ids)
    head = policy.require_step_head()
    if head.score is not None:
        scores: torch.Tensor = head.score(policy.model.model(input_ids=ids).last_hidden_state[0, at])
        return scores
    logits = policy.model(input_ids=ids).logits[0, at]
    labels = [policy.tokenizer.convert_tokens_to_ids(token) for token in head.spec.labels]
    return logits[:, labels] if head.spec.restricted else logits.log_softmax(-1)[:, labels]


@pytest.fixture(scope="session")
def encoded() -> Callable[..., list[Any]]:
    """:func:`encode_steps`."""
    return encode_steps


@pytest.fixture(scope="session")
def fresh() -> Callable[..., Policy]:
    """:func:`fresh_policy`."""
    return fresh_policy


@pytest.fixture(scope="session")
def plain_logits() -> Callable[..., torch.Tensor]:
    """:func:`plain_step_logits`."""
    return plain_step_logits


@pytest.fixture(scope="session")
def scored() -> Callable[..., torch.Tensor]:
    """Scores of all labelled steps under a policy."""

    def run(policy: Policy, examples: Sequence[Completion]) -> torch.Tensor:
        policy.eval()
        batch = collate(examples, 0)
        with torch.no_grad():
            hidden_NH = policy.hidden(batch.input_ids_BT, batch.attention_mask_BT).flatten(0, 1)
            return policy.step_scores(hidden_NH[batch.read_L])

    return run


@pytest.fixture(scope="session")
def prm_step() -> Callable[..., PRMRecorder]:
    """Run optimiser steps of a reward model on exactly these examples."""

    def run(
        examples: Sequence[Any], head: StepHeadConfig | None = None, *, steps: int = 1, **settings: Any
    ) -> PRMRecorder:
        sides = {name: settings.pop(name) for name in ("padding_side", "pad_to") if name in settings}
        spec: Any = {"path": "tiny-0.1m", "dtype": settings.pop("dtype", "float64"), **settings.pop("policy", {})}
        module = PRMRecorder(PolicyConfig(**spec), head or LabelTokens(), **{"optimizer": STEADY, **settings})
        for name, value in sides.items():
            setattr(module, name, value)
        plan = BatchPlan([example.size for example in examples], size=len(examples), shuffle=False)
        quiet_trainer(max_steps=steps).fit(module, train_dataloaders=StepLoader(examples, plan))
        return module

    return run


@pytest.fixture(scope="session")
def brute_force_steps() -> Callable[..., tuple[float, Gradients]]:
    """Loss and gradients from plain logits, one unpadded row at a time, divided by the number of labelled steps."""

    def run(head: StepHeadConfig, examples: Sequence[Completion]) -> tuple[float, Gradients]:
        policy = fresh_policy(head)
        total, count = torch.zeros((), dtype=torch.float64), 0
        for example in examples:
            logits = plain_step_logits(policy, example)
            whole_vocabulary = head.kind == "label_tokens" and not head.restricted
            for row, target in zip(
                logits if whole_vocabulary else logits.log_softmax(-1), example.targets, strict=True
            ):
                if target is not None:
                    total = total - sum(t * value for t, value in zip(target, row, strict=True))
                    count += 1
        loss = total / count
        loss.backward()
        return float(loss.detach()), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}

    return run
