"""A teacher in this process: another model of the same vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from stepkd.data.collate import Batch, collate
from stepkd.data.completion import Completion
from stepkd.data.templates import PromptTemplate, template_name
from stepkd.errors import ConfigError, ModelError
from stepkd.models.checkpoint import load_trained, weights_fingerprint
from stepkd.models.machine import device_room
from stepkd.models.policy import Policy
from stepkd.models.sharding import shard
from stepkd.models.source import trained_template
from stepkd.sampling.annotate import check_same_vocabulary
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.teachers.config import Local
from stepkd.teachers.signals import HiddenSignals, Signals, Teacher

logger = logging.getLogger(__name__)

ROOM = 0.9
"""Share of a device's free memory that a teacher's weights may take."""


@dataclass(eq=False)
class LocalTeacher(Teacher):
    """A frozen model beside the student."""

    spec: Local
    _policy: Policy | None = field(default=None, init=False)
    _is_sharded: bool = field(default=False, init=False)

    @property
    def policy(self) -> Policy:
        """The loaded model."""
        if self._policy is None:
            raise RuntimeError("the teacher is loaded by bind()")
        return self._policy

    @property
    def shares_prompts(self) -> bool:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        return self.policy.shares_prompts

    @property
    def needs_all_ranks(self) -> bool:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        return self._is_sharded

    def bind(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        """Load the model (once) and compare vocabularies; see :class:`~stepkd.teachers.signals.Teacher`.

        Raises:
            ModelError: nothing loadable, another vocabulary, or a reward model.
        """
        if self._policy is not None:
            return
        spec = self.spec
        policy = load_trained(spec.path, dtype=spec.dtype, attention=spec.attention, quantization=spec.quantization)
        if policy.step_head is not None:
            raise ModelError(f"teacher.path={spec.path} is a reward model: a teacher is a language model")
        check_same_vocabulary(tokenizer, policy.tokenizer)
        policy.vocab_size = min(policy.vocab_size, vocab_size or policy.vocab_size)  # the student may have spare ids
        if vocab_size not in (None, policy.vocab_size):
            raise ModelError(
                f"the teacher has logits for {policy.vocab_size} tokens and the student for {vocab_size}, "
                "under one tokenizer: one of them was not resized to it; resize its embeddings and save it again"
            )
        policy.requires_grad_(False).eval()
        self._policy, self.max_length = policy, policy.max_length
        self._read_under(spec.template, policy.tokenizer)

    def identity(self) -> str:
        """Fingerprint of its weights."""
        return weights_fingerprint(self.policy)

    @torch.no_grad()
    def signals(self, batch: Batch, *, temperature: float) -> Signals:
        """Hidden states at every target; see :class:`~stepkd.teachers.signals.Teacher`.

        Raises:
            ConfigError: a prompt and completion that are longer than its context.
        """
        policy = self.policy
        self.place(batch.input_ids_BT.device)
        own = batch
        if self.spec.template is not None:  # targets keep their order
            pad_id = int(policy.tokenizer.pad_token_id or 0)
            own = collate(self.reread(batch.examples), pad_id, share=self.shares_prompts)
        check_context(self, own.examples)
        own = own.to(policy.device)
        # As a forward pass of the model, which gathers embeddings and head.
        hidden_BTH = policy(policy.hidden, own.input_ids_BT, own.attention_mask_BT, own.shared_BT)
        hidden_NH = hidden_BTH.flatten(0, 1)[own.needed_N]
        return HiddenSignals(policy.head, hidden_NH, temperature, self.spec.top_k)

    def shard(self, mesh: Any) -> None:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        if self.spec.sharded and not self._is_sharded:
            shard(self.policy, mesh)
            self._is_sharded = True

    def gathered(self) -> AbstractContextManager[Any]:
        """See :class:`~stepkd.teachers.signals.Teacher`."""
        return self.policy.gathered()

    def start(self, precision: str, template: PromptTemplate | None) -> None:
        """See :class:`~stepkd.teachers.signals.Teacher`; say when it was trained to read other prompts.

        Raises:
            ConfigError: it was to be sharded, and the strategy shards nothing.
        """
        if self.spec.sharded and not self._is_sharded:
            raise ConfigError(
                "teacher.sharded: true needs several ranks under recipes/strategy/fsdp2.yaml (trainer.strategy)"
            )
        trained = None if template is None or self.spec.template is not None else trained_template(self.spec.path)
        if template is not None and trained not in (None, template):
            logger.warning(
                "prompt template: the teacher reads the student's prompts (%s); it was trained with %s, which "
                "teacher.template gives it",
                template_name(template),
                template_name(trained),
            )

    def engine(self, device: torch.device, breaks_off: Callable[[], bool] | None = None) -> TransformersEngine:
        """What draws its completions, on a device where they fit (:meth:`place`)."""
        self.place(device)
        return TransformersEngine(self.policy, breaks_off=breaks_off)

    def place(self, device: torch.device) -> None:
        """Move the weights where they belong (its own device, else this one), once, when they fit.

        Raises:
            ModelError: there is no room for them.
        """
        policy = self.policy
        if self._is_sharded:
            return
        wanted = device if self.spec.device is None else torch.device(self.spec.device)
        if policy.device.type == wanted.type and wanted.index in (None, policy.device.index):
            return
        check_room(policy, wanted)
        policy.to(wanted)


def check_context(teacher: Any, examples: Sequence[Completion]) -> None:
    """Refuse text that is longer than a teacher's context.

    Raises:
        ConfigError: names the row.
    """
    for example in examples:
        if teacher.max_length is not None and example.length > teacher.max_length:
            raise ConfigError(
                f"row {example.id!r} has {example.length} tokens and the teacher's context is {teacher.max_length}: "
                "lower data.max_length or the number of new tokens, or take a teacher of a longer context"
            )


def check_room(policy: Policy, device: torch.device) -> None:
    """Refuse to move weights to a GPU that has no room for them.

    Raises:
        ModelError: names the bytes needed and free.
    """
    if device.type != "cuda":
        return
    needed = sum(p.numel() * p.element_size() for p in policy.parameters())
    free = device_room(device)
    if needed > ROOM * free:
        raise ModelError(
            f"the teacher needs {needed:,} bytes ({needed / 2**30:.1f} GiB) for its weights, and {device} has {free:,} "
            f"({free / 2**30:.1f} GiB) free: take teacher.dtype bfloat16, another teacher.device, or a smaller teacher"
        )
