"""What methods with a teacher share, whatever they do with what it says."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from stepkd.data.collate import Batch
from stepkd.data.datamodule import StepData
from stepkd.errors import ConfigError
from stepkd.modules.base import StepModule
from stepkd.modules.components import ForwardPass
from stepkd.runs.job import ALONE, JobOptions
from stepkd.teachers.cache import write_cache
from stepkd.teachers.local import LocalTeacher
from stepkd.teachers.signals import Teacher

_CPU = torch.device("cpu")


class DistillationModule(StepModule):
    """Base of methods whose ``teacher`` scores the policy's text; None: there is none.

    Dropout is off, so that the policy that samples is the one that learns.
    """

    teacher: Teacher | None = None
    teacher_temperature = 1.0
    """Divides the logits that it is read at."""
    without_dropout = "the model that samples is the one that learns"

    @property
    def shares_prompts(self) -> bool:
        """Where the teacher's pass saves what the policy's saves: micro-batches have to fit both."""
        return super().shares_prompts and (self.teacher is None or self.teacher.shares_prompts)

    def forward_pass(self, micro_batch: Batch) -> ForwardPass:
        """With what the teacher says of the micro-batch."""
        forward = super().forward_pass(micro_batch)
        if self.teacher is not None and self.distils(micro_batch):
            forward.signals = self.teacher.signals(micro_batch, temperature=self.teacher_temperature)
        return forward

    def distils(self, micro_batch: Batch) -> bool:
        """Whether the loss of a micro-batch reads the teacher."""
        return True

    def new_tokens(self) -> int:
        """Most tokens of a completion that is sampled for the teacher to score; 0: none is sampled."""
        return 0

    def complete_model(self) -> None:
        """Bind the teacher to the policy."""
        if self.teacher is not None:
            self.teacher.follow(self.model)
            self.teacher.bind(self.model.tokenizer, self.model.vocab_size)
            self.keep_in_mind("teacher", self.teacher.identity(), "under another teacher")

    def on_fit_start(self) -> None:
        """Have the teacher check the run, and refuse text that is longer than its context."""
        super().on_fit_start()
        if self.teacher is not None:
            template = self.template if self.trainer.is_global_zero else None
            self.teacher.start(str(self.trainer.precision), template)
            self._check_context(self.teacher.max_length)

    def _check_context(self, context: int | None) -> None:
        self.check_data_fits("teacher", context)
        new, examples = self.new_tokens(), getattr(self.datamodule, "examples", {}).get("train", ())
        prompt = max((len(each.prompt_ids) for each in examples), default=0)
        sampled = min(prompt + new, self.model.max_length or 2**63) if new else 0
        if context is not None and examples and sampled > context:
            raise ConfigError(
                f"a prompt and {new} new tokens: up to {sampled} tokens, and the teacher's context is {context}: lower "
                "it, or take a teacher of a longer context"
            )

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


def cache_teacher(
    module: StepModule,
    data: StepData,
    out: str | Path,
    *,
    top_k: int,
    validation: bool = True,
    device: torch.device = _CPU,
    precision: str = "32-true",
    options: JobOptions = ALONE,
) -> dict[str, Any]:
    """Write the cache that a distillation module with the teacher Cached reads, or resume.

    Args:
        module: a module with a divergence and a teacher in this process, not attached to a Trainer.
        data: its data; the completions of the training data are scored.
        out: folder of the cache.
        top_k, precision, options: as for :func:`~stepkd.teachers.cache.write_cache`.
        validation: score those of the validation data, too.
        device: where the teacher computes.

    Returns:
        See :func:`~stepkd.teachers.cache.write_cache`.

    Raises:
        ConfigError: another module or teacher; and what ``write_cache`` refuses.
    """
    teacher, divergence = getattr(module, "teacher", None), getattr(module, "divergence", None)
    if divergence is None or not isinstance(teacher, LocalTeacher):
        raise ConfigError("a teacher's cache needs a distillation recipe (GKDModule) with the teacher Local")
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)  # type: ignore[assignment]
    data.setup("fit")
    names = ("train", "validation") if validation else ("train",)
    teacher.bind(module.tokenizer)
    teacher.place(device)
    return write_cache(
        out,
        teacher,
        [example for name in names for example in data.examples.get(name, [])],
        top_k=top_k,
        temperature=divergence.logits_temperature,
        max_tokens=module.micro_batch_tokens,
        chunk_size=module.chunk_size,
        precision=precision,
        options=options,
    )
