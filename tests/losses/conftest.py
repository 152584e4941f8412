"""Vocabulary heads of every kind, small and in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stepkd.losses import VocabHead

N, H, V = 7, 6, 11
Made = tuple[VocabHead, Tensor, dict[str, Tensor]]


def make_head(kind: str, dtype: torch.dtype = torch.float64) -> Made:
    """Head, hidden states that require gradients, and every tensor whose gradient counts."""
    torch.manual_seed(0)
    rows = V + 5 if kind in ("padded", "everything") else V
    linear = nn.Linear(H, rows, bias=kind in ("bias", "everything"), dtype=dtype)
    parameters: dict[str, Tensor] = dict(linear.named_parameters())
    if kind == "tied":
        embedding = nn.Embedding(rows, H, dtype=dtype)
        linear.weight = embedding.weight
        parameters = {"embedding": embedding.weight}
        hidden = embedding(torch.arange(N) % V) * 2  # the shared weight gets gradients from both ends
    else:
        hidden = torch.randn(N, H, dtype=dtype, requires_grad=True)
        parameters["hidden"] = hidden
    project: nn.Module = linear
    if kind.startswith("lora") or kind == "everything":
        project, parameters = _with_lora(linear, 0.5 if kind == "lora_dropout" else 0.0)
        parameters["hidden"] = hidden
    head = VocabHead(
        project,
        logit_scale=0.37 if kind in ("scale", "everything") else 1.0,
        softcap=2.5 if kind in ("softcap", "everything") else None,
        vocab_size=V,
    )
    return head, hidden, parameters


def _with_lora(linear: nn.Linear, dropout: float) -> tuple[nn.Module, dict[str, Tensor]]:
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.ModuleDict({"lm_head": linear})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=dropout), model)
    lora = model["lm_head"]
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter).to(linear.weight.dtype)
    return lora, {name: p for name, p in lora.named_parameters() if p.requires_grad}


@pytest.fixture(scope="session")
def head_factory() -> Callable[..., Made]:
    """:func:`make_head`."""
    return make_head
