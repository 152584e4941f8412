"""Several teachers, of which a column of the data names each row's.

Axes: N targets of a micro-batch, C of one chunk, W buckets of a comparison: the most that any teacher's has, where the
further ones of the others hold nothing on either side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepkd.data.collate import Batch, collate
from stepkd.data.completion import Completion
from stepkd.data.templates import PromptTemplate
from stepkd.losses import DEFAULT_CHUNK
from stepkd.teachers.config import Routed
from stepkd.teachers.signals import Compared, Signals, Teacher

NOTHING = -1e4
"""Log-probability of a bucket that only another teacher has: its probability is 0 in any dtype, and no divergence of
two such buckets is NaN."""


@dataclass(frozen=True)
class RoutedSignals:
    """What every teacher says of the targets that are its own."""

    parts: tuple[Signals, ...]
    part_N: Tensor
    """int64 which of the parts each target belongs to."""
    place_N: Tensor
    """int64 its place there."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See :class:`~stepkd.teachers.signals.Signals`."""
        return (self.part_N, self.place_N)

    def compare(self, log_student_CV: Tensor, *chunk: Tensor) -> Compared:
        """See :class:`~stepkd.teachers.signals.Signals`."""
        part_C, place_C = chunk
        found, chosen = [], []
        for number, part in enumerate(self.parts):
            own = (part_C == number).nonzero()[:, 0]
            tensors = (tensor[place_C[own].to(tensor.device)] for tensor in part.tensors)
            found.append(part.compare(log_student_CV[own], *tensors))
            chosen.append(own)
        order_C, width = torch.cat(chosen).argsort(), max(each.log_teacher_CW.shape[-1] for each in found)
        student, teacher = (
            torch.cat([F.pad(each[side], (0, width - each[side].shape[-1]), value=NOTHING) for each in found])[order_C]
            for side in (0, 1)
        )
        return Compared(student, teacher, torch.cat([each.argmax_C for each in found])[order_C])


class RoutedTeacher(Teacher):
    """See ``Routed`` in :mod:`stepkd.teachers.config`."""

    def __init__(self, spec: Routed) -> None:
        self.column = spec.column
        self.teachers: dict[str, Teacher] = {name: each.build() for name, each in sorted(spec.teachers.items())}

    @property
    def shares_prompts(self) -> bool:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        return all(each.shares_prompts for each in self.teachers.values())

    def bind(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        """Bind all of them; the shortest context is that of all."""
        for each in self.teachers.values():
            each.bind(tokenizer, vocab_size)
        lengths = (each.max_length for each in self.teachers.values())
        self.max_length = min((length for length in lengths if length is not None), default=None)

    def identity(self) -> str:
        """All of theirs, by value of the column."""
        return ", ".join(f"{name}: {each.identity()}" for name, each in self.teachers.items())

    def start(self, precision: str, template: PromptTemplate | None) -> None:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        for each in self.teachers.values():
            each.start(precision, template)

    def shard(self, mesh: Any) -> None:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        for each in self.teachers.values():
            each.shard(mesh)

    def gathered(self) -> AbstractContextManager[Any]:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        whole = ExitStack()
        for each in self.teachers.values():
            whole.enter_context(each.gathered())
        return whole

    def signals(self, batch: Batch, *, temperature: float) -> Signals:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        parts: list[Signals] = []
        part_N, place_N = torch.zeros_like(batch.targets_N), torch.zeros_like(batch.targets_N)
        for teacher, own, own_N in self._shares(batch):
            found = teacher.signals(own, temperature=temperature)
            if own_N is not None:
                part_N[own_N], place_N[own_N] = len(parts), torch.arange(len(own.targets_N), device=place_N.device)
                parts.append(found)
        return RoutedSignals(tuple(parts), part_N, place_N)

    def target_logps(self, batch: Batch, *, temperature: float, chunk_size: int = DEFAULT_CHUNK) -> Tensor:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        logps_N = torch.zeros(len(batch.targets_N), dtype=torch.float64, device=batch.targets_N.device)
        for teacher, own, own_N in self._shares(batch):
            found = teacher.target_logps(own, temperature=temperature, chunk_size=chunk_size)
            if own_N is not None:
                logps_N[own_N] = found.double()
        return logps_N

    def _shares(self, batch: Batch) -> Iterator[tuple[Teacher, Batch, Tensor | None]]:
        """Every teacher with its rows of a batch, and which targets are theirs.

        One whose pass is made by all ranks together makes it in every micro-batch: where no row is its own it reads two
        tokens, and no target is.
        """
        names = [example.row.get(self.column) for example in batch.examples]
        for name, teacher in self.teachers.items():
            rows = [i for i, own in enumerate(names) if own == name]
            if rows:
                share = collate([batch.examples[i] for i in rows], 0, share=self.shares_prompts)
                own_N = torch.isin(batch.completion_N, torch.tensor(rows, device=batch.completion_N.device))
                yield teacher, share.to(batch.targets_N.device), own_N
            elif teacher.needs_all_ranks:
                some = batch.examples[0].prompt_ids[:1]
                share = collate([Completion(some, some, row=batch.examples[0].row)], 0)
                yield teacher, share.to(batch.targets_N.device), None
