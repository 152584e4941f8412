"""Forward passes without waste: no padding, and beginnings that rows have in common (prompts) only once.

Micro-batches of reasoning chains are often a tenth to a half padding, which costs as much as tokens do. Without it the
real tokens of all rows stand in one row; where attention needs the rows apart, queries, keys and values are laid out in
padded rows and its result is gathered again. There a row's padding is behind its tokens, so that causal attention never
sees it and needs no mask (which is faster in itself). A token that begins several rows is laid out in each of them.

Axes: B rows, T padded length, K real tokens of all rows, U those that are computed, H hidden size, A heads, D size of
one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stepkd.models.head import backbone_of, evaluation_mode, positions_from_mask, reads_alike
from stepkd.models.machine import fast_bfloat16, memory_free


def _has_windows(config: Any) -> bool:
    """Whether a layer sees the last so many positions of its row only; the probe is shorter than most windows."""
    if getattr(config, "layer_types", None):
        return set(config.layer_types) != {"full_attention"}
    local = "local" in (getattr(config, "attention_layers", None) or ())  # GPT-Neo
    return local or bool(getattr(config, "sliding_window", None))


WORTH = 0.03
"""Share of places that need not be computed from which a forward pass goes without them."""


class _Spread(torch.autograd.Function):
    """Rows of values to all their places; padding gets some row or other, and its gradient goes nowhere."""

    @staticmethod
    def forward(ctx: Any, values_U: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return values_U.contiguous().index_select(0, rows.token_P)  # twice as fast as from strided rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        rows: Rows = ctx.rows
        found = gradients[0].index_select(0, rows.slots_U)
        for tokens, slots in rows.repeats:  # no token twice in one of them: the sum does not depend on any order
            found.index_copy_(0, tokens, found.index_select(0, tokens) + gradients[0].index_select(0, slots))
        return found, None


class _Gather(torch.autograd.Function):
    """Rows of values at different places; torch's own gradient adds them one by one."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, slots_U: Tensor) -> Tensor:
        ctx.save_for_backward(slots_U)
        ctx.number = len(values)
        return values.index_select(0, slots_U)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slots_U,) = ctx.saved_tensors
        shape = (ctx.number, *gradients[0].shape[1:])
        return gradients[0].new_zeros(shape).index_copy_(0, slots_U, gradients[0]), None


@dataclass(frozen=True)
class Rows:
    """Where the tokens that are computed stand among the places of padded rows."""

    slots_U: Tensor
    """Place of each of them; different places."""
    token_P: Tensor
    """For every place the number of the token that stands there; any number in padding."""
    lengths_B: Tensor
    """Tokens of each row."""
    sizes: tuple[int, int]
    """Rows, and places of each."""
    repeats: tuple[tuple[Tensor, Tensor], ...] = ()
    """Numbers of tokens that stand elsewhere too (in other rows that begin alike), and where; no token twice in one."""

    @classmethod
    def of(cls, attention_mask_BT: Tensor, shared_BT: Tensor | None = None) -> tuple[Rows, Rows]:
        """In the rows as they are, and in rows without padding before their tokens.

        Args:
            attention_mask_BT: 1 for tokens, 0 for padding on any side.
            shared_BT: as for :func:`unpadded_hidden`.
        """
        real_K = attention_mask_BT.flatten().nonzero().squeeze(-1)
        lengths_B = attention_mask_BT.sum(-1)
        longest = int(lengths_B.max())
        columns_T = torch.arange(longest, device=attention_mask_BT.device)
        slots_K = (columns_T < lengths_B.unsqueeze(-1)).flatten().nonzero().squeeze(-1)
        sizes = (len(lengths_B), attention_mask_BT.shape[1]), (len(lengths_B), longest)
        source_K = real_K if shared_BT is None else shared_BT.flatten()[real_K]
        own_K = source_K == real_K
        numbers = real_K.new_zeros(attention_mask_BT.numel())
        numbers[real_K[own_K]] = torch.arange(int(own_K.sum()), device=real_K.device)
        token_K = numbers[source_K]
        parts = _levels(token_K, (~own_K).nonzero().squeeze(-1))

        def laid_out(places_K: Tensor, sizes: tuple[int, int]) -> Rows:
            token_P = places_K.new_zeros(sizes[0] * sizes[1]).index_copy_(0, places_K, token_K)
            repeats = tuple((tokens, places_K[again]) for tokens, again in parts)
            return cls(places_K[own_K], token_P, lengths_B, sizes, repeats)

        return laid_out(real_K, sizes[0]), laid_out(slots_K, sizes[1])

    def spread(self, values_UX: Tensor) -> Tensor:
        """(U, ...) to (B * T, ...); padding holds some of the values."""
        spread: Tensor = _Spread.apply(values_UX, self)
        return spread

    def spread_heads(self, values_1AUD: Tensor) -> Tensor:
        """(1, A, U, D) of one row to (B, A, T, D) of rows; padding holds some of the values."""
        return self.spread(values_1AUD.squeeze(0).transpose(0, 1)).unflatten(0, self.sizes).transpose(1, 2)

    def gather(self, values_BTAD: Tensor) -> Tensor:
        """(B, T, A, D) of rows to (1, U, A, D)."""
        gathered: Tensor = _Gather.apply(values_BTAD.flatten(0, 1), self.slots_U)
        return gathered.unsqueeze(0)


def _levels(token_K: Tensor, again: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Tokens that stand in several places, and which of the K those are, in parts that have no token twice."""
    order = token_K[again].argsort(stable=True)
    again = again[order]
    tokens = token_K[again]
    nth = torch.arange(len(tokens), device=tokens.device) - torch.searchsorted(tokens, tokens)
    levels = [nth == n for n in range(int(nth.max()) + 1 if len(nth) else 0)]
    return [(tokens[level], again[level]) for level in levels]


def unpadded_hidden(
    causal_lm: Any,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    shared_BT: Tensor | None = None,
    *,
    cache: DynamicCache | None = None,
) -> Tensor:
    """Last hidden states (B, T, H) by a forward pass over real tokens only; those of padding are arbitrary.

    Args:
        causal_lm: a model of which :func:`check_unpadded` is true.
        input_ids_BT: ids, padded on any side.
        attention_mask_BT: 1 for tokens, 0 for padding.
        shared_BT: the place whose state each place has (:class:`~stepkd.data.collate.Batch`), where rows begin alike:
            such a beginning is computed once; None: nowhere.
        cache: an empty one, which is filled with the keys and values of every place, arbitrary ones in padding.
    """
    here, compact = Rows.of(attention_mask_BT, shared_BT)
    hidden_1UH = backbone_of(causal_lm)(
        input_ids=input_ids_BT.flatten()[here.slots_U].unsqueeze(0),
        # Any mask of four axes is taken as it is, in place of one made over the whole row; nobody reads this one.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids_BT.device),
        position_ids=positions_from_mask(attention_mask_BT).flatten()[here.slots_U].unsqueeze(0),
        past_key_values=cache,
        use_cache=cache is not None,
        unpadded_rows=compact,
        for_sampling=cache is not None,
    ).last_hidden_state
    for layer in () if cache is None else cache.layers:
        layer.keys, layer.values = here.spread_heads(layer.keys), here.spread_heads(layer.values)
    return here.spread(hidden_1UH.squeeze(0)).view(*attention_mask_BT.shape, -1)


def is_worth_it(attention_mask_BT: Tensor, shared_BT: Tensor | None = None) -> bool:
    """Whether there is enough padding, and enough that rows have in common, to do without."""
    computed_BT = attention_mask_BT.bool()
    if shared_BT is not None:
        places_BT = torch.arange(shared_BT.numel(), device=shared_BT.device).view_as(shared_BT)
        computed_BT = computed_BT & (shared_BT == places_BT)
    return float(computed_BT.float().mean()) < 1 - WORTH


@torch.no_grad()
def check_unpadded(causal_lm: Any) -> bool:
    """Whether a forward pass over real tokens gives the hidden states of a padded one.

    False for attention other than sdpa, for sliding windows, and where a probe of two short rows says so: recurrent
    layers, biases by distance, or layers that keep from attention what they are given.
    """
    if causal_lm.config._attn_implementation != "sdpa" or _has_windows(causal_lm.config.get_text_config()):
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


def _attend_once(query_BA1D: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, seen: Any, scaling: float | None) -> Tensor:
    """(B, 1, A, D) of one query in each row: on a CPU up to three times as fast as torch's kernel, which is made for
    many queries. Keys and values are contiguous, or they would be copied."""
    rows, heads = query_BA1D.shape[0], key_BKTD.shape[1]
    query_BKGD = query_BA1D.reshape(rows, heads, -1, query_BA1D.shape[-1])
    # Scaled first: in float16 the product could be larger than that holds.
    scores_BKGT = (query_BKGD * (scaling or key_BKTD.shape[-1] ** -0.5)) @ key_BKTD.transpose(-1, -2)
    if scores_BKGT.dtype != torch.float64:
        scores_BKGT = scores_BKGT.float()
    scores_BKGT = scores_BKGT.masked_fill_(~seen, float("-inf"))
    return (scores_BKGT.softmax(-1).to(value_BKTD.dtype) @ value_BKTD).view(rows, 1, -1, value_BKTD.shape[-1])


_SCORES = 1_000_000
"""Scores of attention that are held at once: they stay near the CPU."""


def _attend_short(
    rows: Rows, query_1AUD: Tensor, key_1KUD: Tensor, value_1KUD: Tensor, scaling: float | None
) -> Tensor:
    """(B, T, A, D) of causal attention in rows that are sampled from, groups of rows of similar length at a time.

    On a CPU a multiple of the speed of torch's kernel, which computes all rows at the length of the longest, and is
    made for longer ones than prompts are. In 16 bits it rounds otherwise: what is trained and what it is compared with
    are both read by torch's.
    """
    heads, size, (number, longest) = key_1KUD.shape[1], query_1AUD.shape[-1], rows.sizes
    found_BTAD = query_1AUD.new_zeros(number, longest, query_1AUD.shape[1], size)
    order, token_BT = rows.lengths_B.argsort(descending=True), rows.token_P.view(number, longest)
    start = 0
    while start < number:
        width = int(rows.lengths_B[order[start]])
        own = order[start : (start := start + max(1, _SCORES // (query_1AUD.shape[1] * max(width, 1) ** 2)))]
        tokens = token_BT[own, :width].flatten()
        query, key, value = (
            each.squeeze(0).transpose(0, 1).index_select(0, tokens).view(len(own), width, heads, -1, size)
            for each in (query_1AUD, key_1KUD, value_1KUD)
        )
        # (b, T, K, G, D) each, with G queries of a key's head; keys and values have one.
        grouped = (query * (scaling or size**-0.5)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        scores = (grouped @ key.squeeze(3).transpose(1, 2).contiguous().mT).unflatten(2, (-1, width))
        if scores.dtype != torch.float64:
            scores = scores.float()
        behind = torch.ones(width, width, dtype=torch.bool).triu(1)
        weights = scores.masked_fill_(behind, float("-inf")).softmax(-1).to(value.dtype).flatten(2, 3)
        seen = (weights @ value.squeeze(3).transpose(1, 2).contiguous()).unflatten(2, (-1, width))
        found_BTAD[own, :width] = seen.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return found_BTAD


PACKED_FROM = 16
"""Calls from which weights are laid out anew for them; it takes about as long as three do."""


@contextmanager
def packed_weights(causal_lm: Any, rows: int, calls: int) -> Iterator[None]:
    """Let linear layers in bfloat16 on a CPU read weights that lie as its kernels want them, for a block of many calls.

    Else every call lays them out anew. Results are the same, bit for bit. The copies take as much memory as the
    weights; where twice that is not free, nothing is done.

    Args:
        causal_lm: its weights do not change in the block, and get no gradients.
        rows: tokens of a call.
        calls: how many there will be.
    """
    layers = [each for each in causal_lm.modules() if type(each) is nn.Linear and _is_plain(each)]
    enough = calls >= PACKED_FROM and torch.backends.mkldnn.is_available() and fast_bfloat16()
    if not enough or 2 * sum(each.weight.nbytes for each in layers) > memory_free():
        layers = []
    try:
        for layer in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
            layer.forward = partial(_packed_linear, weight, layer.bias)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _is_plain(layer: nn.Linear) -> bool:
    """Whether its weight is whole, in bfloat16, on the CPU, and nobody else stands in for its forward pass."""
    weight = layer.weight
    on_cpu = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    return on_cpu and type(weight.data) is Tensor and "forward" not in vars(layer)


def _packed_linear(weight: Tensor, bias: Tensor | None, values: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(values, weight, bias, "none", [], "")
    return found


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
        for_sampling: bool = False,
        one_query: bool = False,
        **settings: Any,
    ) -> tuple[Tensor, None]:
        if one_query:
            return _attend_once(query, key, value, attention_mask, settings.get("scaling")), None
        if unpadded_rows is None:
            return inner(module, query, key, value, attention_mask, *arguments, **settings)
        short = query.shape[1] * unpadded_rows.sizes[1] ** 2 <= _SCORES and key.shape[-1] == value.shape[-1]
        if for_sampling and short and query.device.type == "cpu":
            return unpadded_rows.gather(_attend_short(unpadded_rows, query, key, value, settings.get("scaling"))), None
        spread = [unpadded_rows.spread_heads(states) for states in (query, key, value)]
        output_BTAD, weights = inner(module, *spread, None, *arguments, **{**settings, "is_causal": True})
        return unpadded_rows.gather(output_BTAD), weights

    sdpa.knows_rows = True  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa
