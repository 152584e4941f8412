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
import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from stepkd.data.completion import Completion
from stepkd.errors import DataError
from stepkd.sampling.decode import Decoder, Progress, Reading, Row
from stepkd.sampling.sampler import Branch, BranchRollouts, SamplingConfig

_KNOWN, _GAP = 4, 24  # tokens of the probe: read and kept, read and hidden


@dataclass(frozen=True)
class GapLimit:
    """How many columns a cache with a gap may have."""

    columns: int | None
    """Most columns, hidden ones included; 0: no gaps at all; None: any number."""
    reason: str = ""
    """Why there is a limit."""

    def allows(self, columns: int) -> bool:
        """Whether a cache that grows to this many columns may have gaps."""
        return self.columns is None or columns <= self.columns


@torch.no_grad()
def gap_limit(decoder: Decoder) -> GapLimit:
    """Find out what the model allows, from its cache's layers and from a short probe.

    The probe reads a few tokens past a gap, and once more without the gap; the hidden states must agree.

    Args:
        decoder: reads and decodes; its model is in evaluation mode.
    """
    policy = decoder.policy
    ids = torch.arange(1, _KNOWN + _GAP + 2, device=policy.device)[None] % policy.vocab_size
    kept, following = ids[:, :_KNOWN], ids[:, -1:]
    plain = _read(decoder, torch.cat([kept, following], 1))
    layers = getattr(plain.past_key_values, "layers", None)
    if layers is None:
        return GapLimit(0, f"its cache is a {type(plain.past_key_values).__name__}")
    other = {type(each).__name__ for each in layers if type(each) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    if other:
        return GapLimit(0, f"its cache holds layers of the kind {', '.join(sorted(other))}")
    windows = [each.sliding_window for each in layers if type(each) is DynamicSlidingWindowLayer]
    window = min(windows) - 1 if windows else None
    reach = f"its attention reaches back {min(windows)} tokens" if windows else ""
    room = [columns - _KNOWN - 1 for columns in (window, policy.max_length) if columns is not None]
    gap = min([_GAP, *room])
    if gap < 1:
        return GapLimit(0, reach or f"its context is {policy.max_length} tokens")
    expected = plain.last_hidden_state[:, -1]
    cache = _read(decoder, ids[:, : _KNOWN + gap]).past_key_values
    mask = torch.ones(1, _KNOWN + gap + 1, dtype=torch.long, device=policy.device)
    mask[:, _KNOWN:-1] = 0
    output = decoder.forward(following, mask, torch.full_like(following, _KNOWN), cache)
    difference = (output.last_hidden_state[:, -1].double() - expected.double()).norm() / expected.double().norm()
    # Half precision rounds differently in the two layouts (and may route a token to another expert).
    if not difference < (0.3 if expected.dtype in (torch.float16, torch.bfloat16) else 1e-3):
        return GapLimit(0, f"its hidden states change by {float(difference):.1%} across a gap in the attention mask")
    return GapLimit(window, reach)


def _read(decoder: Decoder, ids: torch.Tensor) -> Any:
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return decoder.forward(ids, torch.ones_like(ids), positions, None)


logger = logging.getLogger(__name__)

_PARTS = 4
"""Sequences are read for about this many full batches of rows at once, so that half-empty ones are few."""


@dataclass
class _Prefix:
    """One prefix of one branch, and what was drawn from it so far."""

    branch: int
    cut_number: int
    cut: int
    limit: int
    rollouts: list[Completion] = field(default_factory=list)
    read_tokens: int = 0


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
        context = self.decoder.policy.max_length
        self.prefixes = [_prefixes(b, branch, self.spec, context) for b, branch in enumerate(self.branches)]

    def results(self, gaps: GapLimit | None) -> list[BranchRollouts]:
        """Draw everything.

        Args:
            gaps: what the model allows; None reads every prefix on its own.
        """
        shared, apart = [], []
        for prefixes in self.prefixes:
            # A block may be as wide as its longest sequence, which passed this test too.
            if gaps is not None and prefixes and gaps.allows(prefixes[-1].cut + self.spec.longest):
                shared.append(prefixes)
            else:
                apart.extend(prefixes)
        if apart and gaps is not None:
            _notice(type(self.decoder.policy.causal_lm).__name__, gaps.reason)
        for block in self._blocks(shared):
            self._draw_shared(block)
        if apart:
            self._draw(apart, lambda rows: self._decode_apart(apart, rows))
        return [
            BranchRollouts(tuple(tuple(p.rollouts) for p in prefixes), sum(p.read_tokens for p in prefixes))
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

    def _draw_shared(self, block: list[list[_Prefix]]) -> None:
        sequences = []
        for prefixes in block:
            longest = prefixes[-1]
            sequences.append(self.branches[longest.branch].token_ids[: longest.cut])
            longest.read_tokens = longest.cut
        reading = self.decoder.read(sequences, padding="right")
        source = {prefixes[0].branch: p for p, prefixes in enumerate(block)}

        def decode(rows: list[Row]) -> None:
            for row in rows:
                row.source = source[row.prompt_index]
            self._decode_shared(reading, rows)

        self._draw([prefix for prefixes in block for prefix in prefixes], decode)

    def _draw(self, prefixes: list[_Prefix], decode: Callable[[list[Row]], None]) -> None:
        n = self.spec.n
        rows = [self._row(prefix, j) for prefix in prefixes for j in range(n)]
        decode(rows)
        for i, prefix in enumerate(prefixes):
            known = np.asarray(self.branches[prefix.branch].token_ids[: prefix.cut])
            prefix.rollouts = [self.decoder.finished(row, known, self.spec) for row in rows[i * n : (i + 1) * n]]

    def _row(self, prefix: _Prefix, sample: int) -> Row:
        key = (*self.key, self.branches[prefix.branch].index, prefix.cut, sample)
        return Row(prefix.branch, sample, 0, prefix.cut, prefix.limit, key)

    def _decode_shared(self, reading: Reading, rows: list[Row]) -> None:
        """Decode rows from one reading, those of similar prefix length together."""
        device, read_columns = reading.mask_PT.device, reading.mask_PT.shape[1]
        rows = sorted(rows, key=lambda row: -row.cut)
        size = math.ceil(len(rows) / math.ceil(len(rows) / self.decoder.max_rows))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            width = part[0].cut
            source_B = torch.tensor([row.source for row in part], device=device)
            cut_B = torch.tensor([row.cut for row in part], device=device)
            cache = _selected(reading.cache, source_B, read_columns - width)
            mask_BT = (torch.arange(width, device=device) < cut_B[:, None]).to(reading.mask_PT.dtype)
            hidden_BH = reading.hidden_PTH[source_B, cut_B - 1]
            self.decoder.decode(part, cache, hidden_BH, mask_BT, self.spec, self.on_progress)

    def _decode_apart(self, prefixes: list[_Prefix], rows: list[Row]) -> None:
        """Decode rows after reading the prefix of each anew."""
        by_prefix: dict[tuple[int, int], list[Row]] = {}
        for row in rows:
            by_prefix.setdefault((row.prompt_index, row.cut), []).append(row)
        for prefix in prefixes:
            prefix.read_tokens += prefix.cut if (prefix.branch, prefix.cut) in by_prefix else 0
        groups = list(by_prefix.items())
        per_prefill = max(1, self.decoder.max_rows // len(groups[0][1]))
        for start in range(0, len(groups), per_prefill):
            block = groups[start : start + per_prefill]
            for source, (_, group) in enumerate(block):
                for row in group:
                    row.source = source
            prompts = [self.branches[branch].token_ids[:cut] for (branch, cut), _ in block]
            flat = [row for _, group in block for row in group]
            self.decoder.decode_prompts(prompts, flat, self.spec, self.on_progress)


def _selected(cache: Any, source_B: torch.Tensor, surplus: int) -> Any:
    """A cache of its own for the rows of a batch; ``surplus`` columns at the end are left out."""
    # A shallow copy of every layer will do: cropping takes a view, selecting makes new tensors.
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    if surplus:
        selected.crop(-surplus)
    selected.batch_select_indices(source_B)
    return selected


def _prefixes(position: int, branch: Branch, spec: SamplingConfig, context: int | None) -> list[_Prefix]:
    """The prefixes of a branch, checked."""
    length, prefixes, before = len(branch.token_ids), [], 0
    for number, cut in enumerate(branch.cuts):
        if not 1 <= cut <= length:
            raise DataError(
                f"branch {branch.index}: cut {cut} is outside 1 to {length}: a cut is the number of tokens before it, "
                "and a model needs at least one token to start from"
            )
        if cut <= before:
            raise DataError(f"branch {branch.index}: cut {cut} comes after cut {before}: cuts must increase")
        if context is not None and cut >= context:
            raise DataError(
                f"branch {branch.index}: the prefix of {cut} tokens leaves no room in the model's context of {context}"
            )
        limit = spec.longest if context is None else min(spec.longest, context - cut)
        prefixes.append(_Prefix(position, number, cut, limit))
        before = cut
    return prefixes


@functools.cache
def _notice(model: str, reason: str) -> None:
    """Logged once."""
    logger.warning(f"{model}: prefixes are read one by one, which is slower, because {reason}")
