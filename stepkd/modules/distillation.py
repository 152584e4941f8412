"""What methods with a teacher share: a teacher that scores the policy's text, and whose state the checkpoint keeps."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from stepkd.data.collate import Batch
from stepkd.modules.base import StepModule
from stepkd.modules.components import ForwardPass
from stepkd.teachers.routed import RoutedTeacher
from stepkd.teachers.signals import Teacher


class DistillationModule(StepModule):
    """Base of methods whose ``teacher`` scores the policy's text; None: there is none.

    Dropout is off, so that the policy that samples is the one that learns.
    """

    teacher: Teacher | None = None
    teacher_temperature = 1.0
    """Divides the logits that it is read at."""
    reads_targets = False
    """Whether the loss reads the teacher's log-probability of the targets alone."""
    new_tokens = 0
    """Most tokens of a completion that is sampled for the teacher to score; 0: none is sampled."""
    without_dropout = "the model that samples is the one that learns"

    @property
    def shares_prompts(self) -> bool:
        """Where the teacher's pass saves what the policy's saves: micro-batches have to fit both."""
        return super().shares_prompts and (self.teacher is None or self.teacher.shares_prompts)

    def forward_pass(self, micro_batch: Batch) -> ForwardPass:
        """With what the teacher says of the micro-batch."""
        forward = super().forward_pass(micro_batch)
        if self.teacher is not None and self.distils(micro_batch):
            temperature, size = self.teacher_temperature, self.chunk_size
            if self.reads_targets:
                forward.teacher_N = self.teacher.target_logps(micro_batch, temperature=temperature, chunk_size=size)
            else:
                forward.signals = self.teacher.signals(micro_batch, temperature=temperature)
        return forward

    def choices(self, split: str) -> Mapping[str, Collection[str]]:
        """Columns of a split's rows that choose something, such as the row's teacher -> the values they may have."""
        if isinstance(self.teacher, RoutedTeacher) and split != "predict":
            return {self.teacher.column: self.teacher.teachers}
        return {}

    def distils(self, micro_batch: Batch) -> bool:
        """Whether the loss of a micro-batch reads the teacher; where it does not, the teacher is not run on it."""
        return True

    def complete_model(self) -> None:
        """Bind the teacher to the policy."""
        if self.teacher is not None:
            self.teacher.follow(self.model)
            self.teacher.bind(self.model.tokenizer, self.model.vocab_size)
            self.frozen["teacher"] = self.teacher.identity()

    def check_run(self) -> None:
        """Have the teacher check the run, too, and refuse text that is longer than its context."""
        super().check_run()
        if self.teacher is not None:
            template = self.template if self.trainer.is_global_zero and self.trainer.training else None
            self.teacher.start(str(self.trainer.precision), template)
            self.check_data_fits("teacher", self.teacher.max_length, self.new_tokens)

    def shard(self, mesh: Any) -> None:
        """The teacher, too, if it asks for that."""
        super().shard(mesh)
        if self.teacher is not None:
            self.teacher.shard(mesh)

    def gathered(self) -> AbstractContextManager[Any]:
        """With the teacher whole, too."""
        whole = ExitStack()
        whole.enter_context(super().gathered())
        if self.teacher is not None:
            whole.enter_context(self.teacher.gathered())
        return whole

    def method_state(self) -> dict[str, Any]:
        """What a teacher that keeps up with the policy needs to be made again."""
        state = {} if self.teacher is None else self.teacher.state()
        return {"teacher": state} if state else {}

    def adopt_method_state(self, state: dict[str, Any]) -> None:
        """Take over the teacher's state."""
        if self.teacher is not None and "teacher" in state:
            self.teacher.restore(state["teacher"])
