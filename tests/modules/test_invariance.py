"""The SFT loss and gradient are those of plain logits, whatever the padding, micro-batch split or chunk size."""

from __future__ import annotations

from typing import Any

import pytest

from stepkd.data.batching import micro_batches
from stepkd.models.spec import LoRAConfig

TOLERANCE = 1e-10  # float64, relative norm


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding_side": "left"},
        {"pad_to": 200},
        {"padding_side": "left", "pad_to": 173},
        {"chunk_size": 1},
        {"chunk_size": 7},
        {"chunk_size": 100_000},
    ],
    ids=str,
)
def test_padding_and_chunks(
    settings: dict[str, Any], examples: Any, one_step: Any, brute_force: Any, distance: Any
) -> None:
    module = one_step(examples, micro_batch_tokens=100_000, **settings)
    assert distance(module.gradients, brute_force[1]) < TOLERANCE
    logged = module.trainer.callback_metrics
    assert float(logged["train/ce"]) == pytest.approx(brute_force[0], rel=1e-6)  # logged in float32
    assert float(logged["train/loss"]) == float(logged["train/ce"])


@pytest.mark.parametrize("parts", [1, 2, 4, 8, 16])
def test_micro_batch_split(parts: int, examples: Any, one_step: Any, brute_force: Any, distance: Any) -> None:
    lengths = [example.length for example in examples]
    budget = next(tokens for tokens in range(1, 10_000) if len(micro_batches(lengths, tokens)) <= parts)
    module = one_step(examples, micro_batch_tokens=budget)
    assert len(module.shapes) == len(micro_batches(lengths, budget))
    assert parts // 2 < len(module.shapes) <= parts
    assert distance(module.gradients, brute_force[1]) < TOLERANCE


def test_order_of_the_rows_does_not_matter(examples: Any, one_step: Any, brute_force: Any, distance: Any) -> None:
    module = one_step(examples[::-1], micro_batch_tokens=300)
    assert distance(module.gradients, brute_force[1]) < TOLERANCE


def test_gradient_checkpointing_changes_nothing(examples: Any, one_step: Any, brute_force: Any, distance: Any) -> None:
    module = one_step(examples, policy={"gradient_checkpointing": True}, micro_batch_tokens=500)
    assert distance(module.gradients, brute_force[1]) < TOLERANCE


def test_lora_gradients_do_not_depend_on_the_split(examples: Any, one_step: Any, distance: Any) -> None:
    # The head is adapted too, which covers LoRA in the chunked, recomputed head.
    policy = {"lora": LoRAConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"])}
    whole = one_step(examples, policy=policy, micro_batch_tokens=100_000, chunk_size=100_000)
    split = one_step(examples, policy=policy, micro_batch_tokens=200, chunk_size=5)
    assert all("lora" in name for name in whole.gradients)
    assert any("lm_head" in name for name in whole.gradients)
    assert len(split.shapes) > len(whole.shapes)
    assert distance(split.gradients, whole.gradients) < TOLERANCE


def test_float32_stays_within_its_precision(examples: Any, one_step: Any, brute_force: Any, distance: Any) -> None:
    module = one_step(examples, dtype="float32", micro_batch_tokens=300, chunk_size=11)
    gradients = {name: value.double() for name, value in module.gradients.items()}
    assert distance(gradients, brute_force[1]) < 1e-5
