"""Rows that share a beginning: the beginning is read once, and every continuation goes on from a copy of its cache.

Axes: B rows, T padded length, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepkd.models.policy import Policy
from stepkd.rollout.decode import Decoder, Reading

Ids = Sequence[int]


def continue_rows(
    decoder: Decoder, reading: Reading, sources: Sequence[int], ids: Sequence[Ids], *, cuts: Sequence[int] | None = None
) -> Reading:
    """Read continuations, padded on the right, of rows that have been read.

    Args:
        decoder: reads with the model that read the rows, in evaluation mode and without gradients.
        reading: what has been read, padded on the left or a continuation itself; left as it is, so that more
            continuations can follow.
        sources: for each of the B continuations, which row it continues.
        ids: ids of the continuations, none empty.
        cuts: how many tokens of its row each continuation sees, counted from the row's first; None: all. Needs a model
            that allows gaps of this size (:func:`stepkd.rollout.branches.gap_limit`).

    Returns:
        The continuations' hidden states (B, T', H), with mask and cache of the whole rows.
    """
    policy = decoder.policy
    index_B = torch.tensor(sources, device=policy.device)
    seen_BT = reading.mask_PT[index_B]
    if cuts is not None:
        cuts_B = torch.tensor(cuts, device=policy.device)
        seen_BT = seen_BT * (seen_BT.cumsum(-1) <= cuts_B[:, None])
    ids_BT, mask_BT = padded_right(policy, ids)
    # Padding repeats its row's last position, so that no position exceeds the context; nothing ever looks at it.
    ahead_BT = mask_BT.cumsum(-1) - 1
    whole_BT = torch.cat([seen_BT, mask_BT], dim=1)
    output = decoder.forward(
        ids_BT, whole_BT, seen_BT.sum(-1, keepdim=True) + ahead_BT, _selected(reading.cache, index_B)
    )
    return Reading(output.last_hidden_state, whole_BT, output.past_key_values)


def padded_right(policy: Policy, ids: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Ids (B, T) padded on the right, and their mask."""
    width = max(map(len, ids))
    pad = int(policy.tokenizer.pad_token_id or 0)
    ids_BT = torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids], device=policy.device)
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=policy.device)
    return ids_BT, mask_BT


def packed(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Put groups into blocks of at most ``limit`` rows, in order; a group of more rows has a block of its own.

    Args:
        sizes: number of rows of each group, each at least 1.
        limit: most rows of a block.

    Returns:
        Indices of the groups of each block.
    """
    blocks: list[list[int]] = []
    filled = limit
    for group, size in enumerate(sizes):
        if filled + size > limit:
            blocks.append([])
            filled = 0
        blocks[-1].append(group)
        filled += size
    return blocks


def _selected(cache: Any, index_B: Tensor) -> Any:
    """Copies of some rows of a cache; reading on puts new tensors in the copy and leaves the cache as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(index_B)
    return chosen
