"""Step examples to padded tensors, with the positions at which labelled steps are read.

Axes: B rows, T padded length, L labelled steps of all rows, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, cast

import torch
from torch import Tensor

from stepkd.data.collate import MicroBatch, collate
from stepkd.data.encode import Example
from stepkd.data.step_encode import StepExample


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
