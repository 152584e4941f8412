"""A student that is its own teacher: as it was a while ago, as a running average, or as it was before training.

Progressive self-distillation (PS-KD, arXiv 2006.12000) keeps the class probabilities that the model gave an epoch ago.
Over a vocabulary these are too many to keep, so the weights of an epoch ago are kept in their place and read again; the
running average is the mean teacher's (arXiv 1703.01780). Only what is trained is kept twice: frozen weights are shared.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepkd.data.collate import Batch
from stepkd.data.encode import Example
from stepkd.models.head import evaluation_mode
from stepkd.models.policy import Policy
from stepkd.models.sharding import WeightAverage, whole_tensor
from stepkd.teachers.local import TeacherConfig
from stepkd.teachers.signals import HiddenSignals, Signals

DECAY = 0.999
"""Of a running average, per optimiser step."""


class SelfTeacher:
    """See :attr:`TeacherConfig.itself <stepkd.teachers.local.TeacherConfig.itself>`.

    Args:
        spec: which of its forms.
        top_k, tail: as for :class:`~stepkd.teachers.local.LocalTeacher`.
    """

    def __init__(self, spec: TeacherConfig, *, top_k: int | None = None, tail: bool = True) -> None:
        self.spec = spec
        self.top_k = top_k
        self.tail = tail
        self._student: Policy | None = None
        self._copy: Policy | None = None
        self._average: WeightAverage | None = None
        self._epoch = 0

    def follow(self, student: Policy) -> None:
        """Take the student as it is now as the first teacher.

        Args:
            student: loaded, not yet wrapped or trained by anything.
        """
        self._student = student
        if self.spec.itself == "base":
            if student.spec is None or student.spec.lora is None:
                student.set_reference(_twin(student))
            return
        self._copy = _twin(student)
        self._copy.requires_grad_(False).eval()
        if self.spec.itself == "ema":
            self._average = WeightAverage(student.trainable_parameters(), self.spec.decay or DECAY)

    def bind(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        """Nothing to compare: it is the student's vocabulary."""

    def identity(self) -> str:
        """Which form it has; its weights change with the student's."""
        return f"itself: {self.spec.itself}"

    def prompts(self, examples: Sequence[Example]) -> list[tuple[int, ...]]:
        """The student's own."""
        return [example.prompt_ids for example in examples]

    @torch.no_grad()
    def signals(self, batch: Batch, *, temperature: float) -> Signals:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        student = self._followed()
        if self._copy is None:
            with student.reference() as view:
                hidden_BTH = view.hidden(batch.input_ids_BT, batch.attention_mask_BT)

            def reference_head(hidden_CH: Tensor) -> Tensor:  # an adapter on the head is off in it, too
                with student.reference() as view:
                    return view.head(hidden_CH)

            head: Any = reference_head
        else:
            # Always: shared weights have moved with the student, so that no single one of them tells where the rest is.
            self._copy.to(student.device)
            with evaluation_mode(self._copy):
                hidden_BTH = self._copy.hidden(batch.input_ids_BT, batch.attention_mask_BT)
            head = self._copy.head
        return HiddenSignals(head, hidden_BTH.flatten(0, 1)[batch.needed_N], temperature, self.top_k, self.tail)

    # ---- keeping up ------------------------------------------------------------------------------------------------

    def begin(self, epoch: int) -> None:
        """Told before every batch how many passes over the data are complete."""
        if self.spec.itself == "epoch" and self.spec.every is None and epoch > self._epoch:
            self._refresh(dict(self._followed().trainable_parameters()))
        self._epoch = epoch

    def after_step(self, steps: int) -> None:
        """Told after every optimiser step how many there have been."""
        if self._average is not None:
            self._average.update(self._followed().trainable_parameters())
            self._refresh(self._average.average)
        elif self.spec.every is not None and steps % self.spec.every == 0:
            self._refresh(dict(self._followed().trainable_parameters()))

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold: the weights that are not the student's, and the pass they are of."""
        if self._copy is None:
            return {"epoch": self._epoch}
        kept = self._average.state_dict() if self._average is not None else self._targets()
        return {"epoch": self._epoch, "weights": {name: value.detach().cpu().clone() for name, value in kept.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave, in a fresh process that has not trained yet."""
        self._epoch = int(state["epoch"])
        if self._copy is None:
            return
        if self._average is not None:
            self._average.load_state_dict(state["weights"])
        self._refresh(state["weights"])

    def _followed(self) -> Policy:
        if self._student is None:
            raise RuntimeError("the student is given by follow()")
        return self._student

    def _targets(self) -> dict[str, nn.Parameter]:
        """Parameters of the copy that have a trained twin in the student."""
        assert self._copy is not None
        trained = {name for name, _ in self._followed().trainable_parameters()}
        return {name: parameter for name, parameter in self._copy.named_parameters() if name in trained}

    @torch.no_grad()
    def _refresh(self, weights: dict[str, Any]) -> None:
        for name, target in self._targets().items():
            target.copy_(whole_tensor(weights[name]).to(target.device))


def _twin(student: Policy) -> Policy:
    """A copy that shares what is not trained."""
    shared = {id(p): p for p in student.parameters() if not p.requires_grad}
    return Policy(copy.deepcopy(student.model, shared), student.tokenizer, student.spec, verify_head=False)
