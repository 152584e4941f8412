"""Examples to padded tensors, with the positions that predict a target, or at which labelled steps are read.

Axes: B rows, T padded length, N targets (completion tokens of all rows), S steps of all rows, L labelled steps of all
rows, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, cast

import torch
from torch import Tensor

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
    length = max([example.length for example in examples] + [pad_to or 0])
    ids = torch.full((len(examples), length), pad_id, dtype=torch.long)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    needed: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    steps: list[int] = []
    num_steps = 0
    for b, example in enumerate(examples):
        start = length - example.length if padding_side == "left" else 0
        tokens = (*example.prompt_ids, *example.completion_ids)
        ids[b, start : start + len(tokens)] = torch.tensor(tokens)
        mask[b, start : start + len(tokens)] = 1
        first = b * length + start + len(example.prompt_ids) - 1
        needed.extend(range(first, first + len(example.completion_ids)))
        targets.extend(example.completion_ids)
        rows.extend([b] * len(example.completion_ids))
        steps.extend(num_steps + s for s, (lo, hi) in enumerate(example.spans) for _ in range(lo, hi))
        num_steps += len(example.spans)
    return MicroBatch(
        input_ids_BT=ids,
        attention_mask_BT=mask,
        needed_N=torch.tensor(needed, dtype=torch.long),
        targets_N=torch.tensor(targets, dtype=torch.long),
        row_N=torch.tensor(rows, dtype=torch.long),
        step_N=torch.tensor(steps, dtype=torch.long),
        num_steps_B=torch.tensor([len(example.spans) for example in examples], dtype=torch.long),
        examples=tuple(examples),
        is_filler=is_filler,
    )


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
    """Pad step examples to one length; see :func:`stepkd.data.collate.collate`."""
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
