"""KTO and DPO are TRL's: loss, rewards, KL and gradients on the same ids and weights.

TRL 1.16 has no label smoothing in its sigmoid loss, so that ours is compared with a brute force only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from stepkd.data.batching import BatchPlan, StepLoader
from stepkd.data.completion import Completion
from stepkd.data.feedback import PairExample
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig, build_tiny
from stepkd.modules.dpo import IPO, DPOModule, Sigmoid
from stepkd.modules.kto import KTOModule, ReferencePointConfig
from stepkd.modules.optim import OptimizerConfig
from stepkd.modules.preference import ReferenceConfig
from stepkd.tasks.rows import Noise, make_rows

TINY = {"path": "tiny-0.1m", "dtype": "float64", "init_seed": 7}
BETA = 0.3
COUNT = 6
NOISE = 1e-5
"""TRL's head sums log-probabilities of about -100 in float32, whatever the weights' dtype."""


def rows() -> list[dict[str, Any]]:
    return make_rows("modular:terms=2-5", COUNT, seed=11, noise=Noise(rate=0.4, seed=2))


def peer(trainer_class: Any, config: Any, data: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """A TRL trainer on the policy and the reference of these tests, and its first batch."""
    from stepkd.models.spec import tiny_tokenizer

    trainer = trainer_class(
        model=build_tiny("tiny-0.1m", seed=7, dtype="float64")[0],
        ref_model=build_tiny("tiny-0.1m", seed=0, dtype="float64")[0],
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=tiny_tokenizer(),
    )
    trainer.model.train()
    return trainer, next(iter(trainer.get_train_dataloader()))


def settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": COUNT,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "beta": BETA,
        "max_length": 256,
        "disable_dropout": True,
        "activation_checkpointing": False,
    }


def gradients_of(trainer: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    grads = {f"model.{name}": p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss), grads, {name: sum(v) / len(v) for name, v in trainer._metrics["train"].items()}


def split(ids: torch.Tensor, mask: torch.Tensor, attention: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompt and completion ids of a row of TRL's batch."""
    kept = attention.bool()
    return tuple(ids[kept & ~mask.bool()].tolist()), tuple(ids[kept & mask.bool()].tolist())


def ours(module: Any, examples: list[Any], trainer: Callable[..., Any]) -> Any:
    grads: dict[str, torch.Tensor] = {}
    clip = type(module)._clip

    def record() -> float:
        grads.update({n: p.grad.detach().clone() for n, p in module.model.trainable_parameters() if p.grad is not None})
        return clip(module)

    module._clip = record
    plan = BatchPlan([example.size for example in examples], size=len(examples), shuffle=False)
    trainer().fit(module, train_dataloaders=StepLoader(examples, plan))
    return {name.removeprefix("model."): value for name, value in grads.items()}


@pytest.mark.parametrize("points", ["mismatch", "zero"])
def test_kto(points: str, trainer: Any, distance: Callable[..., float], tmp_path: Path) -> None:
    from trl import KTOConfig, KTOTrainer

    data = [{"prompt": row["prompt"], "completion": row["solution"], "label": row["outcome"]} for row in rows()]
    assert {row["label"] for row in data} == {True, False}
    loss_type = {"mismatch": "kto", "zero": "apo_zero_unpaired"}[points]
    config = KTOConfig(**settings(tmp_path), loss_type=loss_type, desirable_weight=1.5, undesirable_weight=0.75)
    theirs, batch = peer(KTOTrainer, config, data)
    examples = []
    for i, label in enumerate(batch["label"]):
        prompt, completion = split(batch["input_ids"][i], batch["completion_mask"][i], batch["attention_mask"][i])
        examples.append(Completion(np.array(prompt), np.array(completion), id=str(i), outcome=int(label)))
    if points == "mismatch":  # TRL rotates within the rows that its data preparation batched
        for i, example in enumerate(examples):
            _, other = split(batch["KL_input_ids"][i], batch["KL_completion_mask"][i], batch["KL_attention_mask"][i])
            assert tuple(other) == tuple(examples[i - 1].token_ids)
            assert len(example.prompt_ids)
    loss, expected, metrics = gradients_of(theirs, batch)
    module = KTOModule(
        PolicyConfig(**TINY),
        reference=ReferenceConfig(path="tiny-0.1m"),
        beta=BETA,
        class_weights=[1.5, 0.75],
        reference_point=ReferencePointConfig(outcome=points, step="zero", rotation="device"),
        optimizer=OptimizerConfig(lr=1e-9, schedule="constant", warmup=0),
        micro_batch_tokens=150,
    )
    found = ours(module, examples, trainer)
    logged = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    assert distance(found, {name.removeprefix("model."): value for name, value in expected.items()}) < 1e-5
    assert logged["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["train/z0"] == pytest.approx(metrics["kl"], rel=1e-5)
    assert logged["train/reward_correct"] == pytest.approx(metrics["rewards/chosen"], rel=1e-5, abs=NOISE)
    assert logged["train/reward_incorrect"] == pytest.approx(metrics["rewards/rejected"], rel=1e-5, abs=NOISE)
    assert logged["train/margin"] == pytest.approx(metrics["rewards/margins"], rel=1e-5, abs=NOISE)
    assert (logged["train/z0"] > 0) == (points == "mismatch")


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo(loss_type: str, trainer: Any, distance: Callable[..., float], tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    clean = make_rows("modular:terms=2-5", COUNT, seed=11)
    data = [
        {"prompt": good["prompt"], "chosen": good["solution"], "rejected": bad["solution"][:-2] + "z\n"}
        for good, bad in zip(clean, rows(), strict=True)
    ]
    config = DPOConfig(**settings(tmp_path), loss_type=[loss_type])
    theirs, batch = peer(DPOTrainer, config, data)
    sides = [
        split(batch["input_ids"][i], batch["completion_mask"][i], batch["attention_mask"][i]) for i in range(2 * COUNT)
    ]
    pairs = [
        PairExample(
            sides[i][0],
            sides[i][1],
            id=str(i),
            rejected=Completion(sides[i][0], sides[COUNT + i][1]),
        )
        for i in range(COUNT)
    ]
    loss, expected, metrics = gradients_of(theirs, batch)
    module = DPOModule(
        PolicyConfig(**TINY),
        reference=ReferenceConfig(path="tiny-0.1m"),
        beta=BETA,
        loss={"sigmoid": Sigmoid, "ipo": IPO}[loss_type](),
        length_normalised=loss_type == "ipo",  # TRL's IPO averages over tokens
        optimizer=OptimizerConfig(lr=1e-9, schedule="constant", warmup=0),
        micro_batch_tokens=200,
    )
    found = ours(module, pairs, trainer)
    logged = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    assert distance(found, {name.removeprefix("model."): value for name, value in expected.items()}) < 1e-5
    assert logged["train/loss"] == pytest.approx(loss, rel=1e-5)
    if loss_type != "ipo":  # whose rewards TRL does not average
        assert logged["train/reward_chosen"] == pytest.approx(metrics["rewards/chosen"], rel=1e-5, abs=NOISE)
        assert logged["train/reward_rejected"] == pytest.approx(metrics["rewards/rejected"], rel=1e-5, abs=NOISE)


def test_the_policies_compared_are_the_same() -> None:
    model = build_tiny("tiny-0.1m", seed=7, dtype="float64")[0]
    policy = Policy.load(PolicyConfig(**TINY))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), policy.model.parameters(), strict=True))
