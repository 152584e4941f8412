"""A tiny policy whose scores differ from step to step, and problems of mixed lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stepkd.models.policy import Policy
from stepkd.models.spec import StepHeadConfig, build_tiny
from stepkd.scorers.scorer import Solutions


@torch.no_grad()
def sharpen(model: Any) -> Any:
    """Larger weights make what an untrained model says depend on what it reads."""
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.mul_(6)
    return model


def sharp_policy(head: StepHeadConfig | None = None, *, dtype: str = "float64") -> Policy:
    model, tokenizer = build_tiny("tiny-0.1m", seed=0, dtype=dtype)
    policy = Policy(sharpen(model), tokenizer)
    if head is not None:
        policy.attach_step_head(head, seed=1)
    return policy


@pytest.fixture(scope="session")
def make_policy() -> Callable[..., Policy]:
    """``make_policy(head)``: tiny-0.1m in float64 with a step head."""
    return sharp_policy


@pytest.fixture(scope="session")
def sharpened() -> Callable[[Any], Any]:
    """Makes an untrained model's outputs depend on its inputs, in place."""
    return sharpen


@pytest.fixture(scope="session")
def tokens_read() -> Callable[[Policy], Callable[[], int]]:
    """``tokens_read(policy)()``: tokens that the model has read since the last call, without padding."""

    def watch(policy: Policy) -> Callable[[], int]:
        read = [0]

        def count(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
            read[0] += int((keywords["input_ids"] != policy.tokenizer.pad_token_id).sum())

        def since() -> int:
            found, read[0] = read[0], 0
            return found

        policy.causal_lm.base_model.register_forward_pre_hook(count, with_kwargs=True)
        return since

    return watch


@pytest.fixture(scope="session")
def problems() -> list[Solutions]:
    """Five problems: prompts of 2 to 49 tokens, one of them twice, with 1 to 7 solutions of 1 to 5 steps."""
    prompts = ["1+2=", "a longer prompt than the others, twice: 17*3+4-2=?", "7x", "how many ducks", "7x"]
    counts = [3, 7, 1, 2, 2]
    return [
        Solutions(
            {"id": f"p{p}", "prompt": prompt},
            [[f"{p}{s}: {'ab ' * (k + s)}{k}" + "\n" * (k % 2) for k in range(1 + (p + s) % 5)] for s in range(count)],
        )
        for p, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
    ]
