"""What a teacher gives for a micro-batch, and what a teacher is.

A teacher never hands out logits over the vocabulary for all positions at once: it gives a few tensors by position, and
says how a chunk of them becomes a distribution to compare the student's with.

Axes: N targets (completion tokens) of a micro-batch, C of one chunk, V vocabulary, W buckets of a comparison (V, or
k + 1 of a top-k comparison).
"""

# ruff: noqa: B027 - most teachers have nothing to do in the course of a run
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from stepkd.data.collate import Batch
from stepkd.data.completion import Completion, Ids
from stepkd.data.encode import Encoder
from stepkd.data.templates import PromptTemplate, get_template
from stepkd.errors import ConfigError
from stepkd.losses import DEFAULT_CHUNK, VocabHead, chunked_head, target_logps, tempered, top_k_buckets
from stepkd.models.policy import Policy
from stepkd.steps.segment import get_segmenter
from stepkd.teachers.config import TopK


class Compared(NamedTuple):
    """Two distributions over the same buckets."""

    log_student_CW: Tensor
    """Log-probabilities of the student; gradients flow through it."""
    log_teacher_CW: Tensor
    """Log-probabilities of the teacher."""
    argmax_C: Tensor
    """int64 token that the teacher finds most likely."""


class Signals(Protocol):
    """A teacher's view of the targets of one micro-batch."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors by position, first axis N; chunks of them, the same positions of each, go to :meth:`compare`."""
        ...

    def compare(self, log_student_CV: Tensor, *chunk: Tensor) -> Compared:
        """Bring a chunk of the student's log-probabilities and the teacher's to the same buckets.

        Args:
            log_student_CV: over the whole vocabulary, at the temperature the signals were made for.
            *chunk: the same positions of :attr:`tensors`.

        Returns:
            Both distributions over W buckets, each row normalised, and the teacher's argmax token. Every divergence of
            :mod:`stepkd.losses.divergence` applies to them as they are.
        """
        ...


class Teacher(ABC):
    """Scores what a student wrote. It is no part of the student, neither of its state nor of its strategy.

    A teacher of one's own defines :meth:`bind`, :meth:`identity` and :meth:`signals`, and :meth:`target_logps` where
    its signals are no :class:`HiddenSignals`; the methods after them are told what happens in a run, and most teachers
    leave them alone.
    """

    max_length: int | None = None
    """Its context in tokens, once it is bound; None: as long as the student's."""
    _encoder: Encoder | None = None

    @property
    def shares_prompts(self) -> bool:
        """Whether rows of one prompt cost it that prompt once, as they cost the student; once it is bound."""
        return True

    @property
    def needs_all_ranks(self) -> bool:
        """Whether all ranks make its pass together, as those of a sharded model do."""
        return False

    @abstractmethod
    def bind(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        """Get ready for a student: load what is to be loaded, and check that both read the same ids as the same tokens.

        Args:
            tokenizer: the student's.
            vocab_size: tokens that the student has logits for; None: not known yet.

        Raises:
            ModelError: nothing loadable, or another vocabulary.
        """

    @abstractmethod
    def identity(self) -> str:
        """Fingerprint of what decides its distributions, such as a hash of its weights.

        Returns:
            A text that a checkpoint keeps; a run is not resumed under another.
        """

    @abstractmethod
    def signals(self, batch: Batch, *, temperature: float) -> Signals:
        """Its view of every target of a micro-batch, without gradients.

        Args:
            batch: the student's micro-batch: what it wrote, or what the data holds.
            temperature: divides the teacher's logits, > 0.

        Returns:
            Signals whose tensors may be on a device of its own.
        """

    def target_logps(self, batch: Batch, *, temperature: float, chunk_size: int = DEFAULT_CHUNK) -> Tensor:
        """Its log-probability of every target alone, without gradients, for a loss that reads no more of it.

        Args:
            batch, temperature: as for :meth:`signals`.
            chunk_size: positions whose logits exist at once.

        Returns:
            (N,) log-probabilities in nats, float32 or float64, on the batch's device.

        Raises:
            ConfigError: signals that are not hidden states, from a teacher that does not define this.
        """
        signals = self.signals(batch, temperature=temperature)
        if not isinstance(signals, HiddenSignals):
            raise ConfigError(f"{type(self).__name__} says nothing of single tokens: it has to define target_logps()")

        def of_targets(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
            return target_logps(tempered(logits_CV, temperature), targets_C)

        hidden_NH, targets_N = signals.hidden_NH, batch.targets_N
        with torch.no_grad():
            logps_N = chunked_head(
                of_targets, signals.head, hidden_NH, targets_N.to(hidden_NH.device), chunk_size=chunk_size
            )
        return logps_N.to(targets_N.device)

    def prompts(self, examples: Sequence[Completion]) -> list[Ids]:
        """Prompt ids under which it reads the examples' completions: under its own template where it has one.

        Args:
            examples: completions of the student.

        Returns:
            int64 ids for each example, in order.

        Raises:
            DataError: a prompt that does not fit into its context.
        """
        if self._encoder is None:
            return [example.prompt_ids for example in examples]
        return [np.asarray(self._encoder.prompt_ids(example.row)) for example in examples]

    def reread(self, examples: Sequence[Completion]) -> list[Completion]:
        """The examples' completions behind the prompts under which it reads them."""
        prompts = self.prompts(examples)
        return [replace(each, prompt_ids=prompt) for each, prompt in zip(examples, prompts, strict=True)]

    def _read_under(self, template: str | Path | PromptTemplate | None, tokenizer: Any) -> None:
        """Give it a prompt template of its own, which its own tokenizer's chat template writes; None: it has none."""
        if template is not None:
            longest = self.max_length or 2**31
            self._encoder = Encoder(tokenizer, get_template(template), get_segmenter("whole"), max_length=longest)

    # ---- what a teacher does in the course of a run; most have nothing to do -----------------------------------------

    def follow(self, student: Policy) -> None:
        """Told the student before :meth:`bind`: loaded, not yet wrapped or trained by anything."""

    def start(self, precision: str, template: PromptTemplate | None) -> None:
        """Told when training begins.

        Args:
            precision: the Trainer's.
            template: prompt template of the student's data; None: not known, or not to be spoken of by this rank.

        Raises:
            ConfigError: the run is another one than the teacher was made for.
        """

    def shard(self, mesh: Any) -> None:
        """Shard it over a mesh of ranks (FSDP2), if its settings ask for that."""

    def gathered(self) -> AbstractContextManager[Any]:
        """A block with all of its weights on every rank."""
        return nullcontext()

    def begin(self, epoch: int) -> None:
        """Told before every batch how many passes over the data are complete."""

    def after_step(self, steps: int) -> None:
        """Told after every optimiser step how many there have been."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to make it again."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave, in a fresh process that has not trained yet."""


def most_likely(log_student_CV: Tensor, log_teacher_CV: Tensor, top_k: TopK | None) -> tuple[Tensor, Tensor]:
    """Both distributions over the teacher's most likely tokens and a bucket for the others.

    Args:
        log_student_CV, log_teacher_CV: log-probabilities over the same vocabulary.
        top_k: how many tokens, and whether there is a bucket; None, or as many as there are tokens: nothing is changed.

    Returns:
        (C, W) log-probabilities of student and teacher: W is k + 1, k without the bucket, or V.
    """
    if top_k is None or top_k.k >= log_teacher_CV.shape[-1]:
        return log_student_CV, log_teacher_CV
    ids_Ck = log_teacher_CV.topk(top_k.k, dim=-1).indices
    student, teacher = (top_k_buckets(each, ids_Ck, tail=top_k.tail) for each in (log_student_CV, log_teacher_CV))
    return student, teacher


@dataclass(frozen=True)
class HiddenSignals:
    """Hidden states of a teacher at hand, turned into distributions chunk by chunk by its own head."""

    head: VocabHead
    """The teacher's head over the same vocabulary."""
    hidden_NH: Tensor
    """Its hidden states at the positions before the targets; any width, on the device of its head."""
    temperature: float = 1.0
    """Divides its logits."""
    top_k: TopK | None = None
    """Compare only its most likely tokens; None: the whole vocabulary."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The hidden states."""
        return (self.hidden_NH,)

    def compare(self, log_student_CV: Tensor, *chunk: Tensor) -> Compared:
        """See :class:`Signals`."""
        with torch.no_grad():
            log_teacher_CV = tempered(self.head(chunk[0]), self.temperature).to(log_student_CV.device)
            argmax_C = log_teacher_CV.argmax(-1)
        student, teacher = most_likely(log_student_CV, log_teacher_CV, self.top_k)
        return Compared(student, teacher.to(student.dtype), argmax_C)
