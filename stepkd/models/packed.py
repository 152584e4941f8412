"""Attention in rows that hold several completions of one prompt.

Axes: B rows, T padded length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepkd.models.head import backbone_of, evaluation_mode, reads_alike

ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a mask of every pair of positions."""


def packed_mask(causal_lm: Any, segments_BT: Tensor) -> Tensor:
    """Attention mask (B, 1, T, T) of packed rows: causal, to the prompt and to one's own completion only.

    Args:
        causal_lm: the model; its attention implementation decides whether the mask is boolean or added to the scores.
        segments_BT: 0 for the prompt, 1, 2, ... for the completions, -1 for padding.
    """
    queries_BT1, keys_B1T = segments_BT.unsqueeze(2), segments_BT.unsqueeze(1)
    length = segments_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
    allowed_BTT = causal_TT & ((keys_B1T == queries_BT1) | (keys_B1T == 0)) & (keys_B1T >= 0)
    # Padding sees itself: a row of a softmax without any key would not be a number.
    allowed_BTT |= torch.eye(length, dtype=torch.bool, device=segments_BT.device)
    if causal_lm.config._attn_implementation != "eager":
        return allowed_BTT.unsqueeze(1)
    dtype = causal_lm.dtype
    zeros = torch.zeros(allowed_BTT.shape, dtype=dtype, device=segments_BT.device)
    return zeros.masked_fill(~allowed_BTT, torch.finfo(dtype).min).unsqueeze(1)


def has_windows(config: Any) -> bool:
    """Whether a layer sees the last so many positions of its row only; the probe is shorter than most windows."""
    if getattr(config, "layer_types", None):
        return set(config.layer_types) != {"full_attention"}
    local = "local" in (getattr(config, "attention_layers", None) or ())  # GPT-Neo
    return local or bool(getattr(config, "sliding_window", None))


@torch.no_grad()
def check_packing(causal_lm: Any) -> bool:
    """Whether two completions in one row have the hidden states that they have in rows of their own.

    False for attention implementations that take no such mask, for models with sliding windows or recurrent layers
    (their masks are not only ours), and where a probe of seven tokens says so.
    """
    config = causal_lm.config.get_text_config()
    if causal_lm.config._attn_implementation not in ATTENTION or has_windows(config):
        return False
    weight = causal_lm.get_input_embeddings().weight
    ids = (torch.arange(1, 8, device=weight.device) % weight.shape[0]).unsqueeze(0)
    segments = torch.tensor([[0, 0, 1, 1, 1, 2, 2]], device=weight.device)
    positions = torch.tensor([[0, 1, 2, 3, 4, 2, 3]], device=weight.device)
    second = torch.cat([ids[:, :2], ids[:, 5:]], dim=1)
    try:
        with evaluation_mode(causal_lm):
            backbone = backbone_of(causal_lm)
            packed = backbone(
                input_ids=ids,
                attention_mask=packed_mask(causal_lm, segments),
                position_ids=positions,
                use_cache=False,
            ).last_hidden_state
            alone = [
                backbone(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False).last_hidden_state
                for part in (ids[:, :5], second)
            ]
    except (RuntimeError, ValueError, TypeError):  # an architecture that takes no such mask
        return False
    expected = torch.cat([alone[0], alone[1][:, 2:]], dim=1)
    return reads_alike(causal_lm, packed, expected)
