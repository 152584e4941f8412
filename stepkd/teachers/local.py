"""A teacher in this process: another model of the same vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from stepkd.data.collate import Batch, collate
from stepkd.data.encode import Encoder, Example
from stepkd.data.templates import PromptTemplate, get_template
from stepkd.errors import ConfigError, ModelError, check_choice
from stepkd.models.checkpoint import load_trained, weights_fingerprint
from stepkd.models.machine import device_room
from stepkd.models.policy import Policy
from stepkd.models.sharding import shard
from stepkd.models.spec import DTYPES, Quantization
from stepkd.sampling.annotate import check_same_vocabulary
from stepkd.steps.segment import get_segmenter
from stepkd.teachers.signals import HiddenSignals, Signals

ROOM = 0.9
"""Share of a device's free memory that a teacher's weights may take."""


@dataclass(frozen=True)
class TeacherConfig:
    """The model that is distilled from."""

    path: str | None = None
    """Run folder, checkpoint, model folder, hub id, ``.gguf`` file or tiny preset; of the student's vocabulary."""
    cache: str | None = None
    """Folder that ``stepkd cache-teacher`` wrote, in place of ``path``; for given completions only."""
    server: str | None = None
    """``http://host:port`` of a vLLM server that scores the student's text, in place of ``path``; with
    ``divergence.top_k``. No GPU has run it."""
    tokenizer: str | None = None
    """``server``: folder or hub id of its tokenizer; null: the model that the server names."""
    itself: Literal["epoch", "ema", "base"] | None = None
    """The student is its own teacher, in place of ``path``: as it was when the pass over the data began, or ``every``
    steps ago (``epoch``); a running average of its weights (``ema``); as it was before training, which is its
    adapter-off view when fresh adapters are trained (``base``)."""
    every: int | None = None
    """``epoch``: refresh after so many optimiser steps, >= 1; null: after every pass over the data."""
    decay: float | None = None
    """``ema``: in (0, 1), per optimiser step; null: 0.999."""
    dtype: str | None = None
    """Weights' dtype; null: as stored."""
    quantization: Quantization = "none"
    """Weights in 4 or 8 bits (bitsandbytes, CUDA only)."""
    device: str | None = None
    """Where it lives (``cuda:1``, ``cpu``); null: with the student."""
    sharded: bool = False
    """Cut it up over the ranks like the student, under ``recipes/strategy/fsdp2.yaml``; false: whole on every rank."""
    attention: str | None = None
    """Attention implementation; null lets transformers choose."""
    template: str | Path | PromptTemplate | None = None
    """Prompt template it reads the student's completions under, where that is another than the data's; null: the
    student's own prompt ids."""

    def __post_init__(self) -> None:
        given = [name for name in ("path", "cache", "server", "itself") if getattr(self, name)]
        if not given:
            raise ConfigError("teacher: give path, a model of the student's vocabulary, or cache, server, or itself")
        if len(given) > 1:
            raise ConfigError(f"teacher: {' and '.join(given)} are both given: set the other one to null")
        if self.itself is not None:
            check_choice("teacher.itself", self.itself, ("epoch", "ema", "base"))
        if self.every is not None and (self.itself != "epoch" or self.every < 1):
            raise ConfigError(f"teacher.every={self.every}: at least 1, and only with itself: epoch")
        if self.decay is not None and (self.itself != "ema" or not 0 < self.decay < 1):
            raise ConfigError(f"teacher.decay={self.decay}: strictly between 0 and 1, and only with itself: ema")
        if self.tokenizer is not None and self.server is None:
            raise ConfigError(f"teacher.tokenizer={self.tokenizer!r} goes with teacher.server")
        for other, whose in ((self.server, "the server"), (self.itself, "the student itself")):
            for name in ("dtype", "device", "attention", "template") if other is not None else ():
                if getattr(self, name) is not None:
                    raise ConfigError(f"teacher.{name} goes with teacher.path; {whose} has its own")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"teacher.dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}, or null")
        check_choice("teacher.quantization", self.quantization, get_args(Quantization))
        if self.sharded and (self.path is None or self.device is not None or self.quantization != "none"):
            raise ConfigError(
                "teacher.sharded goes with teacher.path, unquantised weights, and the ranks' own devices: set "
                "teacher.device to null"
            )
        if self.quantization != "none" and self.path is None:
            raise ConfigError(f"teacher.quantization={self.quantization!r} goes with teacher.path")


class LocalTeacher:
    """A frozen model beside the student, never part of it: neither its state nor its strategy's.

    Args:
        spec: which model, and where.
        top_k: compare only its k likeliest tokens and the rest; None: the whole vocabulary.
        tail: see :class:`~stepkd.teachers.signals.HiddenSignals`.
    """

    def __init__(self, spec: TeacherConfig, *, top_k: int | None = None, tail: bool = True) -> None:
        self.spec = spec
        self.top_k = top_k
        self.tail = tail
        self._policy: Policy | None = None
        self._encoder: Encoder | None = None
        self._is_sharded = False

    @property
    def policy(self) -> Policy:
        """The loaded model."""
        if self._policy is None:
            raise RuntimeError("the teacher is loaded by bind()")
        return self._policy

    def bind(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        """Load the model (once) and compare vocabularies; see :class:`~stepkd.teachers.signals.Teacher`.

        Raises:
            ModelError: nothing loadable, another vocabulary, or a reward model.
        """
        if self._policy is not None:
            return
        policy = load_trained(
            str(self.spec.path),
            dtype=self.spec.dtype,
            attention=self.spec.attention,
            quantization=self.spec.quantization,
        )
        if policy.step_head is not None:
            raise ModelError(f"teacher.path={self.spec.path} is a reward model: a teacher is a language model")
        check_same_vocabulary(tokenizer, policy.tokenizer)
        policy.vocab_size = min(policy.vocab_size, vocab_size or policy.vocab_size)  # the student may have spare ids
        if vocab_size not in (None, policy.vocab_size):
            raise ModelError(
                f"the teacher has logits for {policy.vocab_size} tokens and the student for {vocab_size}, "
                "under one tokenizer: one of them was not resized to it; resize its embeddings and save it again"
            )
        policy.requires_grad_(False).eval()
        if self.spec.template is not None:
            room = policy.max_length or 2**31
            template = get_template(self.spec.template)
            self._encoder = Encoder(policy.tokenizer, template, get_segmenter("whole"), max_length=room)
        self._policy = policy

    @property
    def max_length(self) -> int | None:
        """Its context in tokens."""
        return self.policy.max_length

    def identity(self) -> str:
        """Fingerprint of its weights."""
        return weights_fingerprint(self.policy)

    def prompts(self, examples: Sequence[Example]) -> list[tuple[int, ...]]:
        """Prompt ids of the examples, under its own template when it has one.

        Raises:
            DataError: a prompt that does not fit into its context.
        """
        if self._encoder is None:
            return [example.prompt_ids for example in examples]
        return [self._encoder.prompt_ids(example.row) for example in examples]

    @torch.no_grad()
    def signals(self, batch: Batch, *, temperature: float) -> Signals:
        """Hidden states at every target; see :class:`~stepkd.teachers.signals.Teacher`.

        Raises:
            ConfigError: a prompt and completion that are longer than its context.
        """
        policy = self.policy
        self.place(batch.input_ids_BT.device)
        own = batch if self._encoder is None else self._reread(batch)
        check_context(self, own.examples)
        own = own.to(policy.device)
        hidden_BTH = policy(policy.hidden, own.input_ids_BT, own.attention_mask_BT)  # gathers embeddings and head
        hidden_NH = hidden_BTH.flatten(0, 1)[own.needed_N]
        return HiddenSignals(policy.head, hidden_NH, temperature, self.top_k, self.tail)

    def _reread(self, batch: Batch) -> Batch:
        """The same completions behind the teacher's own prompts; targets keep their order."""
        prompts = self.prompts(batch.examples)
        examples = [replace(each, prompt_ids=prompt) for each, prompt in zip(batch.examples, prompts, strict=True)]
        return collate(examples, int(self.policy.tokenizer.pad_token_id or 0))

    def shard(self, mesh: Any) -> None:
        """Cut it up over a mesh of ranks (FSDP2), if its settings ask for that."""
        if self.spec.sharded and not self._is_sharded:
            shard(self.policy, mesh)
            self._is_sharded = True

    def gathered(self) -> AbstractContextManager[Any]:
        """A block with all of its weights on every rank."""
        return self.policy.gathered()

    def check_sharded(self) -> None:
        """Called when training begins.

        Raises:
            ConfigError: it was to be cut up, and the strategy cuts nothing up.
        """
        if self.spec.sharded and not self._is_sharded:
            raise ConfigError(
                "teacher.sharded: true needs several ranks under recipes/strategy/fsdp2.yaml (trainer.strategy)"
            )

    def place(self, device: torch.device) -> None:
        """Move the weights where they belong (the spec's device, else this one), once, when they fit.

        Raises:
            ModelError: there is no room for them.
        """
        policy = self.policy
        if self._is_sharded:
            return
        wanted = torch.device(self.spec.device) if self.spec.device is not None else device
        if policy.device.type == wanted.type and wanted.index in (None, policy.device.index):
            return
        check_room(policy, wanted)
        policy.to(wanted)


def check_context(teacher: Any, examples: Sequence[Example]) -> None:
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
