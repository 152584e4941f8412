"""Several completions of one prompt in one row, so that the prompt is read once.

A packed row is the prompt followed by its completions. Every completion sees the prompt and itself (an attention mask
says so), and its positions go on from the prompt's, so hidden states are those of separate rows. The last token of the
prompt predicts the first one of *every* completion.

Axes: B rows, T padded length, N completion tokens (targets) of all rows, R completions of all rows, S steps of all
completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stepkd.data.batching import micro_batches
from stepkd.data.collate import MicroBatch
from stepkd.data.encode import Example
from stepkd.steps import Span


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt, as token ids."""

    prompt_ids: tuple[int, ...]
    """What it goes on from, at least one id."""
    ids: tuple[int, ...]
    """Its own ids, at least one."""
    spans: tuple[Span, ...]
    """Step spans: a partition of ``range(len(ids))``."""

    @property
    def length(self) -> int:
        """Prompt plus completion, in tokens."""
        return len(self.prompt_ids) + len(self.ids)


@dataclass(frozen=True)
class PackedBatch(MicroBatch):
    """A micro-batch of completions. ``row_N`` numbers completions (0 .. R-1), and ``num_steps_B`` has R entries."""

    position_ids_BT: Tensor = torch.empty(0, 0, dtype=torch.long)  # noqa: RUF009
    """int64 position of every token in its own sequence."""
    segments_BT: Tensor | None = None
    """int64: 0 for a prompt, 1, 2, ... for the completions of its row, -1 for padding; None where no row is shared."""
    completion_S: Tensor = torch.empty(0, dtype=torch.long)  # noqa: RUF009
    """int64 completion of every step."""
    reference_N: Tensor | None = None
    """Log-probability of every target under the reference model; None until it is computed."""

    @property
    def num_completions(self) -> int:
        """R."""
        return len(self.num_steps_B)


@dataclass(frozen=True)
class Unit:
    """What is put into a micro-batch as a whole: an example and its completions (one, or the two sides of a pair)."""

    example: Example
    """The example."""
    completions: tuple[Completion, ...]
    """Its completions, all of one prompt."""


Pack = list[Unit]
"""Units of one prompt that share a row (or a single unit)."""


def plan_packs(units: Sequence[Unit], max_tokens: int, *, share: bool) -> list[list[Pack]]:
    """Cut units into micro-batches of at most ``max_tokens`` tokens, padding included.

    Args:
        units: what to train on; a unit is never split.
        max_tokens: rows times longest row; a larger unit gets a micro-batch of its own.
        share: whether completions of one prompt will share a row.

    Returns:
        Micro-batches, longest rows first; each a list of packs, which have a row each when ``share``.
    """
    rows: dict[tuple[int, ...] | int, list[Unit]] = {}
    keys: dict[tuple[int, ...], tuple[int, ...] | int] = {}
    for number, unit in enumerate(units):
        prompt = unit.completions[0].prompt_ids
        key = keys.get(prompt, prompt) if share else number
        if share and key in rows and _row_length([*rows[key], unit]) > max_tokens:
            key = keys[prompt] = -number - 1  # a new row for the rest of this prompt's units
        rows.setdefault(key, []).append(unit)
    packs: list[Pack] = list(rows.values())
    lengths = [_row_length(pack) if share else _flat_length(pack) for pack in packs]
    return [[packs[i] for i in group] for group in micro_batches(lengths, max_tokens)]


def _row_length(units: Sequence[Unit]) -> int:
    own = sum(len(completion.ids) for unit in units for completion in unit.completions)
    return len(units[0].completions[0].prompt_ids) + own


def _flat_length(units: Sequence[Unit]) -> int:
    """Padded tokens that a unit without sharing costs: each of its completions is a row of its own."""
    lengths = [completion.length for unit in units for completion in unit.completions]
    return len(lengths) * max(lengths)


def collate_packed(
    packs: Sequence[Sequence[Unit]],
    pad_id: int,
    *,
    share: bool = True,
    padding_side: Literal["right", "left"] = "right",
    pad_to: int | None = None,
    is_filler: bool = False,
) -> PackedBatch:
    """Pad completions to one length, those of one pack in one row.

    Args:
        packs: at least one; the units of a pack have one prompt.
        pad_id: id written into padding; its value never matters.
        share: put the completions of a pack into one row; else each has its own.
        padding_side, pad_to, is_filler: as for :func:`stepkd.data.collate.collate`.
    """
    rows = [[completion for unit in pack for completion in unit.completions] for pack in packs]
    if not share:
        rows = [[completion] for row in rows for completion in row]
    lengths = [len(row[0].prompt_ids) + sum(len(completion.ids) for completion in row) for row in rows]
    length = max([*lengths, pad_to or 0])
    ids_BT = torch.full((len(rows), length), pad_id, dtype=torch.long)
    segments_BT = torch.full((len(rows), length), -1, dtype=torch.long)
    positions_BT = torch.zeros((len(rows), length), dtype=torch.long)
    needed: list[int] = []
    targets: list[int] = []
    numbers: list[int] = []
    steps: list[int] = []
    owners: list[int] = []
    counts: list[int] = []
    for b, row in enumerate(rows):
        prompt = row[0].prompt_ids
        start = length - lengths[b] if padding_side == "left" else 0
        at = start + len(prompt)
        _write(ids_BT, segments_BT, positions_BT, b, start, prompt, 0, 0)
        for k, completion in enumerate(row, start=1):
            size = len(completion.ids)
            _write(ids_BT, segments_BT, positions_BT, b, at, completion.ids, k, len(prompt))
            needed += [b * length + start + len(prompt) - 1, *range(b * length + at, b * length + at + size - 1)]
            targets += completion.ids
            numbers += [len(counts)] * size
            steps += [len(owners) + s for s, (low, high) in enumerate(completion.spans) for _ in range(low, high)]
            owners += [len(counts)] * len(completion.spans)
            counts.append(len(completion.spans))
            at += size
    shared = any(len(row) > 1 for row in rows)
    return PackedBatch(
        input_ids_BT=ids_BT,
        attention_mask_BT=(segments_BT >= 0).long(),
        needed_N=torch.tensor(needed, dtype=torch.long),
        targets_N=torch.tensor(targets, dtype=torch.long),
        row_N=torch.tensor(numbers, dtype=torch.long),
        step_N=torch.tensor(steps, dtype=torch.long),
        num_steps_B=torch.tensor(counts, dtype=torch.long),
        examples=tuple(unit.example for pack in packs for unit in pack),
        is_filler=is_filler,
        position_ids_BT=positions_BT,
        segments_BT=segments_BT if shared else None,
        completion_S=torch.tensor(owners, dtype=torch.long),
    )


def _write(
    ids_BT: Tensor,
    segments_BT: Tensor,
    positions_BT: Tensor,
    b: int,
    at: int,
    ids: tuple[int, ...],
    segment: int,
    position: int,
) -> None:
    end = at + len(ids)
    ids_BT[b, at:end] = torch.tensor(ids)
    segments_BT[b, at:end] = segment
    positions_BT[b, at:end] = torch.arange(position, position + len(ids))
