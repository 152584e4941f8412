"""Examples to padded tensors, with the positions that predict a target, or at which labelled steps are read.

A packed row is a prompt followed by several of its completions, so that the prompt is read once. Every completion sees
the prompt and itself (an attention mask says so), and its positions go on from the prompt's, so hidden states are those
of separate rows. The last token of the prompt predicts the first one of *every* completion.

Axes: B rows, T padded length, N targets (completion tokens of all rows), R completions of all rows, S steps of all
completions, L labelled steps of all rows, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from stepkd.data.batching import micro_batches
from stepkd.data.completion import Completion
from stepkd.data.encode import Example
from stepkd.data.step_encode import StepExample


@dataclass(frozen=True)
class MicroBatch:
    """A padded micro-batch. ``hidden.flatten(0, 1)[needed_N]`` are the states that predict ``targets_N``."""

    input_ids_BT: Tensor
    """int64 token ids, padded."""
    attention_mask_BT: Tensor
    """int64, 1 for tokens."""
    needed_N: Tensor
    """int64 positions in the flattened (B * T) axis whose *next* token is a target."""
    targets_N: Tensor
    """int64 target ids, row by row in order."""
    row_N: Tensor
    """int64 row of each target."""
    step_N: Tensor
    """int64 step of each target, numbered through the micro-batch (0 .. S-1)."""
    num_steps_B: Tensor
    """int64 number of steps of each row; sums to S."""
    examples: tuple[Example, ...]
    """The rows' examples, in order."""
    is_filler: bool = False
    """Whether it only keeps this rank in step with the others; its loss counts zero."""

    @property
    def ids(self) -> list[str]:
        """Row ids, for error messages."""
        return [example.id for example in self.examples]

    def to(self, device: torch.device) -> MicroBatch:
        """Copy with its tensors on ``device``."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


def collate(
    examples: Sequence[Example],
    pad_id: int,
    *,
    padding_side: Literal["right", "left"] = "right",
    pad_to: int | None = None,
    is_filler: bool = False,
) -> MicroBatch:
    """Pad examples to one length.

    Args:
        examples: at least one, each with a prompt; one without a completion has no targets and no steps.
        pad_id: id written into padding; its value never matters.
        padding_side: where the padding goes; does not change losses or gradients.
        pad_to: pad to at least this many tokens.
        is_filler: see :class:`MicroBatch`.
    """
    rows = [[each.completion] for each in examples]
    tensors = _laid_out(rows, pad_id, padding_side, pad_to)
    common = {field.name: tensors[field.name] for field in fields(MicroBatch) if field.name in tensors}
    return MicroBatch(**common, examples=tuple(examples), is_filler=is_filler)


@dataclass(frozen=True)
class LabelledBatch(MicroBatch):
    """A micro-batch of labelled steps. ``hidden.flatten(0, 1)[read_L]`` are the states that score them."""

    read_L: Tensor = torch.empty(0, dtype=torch.long)  # noqa: RUF009
    """int64 positions in the flattened (B * T) axis, at (not before) the marker or the step's last token."""
    targets_LC: Tensor = torch.empty(0, 0)  # noqa: RUF009
    """float64 target probabilities, worst class first; rows sum to one."""
    right_N: Tensor = torch.empty(0, dtype=torch.bool)  # noqa: RUF009
    """bool, whether each target token belongs to a right step: one whose own label, or for a step without one the next
    label, is the best class."""


def collate_steps(
    examples: Sequence[Example],
    pad_id: int,
    *,
    padding_side: Literal["right", "left"] = "right",
    pad_to: int | None = None,
    is_filler: bool = False,
) -> LabelledBatch:
    """Pad step examples to one length; see :func:`collate`."""
    batch = collate(examples, pad_id, padding_side=padding_side, pad_to=pad_to, is_filler=is_filler)
    length = batch.input_ids_BT.shape[1]
    read: list[int] = []
    targets: list[tuple[float, ...]] = []
    right: list[bool] = []
    for b, example in enumerate(cast(Sequence[StepExample], examples)):
        start = b * length + (length - example.length if padding_side == "left" else 0) + len(example.prompt_ids)
        for position, target in zip(example.read_at, example.targets, strict=True):
            if target is not None:
                read.append(start + position)
                targets.append(target)
        right.extend(_right_tokens(example))
    parts = {f.name: getattr(batch, f.name) for f in fields(MicroBatch)}
    return LabelledBatch(
        **parts,
        read_L=torch.tensor(read, dtype=torch.long),
        targets_LC=torch.tensor(targets, dtype=torch.float64),
        right_N=torch.tensor(right, dtype=torch.bool),
    )


def _right_tokens(example: StepExample) -> list[bool]:
    """Token by token, whether its step is right; steps behind the last label are not."""
    flags, flag = [], False
    for (start, end), target in zip(reversed(example.spans), reversed(example.targets), strict=True):
        if target is not None:
            flag = max(range(len(target)), key=target.__getitem__) == len(target) - 1
        flags.append([flag] * (end - start))
    return [value for step in reversed(flags) for value in step]


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
    rows: dict[bytes | int, list[Unit]] = {}
    keys: dict[bytes, bytes | int] = {}
    for number, unit in enumerate(units):
        prompt = unit.completions[0].prompt_ids.tobytes()
        key = keys.get(prompt, prompt) if share else number
        if share and key in rows and _row_length([*rows[key], unit]) > max_tokens:
            key = keys[prompt] = -number - 1  # a new row for the rest of this prompt's units
        rows.setdefault(key, []).append(unit)
    packs: list[Pack] = list(rows.values())
    lengths = [_row_length(pack) if share else _flat_length(pack) for pack in packs]
    return [[packs[i] for i in group] for group in micro_batches(lengths, max_tokens)]


def _row_length(units: Sequence[Unit]) -> int:
    own = sum(len(completion.token_ids) for unit in units for completion in unit.completions)
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
        padding_side, pad_to, is_filler: as for :func:`collate`.
    """
    rows = [[completion for unit in pack for completion in unit.completions] for pack in packs]
    if not share:
        rows = [[completion] for row in rows for completion in row]
    tensors: dict[str, Any] = _laid_out(rows, pad_id, padding_side, pad_to)
    if all(len(row) == 1 for row in rows):
        tensors["segments_BT"] = None
    examples = tuple(unit.example for pack in packs for unit in pack)
    return PackedBatch(**tensors, examples=examples, is_filler=is_filler)


def _laid_out(
    rows: Sequence[Sequence[Completion]], pad_id: int, padding_side: Literal["right", "left"], pad_to: int | None
) -> dict[str, Tensor]:
    """The tensors of a :class:`PackedBatch`; the completions of a row share its prompt."""
    lengths = [len(row[0].prompt_ids) + sum(len(completion.token_ids) for completion in row) for row in rows]
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
        at = length - lengths[b] if padding_side == "left" else 0
        last = b * length + at + len(prompt) - 1
        for segment, ids in enumerate((prompt, *(completion.token_ids for completion in row))):
            end, position = at + len(ids), len(prompt) if segment else 0
            ids_BT[b, at:end] = torch.from_numpy(ids)
            segments_BT[b, at:end] = segment
            positions_BT[b, at:end] = torch.arange(position, position + len(ids))
            if segment:
                needed += [last, *range(b * length + at, b * length + end - 1)][: len(ids)]
            at = end
        for completion in row:
            targets += completion.token_ids.tolist()
            numbers += [len(counts)] * len(completion.token_ids)
            steps += [len(owners) + s for s, (low, high) in enumerate(completion.spans) for _ in range(low, high)]
            owners += [len(counts)] * len(completion.spans)
            counts.append(len(completion.spans))
    return {
        "input_ids_BT": ids_BT,
        "attention_mask_BT": (segments_BT >= 0).long(),
        "needed_N": torch.tensor(needed, dtype=torch.long),
        "targets_N": torch.tensor(targets, dtype=torch.long),
        "row_N": torch.tensor(numbers, dtype=torch.long),
        "step_N": torch.tensor(steps, dtype=torch.long),
        "num_steps_B": torch.tensor(counts, dtype=torch.long),
        "position_ids_BT": positions_BT,
        "segments_BT": segments_BT,
        "completion_S": torch.tensor(owners, dtype=torch.long),
    }
