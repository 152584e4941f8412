"""An untrained tiny Llama whose larger weights make its distribution peaked enough to be told from a uniform one."""

from __future__ import annotations

import torch

from stepkd.models.policy import Policy
from stepkd.models.spec import build_tiny


def tiny_policy(seed: int = 0, dtype: str = "float64", scale: float = 4.0) -> Policy:
    """The model; of weights that are matrices ``scale`` times what they began as."""
    model, tokenizer = build_tiny("tiny-0.1m", seed=seed, dtype=dtype)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(scale)
    return Policy(model, tokenizer)
