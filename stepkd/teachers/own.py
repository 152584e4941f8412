"""A student that is its own teacher: as it was a while ago, as a running average, or as it was before training.

Progressive self-distillation (PS-KD, arXiv 2006.12000) keeps the class probabilities that the model gave an epoch ago.
Over a vocabulary these are too many to keep, so the weights of an epoch ago are kept in their place and read again; the
running average is the mean teacher's (arXiv 1703.01780). Only what is trained is kept twice: frozen weights are shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepkd.data.collate import Batch
from stepkd.models.head import evaluation_mode
from stepkd.models.policy import Policy
from stepkd.models.sharding import WeightAverage, whole_tensor
from stepkd.teachers.signals import HiddenSignals, Signals, Teacher


class SelfTeacher(Teacher):
    """A frozen copy of the student, which subclasses renew."""

    _student: Policy
    _copy: Policy

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def follow(self, student: Policy) -> None:
        """Take the student as it is now as the first teacher."""
        self._student = student
        self._copy = _twin(student)
        self._copy.requires_grad_(False).eval()

    def bind(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        """Nothing to compare: it is the student's vocabulary."""

    def identity(self) -> str:
        """Which kind it is; its weights change with the student's."""
        return type(self).__name__

    @torch.no_grad()
    def signals(self, batch: Batch, *, temperature: float) -> Signals:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        copied = self._copy
        # Always: shared weights have moved with the student, so that none tells where the rest is.
        copied.to(self._student.device)
        with evaluation_mode(copied):
            hidden_BTH = copied.hidden(batch.input_ids_BT, batch.attention_mask_BT, batch.shared_BT)
        return self._signals(copied.head, hidden_BTH, batch, temperature)

    def state(self) -> dict[str, Any]:
        """The weights that are not the student's."""
        return {"weights": {name: value.detach().cpu().clone() for name, value in self._kept().items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        self._refresh(state["weights"])

    def _signals(self, head: Any, hidden_BTH: Tensor, batch: Batch, temperature: float) -> Signals:
        return HiddenSignals(head, hidden_BTH.flatten(0, 1)[batch.needed_N], temperature, self.spec.top_k)

    def _kept(self) -> Mapping[str, Tensor]:
        """Parameters of the copy that have a trained twin in the student."""
        trained = {name for name, _ in self._student.trainable_parameters()}
        return {name: parameter for name, parameter in self._copy.named_parameters() if name in trained}

    @torch.no_grad()
    def _refresh(self, weights: Mapping[str, Tensor]) -> None:
        for name, target in SelfTeacher._kept(self).items():
            target.copy_(whole_tensor(weights[name]).to(target.device))


class SnapshotTeacher(SelfTeacher):
    """See ``SelfSnapshot`` in :mod:`stepkd.teachers.config`."""

    _epoch = 0

    def begin(self, epoch: int) -> None:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        if self.spec.every is None and epoch > self._epoch:
            self._refresh(dict(self._student.trainable_parameters()))
        self._epoch = epoch

    def after_step(self, steps: int) -> None:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        if self.spec.every is not None and steps % self.spec.every == 0:
            self._refresh(dict(self._student.trainable_parameters()))

    def state(self) -> dict[str, Any]:
        """The weights, and the pass over the data that they are of."""
        return {"epoch": self._epoch} | super().state()

    def restore(self, state: dict[str, Any]) -> None:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        self._epoch = int(state["epoch"])
        super().restore(state)


class AverageTeacher(SelfTeacher):
    """See ``SelfAverage`` in :mod:`stepkd.teachers.config`."""

    def follow(self, student: Policy) -> None:
        """Take the student as it is now as the first teacher."""
        super().follow(student)
        self._average = WeightAverage(student.trainable_parameters(), self.spec.decay)

    def after_step(self, steps: int) -> None:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        self._average.update(self._student.trainable_parameters())
        self._refresh(self._average.average)

    def restore(self, state: dict[str, Any]) -> None:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        self._average.load_state_dict(state["weights"])
        super().restore(state)

    def _kept(self) -> Mapping[str, Tensor]:
        return self._average.state_dict()  # in float32, whatever the weights are in


class BaseTeacher(SelfTeacher):
    """See ``SelfBase`` in :mod:`stepkd.teachers.config`."""

    def follow(self, student: Policy) -> None:
        """Keep a copy, unless there is an adapter to switch off."""
        self._student = student
        if student.spec is None or student.spec.lora is None:
            student.set_reference(_twin(student))

    @torch.no_grad()
    def signals(self, batch: Batch, *, temperature: float) -> Signals:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        student = self._student
        with student.reference() as view:
            hidden_BTH = view.hidden(batch.input_ids_BT, batch.attention_mask_BT, batch.shared_BT)

        def reference_head(hidden_CH: Tensor) -> Tensor:  # an adapter on the head is off in it, too
            with student.reference() as view:
                return view.head(hidden_CH)

        return self._signals(reference_head, hidden_BTH, batch, temperature)

    def state(self) -> dict[str, Any]:
        """Nothing: the weights before training are loaded again."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""


def _twin(student: Policy) -> Policy:
    """A copy that shares what is not trained."""
    return student.twin({id(p): p for p in student.parameters() if not p.requires_grad})
