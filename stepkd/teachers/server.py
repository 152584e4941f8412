"""A teacher on a vLLM server: its most likely tokens at every position of the student's text.

Through TRL's client (``pip install 'stepkd[vllm]'``); the contract is tested against a stand-in, **no GPU has run it**.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from stepkd.data.collate import Batch
from stepkd.errors import ConfigError, ModelError
from stepkd.models.load import load_tokenizer
from stepkd.models.spec import PolicyConfig
from stepkd.sampling.annotate import check_same_vocabulary
from stepkd.sampling.vllm import connect
from stepkd.teachers.cache import CachedSignals
from stepkd.teachers.config import Served
from stepkd.teachers.local import check_context
from stepkd.teachers.signals import Signals, Teacher


@dataclass(eq=False)
class ServerTeacher(Teacher):
    """See ``Served`` in :mod:`stepkd.teachers.config`."""

    spec: Served
    client: Any = None
    """In place of TRL's, already connected."""
    max_length: int | None = field(default=None, init=False)
    """Of its context in tokens, once it is bound."""

    def bind(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        """Connect (once) and compare vocabularies.

        Raises:
            ConfigError: nothing answers, or its tokenizer cannot be loaded here.
            ModelError: another vocabulary.
        """
        if self.client is None:
            self.client = connect(self.spec.url)
        name = self.spec.tokenizer or str(self.client.model)
        try:
            own = load_tokenizer(PolicyConfig(path=name))
        except ModelError as error:
            raise ConfigError(
                f"the vLLM server at {self.spec.url} serves {self.client.model!r}, whose tokenizer cannot be loaded "
                f"from {name!r} ({error}): name its folder or hub id in teacher.tokenizer"
            ) from error
        check_same_vocabulary(tokenizer, own)
        if hasattr(self.client, "session"):
            served = self.client.session.get(f"{self.client.base_url}/v1/models").json()["data"][0]
            longest = served.get("max_model_len")
            self.max_length = None if longest is None else int(longest) - 1  # it writes a token behind what it scores

    def identity(self) -> str:
        """The model that the server names; its weights cannot be seen from here."""
        return f"server: {self.client.model}"

    def signals(self, batch: Batch, *, temperature: float) -> Signals:
        """See :class:`~stepkd.teachers.signals.Teacher`.

        Raises:
            ConfigError: a prompt and completion that are longer than its context.
            ModelError: the server scored other tokens than it was asked for.
        """
        device = batch.targets_N.device
        asked = [example for example in batch.examples if len(example.token_ids)]
        check_context(self, asked)
        if not asked:
            empty = torch.zeros(0, self.spec.top_k.k, device=device)
            return CachedSignals(empty.long(), empty, empty[:, 0], self.spec.top_k.tail)
        answer = self.client.get_sequence_logprobs(
            sequences=[[*example.prompt_ids.tolist(), *example.token_ids.tolist()] for example in asked],
            prompt_lengths=[len(example.prompt_ids) for example in asked],
            top_logprobs=self.spec.top_k.k,
            temperature=temperature,
        )
        for example, scored in zip(asked, answer["actual_token_ids"], strict=True):
            if [each[0] for each in scored] != list(example.token_ids):
                raise ModelError(
                    f"the vLLM server at {self.spec.url} scored {len(scored)} tokens of row {example.id!r}, which has "
                    f"{len(example.token_ids)}, or other ones: is its context long enough?"
                )
        ids_Nk = torch.tensor([ids for row in answer["logprob_token_ids"] for ids in row], device=device)
        logps_Nk = torch.tensor([values for row in answer["logprobs"] for values in row], device=device).float()
        rest_N = 1.0 - logps_Nk.double().exp().sum(-1)
        return CachedSignals(ids_Nk, logps_Nk, rest_N.clamp_min(1e-12).log().float(), self.spec.top_k.tail)
