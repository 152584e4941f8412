"""Continuations of every prefix of a sequence, from one reading of it.

The sequence is read once. A row that continues its first c tokens gets a copy of the cache in which the columns from c
on are hidden by the attention mask (or cropped, where no row of the batch needs them), starts from the hidden state of
token c - 1, and counts positions from c. So the cost grows with the tokens drawn, not with the number of prefixes.

That is exact where a token's keys and values depend on nothing after it, positions are given as ids, and every visible
column counts the same whatever its distance in columns. A sliding window counts columns, a recurrent state has none,
and some relative positions (ALiBi) are taken from the column's number: :func:`gap_limit` finds out what a model allows.

Axes: P sequences read, B rows decoded, T padded length, H hidden size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from stepkd.models.head import is_half, relative_error
from stepkd.sampling.decode import Decoder, Row
from stepkd.sampling.engine import Branch, BranchContinuations, Progress, SamplingConfig

_KNOWN, _GAP = 4, 24  # tokens of the probe: read and kept, read and hidden


@torch.no_grad()
def gap_limit(decoder: Decoder) -> float:
    """Most columns, hidden ones included, of a cache in which the model can skip some: 0 none, infinity any number.

    The model's cache says it, and a short probe: a few tokens are read past a gap, and once more without the gap; the
    hidden states must agree.

    Args:
        decoder: reads and decodes; its model is in evaluation mode.
    """
    policy = decoder.policy
    ids = torch.arange(1, _KNOWN + _GAP + 2, device=policy.device)[None] % policy.vocab_size
    kept, following = ids[:, :_KNOWN], ids[:, -1:]
    plain = _read(decoder, torch.cat([kept, following], 1))
    layers = getattr(plain.past_key_values, "layers", None)
    if layers is None or any(type(each) not in (DynamicLayer, DynamicSlidingWindowLayer) for each in layers):
        return 0
    window = min((x.sliding_window - 1 for x in layers if type(x) is DynamicSlidingWindowLayer), default=math.inf)
    gap = int(min(_GAP, min(window, policy.max_length or math.inf) - _KNOWN - 1))
    if gap < 1:
        return 0
    cache = _read(decoder, ids[:, : _KNOWN + gap]).past_key_values
    mask = torch.ones(1, _KNOWN + gap + 1, dtype=torch.long, device=policy.device)
    mask[:, _KNOWN:-1] = 0
    output = decoder.forward(following, mask, torch.full_like(following, _KNOWN), cache)
    difference = relative_error(output.last_hidden_state[:, -1], plain.last_hidden_state[:, -1])
    # Half precision rounds differently in the two layouts (and may route a token to another expert).
    return window if difference < (0.3 if is_half(policy.causal_lm) else 1e-3) else 0


def _read(decoder: Decoder, ids: torch.Tensor) -> Any:
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return decoder.forward(ids, torch.ones_like(ids), positions, None)


_PARTS = 4
"""Sequences are read for about this many full batches of rows at once, so that half-empty ones are few."""


class _Prefix(NamedTuple):
    """One prefix of a branch, and the rows that continue it."""

    token_ids: Sequence[int]
    rows: list[Row]


def continued(
    decoder: Decoder,
    branches: Sequence[Branch],
    spec: SamplingConfig,
    key: tuple[str, int],
    limit: float,
    on_progress: Progress | None,
) -> list[BranchContinuations]:
    """See :meth:`~stepkd.sampling.engine.Engine.continue_branches`.

    Args:
        decoder: reads sequences and decodes rows; its model is in evaluation mode.
        branches: sequences with their cuts.
        spec: how to draw.
        key: purpose and step, the first parts of every row's noise key.
        limit: :func:`gap_limit` of the model; the prefixes of longer sequences are read one by one.
        on_progress: called with the number of rows just finished.

    Raises:
        DataError: a cut that cannot be continued.
    """
    found = [_prefixes(decoder, position, branch, spec, key) for position, branch in enumerate(branches)]
    # A block may be as wide as its longest sequence, which passed this test too.
    shares = [bool(branch.cuts) and branch.cuts[-1] + spec.longest <= limit for branch in branches]
    shared = [prefixes for prefixes, one in zip(found, shares, strict=True) if one]
    for block in _blocks(shared, spec.n, decoder.max_rows):
        _decode_shared(decoder, block, spec, on_progress)
    apart = [prefix for prefixes, one in zip(found, shares, strict=True) if not one for prefix in prefixes]
    decoder.decode_prompts([list(each.token_ids) for each in apart], [each.rows for each in apart], spec, on_progress)
    return [
        BranchContinuations(
            tuple(decoder.finished(each.rows, np.asarray(each.token_ids), spec) for each in prefixes),
            branch.cuts[-1] if one else sum(branch.cuts),
        )
        for prefixes, branch, one in zip(found, branches, shares, strict=True)
    ]


def _prefixes(
    decoder: Decoder, position: int, branch: Branch, spec: SamplingConfig, key: tuple[str, int]
) -> list[_Prefix]:
    """The prefixes of a branch, with rows without a token yet."""
    assert all(0 < a < b for a, b in pairwise([*branch.cuts, len(branch.token_ids) + 1])), branch
    prefixes = []
    for cut in branch.cuts:
        limit = spec.room(f"a prefix of branch {branch.index}", cut, decoder.policy.max_length)
        rows = [Row(position, j, limit, (*key, branch.index, cut, j)) for j in range(spec.n)]
        prefixes.append(_Prefix(branch.token_ids[:cut], rows))
    return prefixes


def _blocks(branches: list[list[_Prefix]], n: int, max_rows: int) -> list[list[list[_Prefix]]]:
    """Branches that are read together, longest first: similar lengths, little padding."""
    blocks: list[list[list[_Prefix]]] = []
    room = 0
    for prefixes in sorted(branches, key=lambda prefixes: -len(prefixes[-1].token_ids)):
        rows = len(prefixes) * n
        if not blocks or rows > room or len(blocks[-1]) >= max_rows:
            blocks.append([])
            room = _PARTS * max_rows
        blocks[-1].append(prefixes)
        room -= rows
    return blocks


def _decode_shared(
    decoder: Decoder, block: list[list[_Prefix]], spec: SamplingConfig, on_progress: Progress | None
) -> None:
    """Read every sequence once and decode the rows of all its prefixes, those of similar length together."""
    reading = decoder.read([prefixes[-1].token_ids for prefixes in block], padding="right")
    device, read_columns = reading.mask_PT.device, reading.mask_PT.shape[1]
    rows = [
        (row, source, len(prefix.token_ids))
        for source, prefixes in enumerate(block)
        for prefix in prefixes
        for row in prefix.rows
    ]
    rows.sort(key=lambda each: -each[2])
    size = math.ceil(len(rows) / math.ceil(len(rows) / decoder.max_rows))
    for start in range(0, len(rows), size):
        part, sources, cuts = zip(*rows[start : start + size], strict=True)
        width = cuts[0]
        source_B, cut_B = torch.tensor([sources, cuts], device=device)
        cache = selected_rows(reading.cache, source_B, read_columns - width)
        mask_BT = (torch.arange(width, device=device) < cut_B[:, None]).to(reading.mask_PT.dtype)
        hidden_BH = reading.hidden_PTH[source_B, cut_B - 1]
        decoder.decode(list(part), cache, hidden_BH, mask_BT, spec, on_progress)


def selected_rows(cache: Any, source_B: torch.Tensor, surplus: int = 0) -> Any:
    """A cache of its own for the rows of a batch; ``surplus`` columns at the end are left out."""
    # A shallow copy of every layer will do: cropping takes a view, selecting makes new tensors.
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    if surplus:
        selected.crop(-surplus)
    selected.batch_select_indices(source_B)
    return selected
