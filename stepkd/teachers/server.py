"""A teacher on vLLM servers: its most likely tokens at every position of the student's text."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepkd.data.collate import Batch
from stepkd.errors import ConfigError, ModelError
from stepkd.models.load import load_tokenizer
from stepkd.models.spec import PolicyConfig
from stepkd.runs.process import STOP_REQUEST
from stepkd.sampling.annotate import check_same_vocabulary
from stepkd.sampling.client import Client
from stepkd.sampling.engine import Scores
from stepkd.sampling.vllm import ServerEngine
from stepkd.teachers.cache import CachedSignals
from stepkd.teachers.config import Served
from stepkd.teachers.local import check_context
from stepkd.teachers.signals import Signals, Teacher

LEAST_TAIL = 1e-7
"""Smallest mass of all tokens but the k most likely that is told from none: a server gives float32 logarithms."""


@dataclass(eq=False)
class ServerTeacher(Teacher):
    """See ``Served`` in :mod:`stepkd.teachers.config`."""

    spec: Served
    client: Client | None = field(default=None, init=False)
    """Once it is bound."""
    max_length: int | None = field(default=None, init=False)
    """Of its context in tokens, once it is bound."""

    def bind(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        """Connect (once) and compare vocabularies.

        Raises:
            ConfigError: nothing answers, or its tokenizer cannot be loaded here.
            ModelError: another vocabulary.
        """
        if self.client is None:
            self.client = Client(self.spec.urls)
        name = self.spec.tokenizer or self.client.model
        try:
            own = load_tokenizer(PolicyConfig(path=name))
        except ModelError as error:
            raise ConfigError(
                f"the vLLM server at {self.spec.urls[0]} serves {self.client.model!r}, whose tokenizer cannot be "
                f"loaded from {name!r} ({error}): name its folder or hub id in teacher.tokenizer"
            ) from error
        check_same_vocabulary(tokenizer, own)
        self.max_length = ServerEngine(None, self.client).scored_length
        self._read_under(self.spec.template, own)

    def identity(self) -> str:
        """The model that the server names; its weights cannot be seen from here."""
        assert self.client is not None
        return f"server: {self.client.model}"

    def signals(self, batch: Batch, *, temperature: float) -> Signals:
        """See :class:`~stepkd.teachers.signals.Teacher`.

        Raises:
            ConfigError: a prompt and completion that are longer than its context, or another temperature than 1.
            ModelError: the server scored other tokens than it was asked for.
            MachineError: it went away; where that is with a request to stop, a training step gets NaN.
        """
        assert self.spec.top_k is not None
        own_N, ids_Nk, logps_Nk = self._scores(batch, temperature, self.spec.top_k.k)
        # The others' mass is at least that of a target that is not among the k, and no less than float32 can tell.
        is_other_N = (ids_Nk != batch.targets_N.unsqueeze(-1)).all(-1)
        least_N = (own_N.exp() * is_other_N).clamp_min(LEAST_TAIL)
        tail_N = torch.maximum(1.0 - logps_Nk.exp().sum(-1), least_N).log()
        return CachedSignals(ids_Nk, logps_Nk.float(), tail_N.float(), self.spec.top_k.tail)

    def target_logps(self, batch: Batch, *, temperature: float, chunk_size: int = 0) -> Tensor:
        """Of every target alone, which is all that the server is asked for; raises what :meth:`signals` does."""
        return self._scores(batch, temperature, 0)[0]

    def _scores(self, batch: Batch, temperature: float, top_k: int) -> list[Tensor]:
        """Log-probability of every target, and ids and log-probabilities of the most likely tokens there."""
        if temperature != 1:
            raise ConfigError(f"temperature {temperature:g}, and the teacher Served {self.spec.lacks['tempered']}")
        assert self.client is not None
        asked = self.reread(batch.examples)
        check_context(self, asked)
        unknown = [np.full((len(each.token_ids), 1 + top_k), np.nan) for each in asked]
        scores = [Scores(each[:, 0], np.zeros(each[:, 1:].shape, np.int64), each[:, 1:]) for each in unknown]
        # All ranks give up a training step together, as its loss is no number.
        with STOP_REQUEST.excuses() if torch.is_grad_enabled() else nullcontext():
            scores = ServerEngine(None, self.client).score(asked, top_k)
        found = zip(*scores, strict=True)
        return [torch.from_numpy(np.concatenate(part)).to(batch.targets_N.device) for part in found]
