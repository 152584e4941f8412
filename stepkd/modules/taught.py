"""What methods with a teacher share: binding it, knowing it again, and cutting it up beside the student."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from stepkd.models.dropout import disable_dropout
from stepkd.modules.base import StepModule
from stepkd.modules.checkpoint_state import check_frozen_model
from stepkd.teachers import CachedTeacher, LocalTeacher, SelfTeacher

logger = logging.getLogger(__name__)


class TaughtModule(StepModule):
    """Base of methods whose ``teacher`` scores the policy's text; None: there is none.

    Dropout is off, so that the policy that samples is the one that learns.
    """

    teacher: Any = None
    _teacher_identity = ""

    def configure_model(self) -> None:
        """Load the policy, switch its dropout off, and bind the teacher to it (once)."""
        if self.policy is not None:
            return
        super().configure_model()
        if disable_dropout(self.model.causal_lm):
            logger.info("dropout is switched off: the model that samples is the one that learns")
        if isinstance(self.teacher, SelfTeacher):
            self.teacher.follow(self.model)
        if self.teacher is not None:
            self.teacher.bind(self.model.tokenizer, self.model.vocab_size)
            self._teacher_identity = self.teacher.identity()

    def on_fit_start(self) -> None:
        """Refuse a teacher that was to be cut up and is not, and a cache of another precision."""
        super().on_fit_start()
        if isinstance(self.teacher, CachedTeacher):
            self.teacher.check_precision(str(self.trainer.precision))
        if isinstance(self.teacher, LocalTeacher):
            self.teacher.check_sharded()

    def shard(self, mesh: Any) -> None:
        """The teacher, too, if it asks for that."""
        super().shard(mesh)
        if isinstance(self.teacher, LocalTeacher):
            self.teacher.shard(mesh)

    def gathered(self) -> AbstractContextManager[Any]:
        """With the teacher whole, too."""
        whole = ExitStack()
        whole.enter_context(super().gathered())
        if isinstance(self.teacher, LocalTeacher):
            whole.enter_context(self.teacher.gathered())
        return whole

    def method_state(self) -> dict[str, Any]:
        """Which teacher the run has learnt from."""
        return {"teacher": self._teacher_identity}

    def restore_method_state(self, state: dict[str, Any]) -> None:
        """Refuse to go on under another teacher.

        Raises:
            ModelError: the teacher's weights are not those of the run so far.
        """
        earlier = state.get("teacher", self._teacher_identity)
        check_frozen_model("under another teacher", earlier, self._teacher_identity, "teacher.path")
