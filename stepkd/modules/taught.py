"""What methods with a teacher share: binding it, knowing it again, and cutting it up beside the student."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from stepkd.data.templates import template_name
from stepkd.errors import ConfigError
from stepkd.models.dropout import disable_dropout
from stepkd.models.trained_template import trained_template
from stepkd.modules.base import StepModule
from stepkd.modules.checkpoint_state import check_frozen_model
from stepkd.teachers import CachedTeacher, LocalTeacher, SelfTeacher, TeacherSpec

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
        self._check_context()
        if isinstance(self.teacher, LocalTeacher):
            self.teacher.check_sharded()
            self._warn_of_template(self.teacher.spec)

    def _warn_of_template(self, spec: TeacherSpec) -> None:
        """Say when the teacher was trained to read other prompts than the student's, and is to read those."""
        used = getattr(self.datamodule, "template", None)
        trained = None if spec.template is not None else trained_template(str(spec.path))
        if used is not None and trained not in (None, used) and self.trainer.is_global_zero:
            names = template_name(used), template_name(trained)
            logger.warning(
                "prompt template: the teacher reads the student's prompts (%s); it was trained with %s, which "
                "teacher.template gives it",
                *names,
            )

    def _check_context(self) -> None:
        """Refuse data and samples that are longer than the teacher's context."""
        context = getattr(self.teacher, "max_length", None)
        self.check_data_fits("teacher", context)
        new, examples = self.new_tokens(), getattr(self.datamodule, "examples", {}).get("train", ())
        prompt = max((len(each.prompt_ids) for each in examples), default=0)
        sampled = min(prompt + new, self.model.max_length or 2**63) if new else 0
        if context is not None and examples and sampled > context:
            raise ConfigError(
                f"a prompt and {new} new tokens: up to {sampled} tokens, and the teacher's context is {context}: lower "
                "it, or take a teacher of a longer context"
            )

    def new_tokens(self) -> int:
        """Most tokens of a completion that is sampled for the teacher to score; 0: none is sampled."""
        return 0

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
