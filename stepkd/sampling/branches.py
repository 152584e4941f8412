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
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from stepkd.errors import DataError
from stepkd.models.head import is_half, relative_error
from stepkd.sampling.decode import Decoder, Row
from stepkd.sampling.sampler import Branch, BranchContinuations, Progress, SamplingConfig

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


@dataclass
class _Prefix:
    """One prefix of a branch, and the rows that continue it."""

    branch: Branch
    cut: int
    rows: list[Row]
    read_tokens: int = 0

    @property
    def token_ids(self) -> Sequence[int]:
        return self.branch.token_ids[: self.cut]


@dataclass
class BranchRun:
    """One call of :meth:`~stepkd.sampling.transformers_sampler.TransformersSampler.sample_branches`.

    Raises:
        DataError: a cut that cannot be continued.
    """

    decoder: Decoder
    """Reads sequences and decodes rows; its model is in evaluation mode."""
    branches: Sequence[Branch]
    """Sequences with their cuts."""
    spec: SamplingConfig
    """How to draw."""
    key: tuple[str, int]
    """Purpose and step, the first parts of every row's noise key."""
    on_progress: Progress | None
    """Called with the number of rows just finished."""

    def __post_init__(self) -> None:
        self.prefixes = [self._prefixes(b, branch) for b, branch in enumerate(self.branches)]

    def _prefixes(self, position: int, branch: Branch) -> list[_Prefix]:
        """The prefixes of a branch, with rows without a token yet."""
        assert all(0 < a < b for a, b in pairwise([*branch.cuts, len(branch.token_ids) + 1])), branch
        context, prefixes = self.decoder.policy.max_length, []
        for cut in branch.cuts:
            if context is not None and cut >= context:
                raise DataError(
                    f"branch {branch.index}: the prefix of {cut} tokens leaves no room in the model's context of "
                    f"{context}"
                )
            limit = self.spec.longest if context is None else min(self.spec.longest, context - cut)
            key = (*self.key, branch.index, cut)
            prefixes.append(_Prefix(branch, cut, [Row(position, j, limit, (*key, j)) for j in range(self.spec.n)]))
        return prefixes

    def results(self, limit: float) -> list[BranchContinuations]:
        """Draw everything.

        Args:
            limit: :func:`gap_limit` of the model; the prefixes of longer sequences are read one by one.
        """
        shared: list[list[_Prefix]] = []
        apart: list[_Prefix] = []
        for prefixes in filter(None, self.prefixes):
            # A block may be as wide as its longest sequence, which passed this test too.
            if prefixes[-1].cut + self.spec.longest <= limit:
                shared.append(prefixes)
            else:
                apart.extend(prefixes)
        for block in self._blocks(shared):
            self._decode_shared(block)
        for prefix in apart:
            prefix.read_tokens = prefix.cut
        prompts, rows = [list(prefix.token_ids) for prefix in apart], [prefix.rows for prefix in apart]
        self.decoder.decode_prompts(prompts, rows, self.spec, self.on_progress)
        return [
            BranchContinuations(
                tuple(self.decoder.finished(p.rows, np.asarray(p.token_ids), self.spec) for p in prefixes),
                sum(p.read_tokens for p in prefixes),
            )
            for prefixes in self.prefixes
        ]

    def _blocks(self, branches: list[list[_Prefix]]) -> list[list[list[_Prefix]]]:
        """Branches that are read together, longest first: similar lengths, little padding."""
        blocks: list[list[list[_Prefix]]] = []
        room = 0
        for prefixes in sorted(branches, key=lambda prefixes: -prefixes[-1].cut):
            rows = len(prefixes) * self.spec.n
            if not blocks or rows > room or len(blocks[-1]) >= self.decoder.max_rows:
                blocks.append([])
                room = _PARTS * self.decoder.max_rows
            blocks[-1].append(prefixes)
            room -= rows
        return blocks

    def _decode_shared(self, block: list[list[_Prefix]]) -> None:
        """Read every sequence once and decode the rows of all its prefixes, those of similar length together."""
        for prefixes in block:
            prefixes[-1].read_tokens = prefixes[-1].cut
        reading = self.decoder.read([prefixes[-1].token_ids for prefixes in block], padding="right")
        device, read_columns = reading.mask_PT.device, reading.mask_PT.shape[1]
        rows = [
            (row, source, prefix.cut)
            for source, prefixes in enumerate(block)
            for prefix in prefixes
            for row in prefix.rows
        ]
        rows.sort(key=lambda each: -each[2])
        size = math.ceil(len(rows) / math.ceil(len(rows) / self.decoder.max_rows))
        for start in range(0, len(rows), size):
            part, sources, cuts = zip(*rows[start : start + size], strict=True)
            width = cuts[0]
            source_B, cut_B = torch.tensor([sources, cuts], device=device)
            cache = selected_rows(reading.cache, source_B, read_columns - width)
            mask_BT = (torch.arange(width, device=device) < cut_B[:, None]).to(reading.mask_PT.dtype)
            hidden_BH = reading.hidden_PTH[source_B, cut_B - 1]
            self.decoder.decode(list(part), cache, hidden_BH, mask_BT, self.spec, self.on_progress)


def selected_rows(cache: Any, source_B: torch.Tensor, surplus: int = 0) -> Any:
    """A cache of its own for the rows of a batch; ``surplus`` columns at the end are left out."""
    # A shallow copy of every layer will do: cropping takes a view, selecting makes new tensors.
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    if surplus:
        selected.crop(-surplus)
    selected.batch_select_indices(source_B)
    return selected
