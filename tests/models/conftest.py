"""A model folder as users have them on disk, and random models of many architectures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepkd.models.policy import Policy
from stepkd.models.spec import build_tiny, tiny_tokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"num_key_value_heads": 2}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole transformers folder with tied weights: tiny-0.1m, seed 3."""
    return save_tiny(tmp_path / "model")


def save_tiny(path: Path, *, seed: int = 3) -> Path:
    """Write a tiny model and its tokenizer."""
    model, tokenizer = build_tiny("tiny-0.1m", seed=seed)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _config(name: str) -> Any:
    """A random model of an architecture; wide weights, so that attention is far from uniform."""
    import transformers

    made: dict[str, Any] = {
        "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
        "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128),
        "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=None),
        "qwen2, windows": lambda: transformers.Qwen2Config(
            **GROUPED, use_sliding_window=True, sliding_window=8, max_window_layers=1
        ),
        "mistral, windows": lambda: transformers.MistralConfig(**GROUPED, sliding_window=64),
        "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=64),
        "gpt-neo": lambda: transformers.GPTNeoConfig(
            hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=64
        ),
        "falcon, alibi": lambda: transformers.FalconConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
        ),
        "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4),
        "mamba": lambda: transformers.MambaConfig(hidden_size=32, num_hidden_layers=2),
    }
    settings = made[name]()
    tokens = tiny_tokenizer()
    settings.update({"vocab_size": len(tokens), "initializer_range": 0.2, "use_cache": False})
    settings.update({f"{kind}_token_id": getattr(tokens, f"{kind}_token_id") for kind in ("bos", "eos", "pad")})
    return settings


@cache
def _policy_of(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Policy:
    import transformers

    if name.startswith("tiny"):
        model, tokenizer = build_tiny(name, seed=0, dtype=str(dtype).removeprefix("torch."))
        model.set_attn_implementation(attention)
        with torch.no_grad():  # fresh weights attend to everything alike
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.dim() > 1 else 1)
        return Policy(in_double(model, dtype), tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(_config(name), attn_implementation=attention)
    return Policy(in_double(made.to(dtype).eval(), dtype), tiny_tokenizer(), verify_head=False)


def in_double(model: Any, dtype: torch.dtype) -> Any:
    """RMSNorm in float64 where the weights are: transformers rounds to float32 in it.

    A prompt's gradient is rounded once in a packed row and once per completion in rows of their own.
    """
    for norm in model.modules():
        if dtype == torch.float64 and type(norm).__name__.endswith("RMSNorm"):
            norm.forward = partial(_rms_norm, norm)
    return model


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def _close(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float64) -> None:
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    assert float((a - b).detach().norm()) <= TOLERANCE[dtype] * float(b.detach().norm())


@pytest.fixture
def policy_of() -> Callable[..., Policy]:
    """Makes the random model of an architecture, once: name, attention, dtype."""
    return _policy_of


@pytest.fixture
def close() -> Callable[..., None]:
    """Asserts that two tensors are equal but for rounding."""
    return _close
