"""A teacher on vLLM servers: its most likely tokens at every position of the student's text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from stepkd.data.collate import Batch
from stepkd.errors import ConfigError, ModelError
from stepkd.models.load import load_tokenizer
from stepkd.models.spec import PolicyConfig
from stepkd.runs.process import STOP_REQUEST
from stepkd.sampling.annotate import check_same_vocabulary
from stepkd.sampling.client import Client
from stepkd.sampling.vllm import ServerEngine
from stepkd.teachers.cache import CachedSignals
from stepkd.teachers.config import Served
from stepkd.teachers.local import check_context
from stepkd.teachers.signals import Signals, Teacher


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
            self.client = Client(self.spec.urls, gives_up=STOP_REQUEST.__bool__)
        name = self.spec.tokenizer or self.client.model
        try:
            own = load_tokenizer(PolicyConfig(path=name))
        except ModelError as error:
            raise ConfigError(
                f"the vLLM server at {self.spec.urls[0]} serves {self.client.model!r}, whose tokenizer cannot be "
                f"loaded from {name!r} ({error}): name its folder or hub id in teacher.tokenizer"
            ) from error
        check_same_vocabulary(tokenizer, own)
        self.max_length = self.client.max_length - 1  # it writes a token behind what it scores

    def identity(self) -> str:
        """The model that the server names; its weights cannot be seen from here."""
        assert self.client is not None
        return f"server: {self.client.model}"

    def signals(self, batch: Batch, *, temperature: float) -> Signals:
        """See :class:`~stepkd.teachers.signals.Teacher`.

        Raises:
            ConfigError: a prompt and completion that are longer than its context.
            ModelError: the server scored other tokens than it was asked for.
            MachineError: it went away.
        """
        device = batch.targets_N.device
        asked = [example for example in batch.examples if len(example.token_ids)]
        check_context(self, asked)
        if not asked:
            empty = torch.zeros(0, self.spec.top_k.k, device=device)
            return CachedSignals(empty.long(), empty, empty[:, 0], self.spec.top_k.tail)
        assert self.client is not None
        found = ServerEngine(None, self.client).score(asked, self.spec.top_k.k)
        ids_Nk = torch.from_numpy(np.concatenate([each.ids_Tk for each in found])).to(device)
        logps_Nk = torch.from_numpy(np.concatenate([each.logps_Tk for each in found])).to(device)
        rest_N = 1.0 - logps_Nk.exp().sum(-1)
        tail_N = rest_N.clamp_min(1e-12).log().float()
        return CachedSignals(ids_Nk, logps_Nk.float(), tail_N, self.spec.top_k.tail)
