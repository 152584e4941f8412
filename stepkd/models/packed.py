"""Rows without waste: several completions of one prompt in a row, and forward passes without padding.

Micro-batches of reasoning chains are often a tenth to a half padding, which costs as much as tokens do. Without it the
real tokens of all rows stand in one row; where attention needs the rows apart, queries, keys and values are laid out in
padded rows and its result is gathered again. There a row's padding is behind its tokens, so that causal attention never
sees it and needs no mask (which is faster in itself).

Axes: B rows, T padded length, U real tokens of all rows, H hidden size, A heads, D size of one head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stepkd.models.head import backbone_of, evaluation_mode, positions_from_mask, reads_alike

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


WORTH = 0.03
"""Share of padding from which a forward pass goes without it."""


class _Spread(torch.autograd.Function):
    """``index_copy`` into zeros that keeps the index alone; torch's own keeps the values too, for their shape."""

    @staticmethod
    def forward(ctx: Any, values_U: Tensor, slots_U: Tensor, number: int) -> Tensor:
        ctx.save_for_backward(slots_U)
        return values_U.new_zeros(number, *values_U.shape[1:]).index_copy_(0, slots_U, values_U)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slots_U,) = ctx.saved_tensors
        return gradients[0].index_select(0, slots_U), None, None


def _spread(values_U: Tensor, slots_U: Tensor, number: int) -> Tensor:
    """Rows of values to their slots among so many, zeros elsewhere."""
    spread: Tensor = _Spread.apply(values_U, slots_U, number)
    return spread


@dataclass(frozen=True)
class Rows:
    """Where the real tokens of all rows stand."""

    slots_U: Tensor
    """Place of every real token among the B * T of right-padded rows."""
    sizes: tuple[int, int]
    """Rows, and tokens of the longest."""

    @classmethod
    def of(cls, attention_mask_BT: Tensor) -> Rows:
        """Of rows padded on any side."""
        lengths_B = attention_mask_BT.sum(-1)
        longest = int(lengths_B.max())
        columns_T = torch.arange(longest, device=attention_mask_BT.device)
        slots_U = (columns_T < lengths_B.unsqueeze(-1)).flatten().nonzero().squeeze(-1)
        return cls(slots_U, (len(lengths_B), longest))

    def spread(self, values_1AUD: Tensor) -> Tensor:
        """(1, A, U, D) of one row to (B, A, T, D) of rows, zero in padding."""
        rows, longest = self.sizes
        padded = _spread(values_1AUD.squeeze(0).transpose(0, 1), self.slots_U, rows * longest)
        return padded.unflatten(0, (rows, longest)).transpose(1, 2)

    def gather(self, values_BTAD: Tensor) -> Tensor:
        """(B, T, A, D) of rows to (1, U, A, D)."""
        return values_BTAD.flatten(0, 1).index_select(0, self.slots_U).unsqueeze(0)


def unpadded_hidden(causal_lm: Any, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Last hidden states (B, T, H) by a forward pass over real tokens only; zero in padding.

    Args:
        causal_lm: a model of which :func:`check_unpadded` is true.
        input_ids_BT: ids, padded on any side.
        attention_mask_BT: 1 for tokens, 0 for padding.
    """
    real_U = attention_mask_BT.flatten().nonzero().squeeze(-1)
    hidden_1UH = backbone_of(causal_lm)(
        input_ids=input_ids_BT.flatten()[real_U].unsqueeze(0),
        # Any mask of four axes is taken as it is, in place of one made over the whole row; nobody reads this one.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids_BT.device),
        position_ids=positions_from_mask(attention_mask_BT).flatten()[real_U].unsqueeze(0),
        use_cache=False,
        unpadded_rows=Rows.of(attention_mask_BT),
    ).last_hidden_state
    return _spread(hidden_1UH.squeeze(0), real_U, attention_mask_BT.numel()).view(*attention_mask_BT.shape, -1)


def is_worth_it(attention_mask_BT: Tensor) -> bool:
    """Whether there is enough padding to do without."""
    return float(attention_mask_BT.float().mean()) < 1 - WORTH


@torch.no_grad()
def check_unpadded(causal_lm: Any) -> bool:
    """Whether a forward pass over real tokens gives the hidden states of a padded one.

    False for attention other than sdpa, for sliding windows, and where a probe of two short rows says so: recurrent
    layers, biases by distance, or layers that keep from attention what they are given.
    """
    if causal_lm.config._attn_implementation != "sdpa" or has_windows(causal_lm.config.get_text_config()):
        return False
    _install()
    weight = causal_lm.get_input_embeddings().weight
    ids = (torch.arange(1, 11, device=weight.device) % weight.shape[0]).view(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], device=weight.device)
    with evaluation_mode(causal_lm):
        try:
            found = unpadded_hidden(causal_lm, ids, mask)
        except (RuntimeError, ValueError, TypeError, AttributeError):  # an architecture that takes no such arguments
            return False
        expected = backbone_of(causal_lm)(
            input_ids=ids, attention_mask=mask, position_ids=positions_from_mask(mask), use_cache=False
        ).last_hidden_state
    return reads_alike(causal_lm, found[mask.bool()], expected[mask.bool()])


def _install() -> None:
    """Let transformers' sdpa attention know of rows, in this process; without them it is what it was."""
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if getattr(inner, "knows_rows", False):
        return

    def sdpa(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *arguments: Any,
        unpadded_rows: Rows | None = None,
        **settings: Any,
    ) -> tuple[Tensor, None]:
        if unpadded_rows is None:
            return inner(module, query, key, value, attention_mask, *arguments, **settings)
        spread = [unpadded_rows.spread(states) for states in (query, key, value)]
        output_BTAD, weights = inner(module, *spread, None, *arguments, **{**settings, "is_causal": True})
        return unpadded_rows.gather(output_BTAD), weights

    sdpa.knows_rows = True  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa
