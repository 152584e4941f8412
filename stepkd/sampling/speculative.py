"""Speculative sampling: a small model drafts tokens, the large one reads them in one pass and keeps a part of them.

What comes out is distributed exactly as what the large model (the target) samples alone, whatever drafts (Leviathan et
al. 2022, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318): a drafted token stands with probability
``min(1, p / q)``, p the target's probability and q the draft's; the first that does not is drawn anew in proportion to
``max(p - q, 0)``, and behind a draft that stands as a whole one more token is drawn from the target. How long a draft
is may depend on its tokens so far, not on the next: SpecDec++ (Huang et al. 2024, arXiv 2405.19715) stops once
``1 - prod a > threshold``, where a head on the draft's hidden states says a, how likely each token is to stand.

One sequence at a time: sequences keep different numbers of tokens. Both models keep what they have read of it.

Axes: C tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from stepkd.data.completion import Completion
from stepkd.errors import ConfigError, check_bounds
from stepkd.models.head import evaluation_mode
from stepkd.models.policy import Policy
from stepkd.randomness import generator
from stepkd.sampling.acceptance import AcceptanceHead, checked, draft_logits, known_ids
from stepkd.sampling.annotate import check_same_vocabulary
from stepkd.sampling.cache import state_of_weights
from stepkd.sampling.decode import Decoder, Row
from stepkd.sampling.draw import Draw, first_above, sampling_logprobs
from stepkd.sampling.engine import SamplingConfig
from stepkd.steps.text import first_difference


@dataclass(frozen=True)
class Stop:
    """How long a draft is."""

    length: int = 5
    """Most tokens, at least 1."""
    head: AcceptanceHead | None = None
    """Says how likely each drafted token is to stand; None: drafts are as long as can be."""
    threshold: float = 0.3
    """Probability that a token so far does not stand, by the head, beyond which a draft ends, in (0, 1)."""
    shortest: int = 2
    """Fewest tokens of a draft that the head ends, at least 1."""

    def __post_init__(self) -> None:
        check_bounds("", self, length="[1, inf)", threshold="(0, 1)", shortest="[1, inf)")


class Round(NamedTuple):
    """What comes of one draft."""

    tokens: list[int]
    """At least one."""
    logits_CV: Tensor
    """The target's logits at each of them."""
    drafted: int
    accepted: int


def speculate(
    target: Reader,
    draft: Reader,
    ids: Sequence[int],
    most: int,
    spec: SamplingConfig,
    stop: Stop,
    chance: Stream,
    eos: Collection[int],
) -> Round:
    """Draft tokens, and have the target say what stands.

    Args:
        target, draft: models of one vocabulary.
        ids: what is continued, at least one token.
        most: tokens to come, at least 1.
        spec: temperature, top-p and top-k, of both models alike.
        stop: how long drafts are.
        chance: draws and decides.
        eos: ids behind which nothing comes.

    Raises:
        ModelError: logits that are not numbers.
    """
    drafted: list[int] = []
    masses: list[Tensor] = []
    stands, length = 1.0, min(stop.length, most - 1)
    while len(drafted) < length:
        hidden_CH, logits_CV = draft.read([*ids, *drafted], 1)
        masses.append(probabilities(checked(logits_CV, "draft")[0], spec))
        # As in the released code the head judges a token from the state that the next one is drawn from, so that the
        # draft ends one token behind the one that makes it end.
        if drafted and stop.head is not None:
            stands *= stop.head.chance(hidden_CH[0])
        drafted.append(chance.token(masses[-1]))
        if drafted[-1] in eos or (len(drafted) >= stop.shortest and 1 - stands > stop.threshold):
            break
    logits_CV = checked(target.read([*ids, *drafted], len(drafted) + 1)[1], "target")
    tokens: list[int] = []
    for token, draft_V, logits_V in zip(drafted, masses, logits_CV, strict=False):
        target_V = probabilities(logits_V, spec)
        if not chance.stands(min(1.0, float(target_V[token] / draft_V[token]))):
            rest_V = (target_V - draft_V).clamp(min=0)
            tokens.append(chance.token(rest_V if bool(rest_V.any()) else target_V))
            return Round(tokens, logits_CV, len(drafted), len(tokens) - 1)
        tokens.append(token)
    accepted = len(tokens)
    if not tokens or tokens[-1] not in eos:
        tokens.append(chance.token(probabilities(logits_CV[accepted], spec)))
    return Round(tokens, logits_CV, len(drafted), accepted)


def probabilities(logits_V: Tensor, spec: SamplingConfig) -> Tensor:
    """(V,) float64 probabilities that are sampled from; of greedy decoding 1 for one token."""
    if spec.temperature == 0:
        return torch.nn.functional.one_hot(logits_V.argmax(), len(logits_V)).double()
    return sampling_logprobs(logits_V.double()[None], spec)[0].exp()


class Stream:
    """Chance, from a keyed stream.

    Args:
        seed, purpose, key: see :func:`~stepkd.randomness.generator`.
    """

    def __init__(self, seed: int, purpose: str, *key: int | str) -> None:
        self._numbers = generator(seed, purpose, *key)

    def token(self, mass_V: Tensor) -> int:
        """A token in proportion to its mass."""
        wanted_11 = mass_V.sum().reshape(1, 1) * self._numbers.random()
        return int(first_above(mass_V[None], wanted_11)[0])

    def stands(self, probability: float) -> bool:
        """Whether something of this probability happens."""
        return bool(self._numbers.random() < probability)


class Reader:
    """A model with what it has read of one sequence: what the next has in common with it is not read again.

    Args:
        policy: the model; the caller puts it into evaluation mode and switches gradients off.
        ids: that its logits are to have, the target's of a draft; None: its own.
    """

    def __init__(self, policy: Policy, ids: int | None = None) -> None:
        self.policy, self.ids = policy, ids or policy.vocab_size
        self._decoder = Decoder(policy, max_rows=1)
        self._ids: list[int] = []
        self._cache: Any = None
        self._weights: list[Any] = []

    def renew(self) -> None:
        """Clear what was read with other weights."""
        if (weights := state_of_weights(self.policy)) != self._weights:
            self._ids, self._cache, self._weights = [], None, weights

    def read(self, ids: Sequence[int], last: int) -> tuple[Tensor, Tensor]:
        """Hidden states (C, H) at the last so many tokens, and the logits (C, V) of what comes behind each."""
        kept = min(first_difference(self._ids, ids), len(ids) - last)
        layers = getattr(self._cache, "layers", None) or [None]
        if any(type(each) is not DynamicLayer for each in layers):  # windows and states cannot be cut back
            kept, self._cache = 0, None
        elif kept < len(self._ids):
            self._cache.crop(kept - len(self._ids))
        device = self.policy.device
        ids_1T = known_ids(self.policy, torch.tensor([ids[kept:]], device=device))
        mask_1T = torch.ones(1, len(ids), dtype=torch.long, device=device)
        positions_1T = torch.arange(kept, len(ids), device=device)[None]
        output = self._decoder.forward(ids_1T, mask_1T, positions_1T, self._cache)
        self._ids, self._cache = list(ids), output.past_key_values
        hidden_CH = output.last_hidden_state[0, -last:]
        return hidden_CH, draft_logits(self.policy, hidden_CH, self.ids)


class Speculation(NamedTuple):
    """A completion of the target's, and what it took."""

    completion: Completion
    """As the transformers engine's, with both kinds of log-probabilities."""
    drafted: int
    """Tokens of the draft model."""
    accepted: int
    """How many of them stand."""
    passes: int
    """Forward passes of the target; one a token without drafts."""


class Speculator:
    """Samples from a model with the help of a smaller one.

    Args:
        target: what is sampled from.
        draft: drafts; its vocabulary is the target's, of which the last ids may be missing.
        stop: how long drafts are.

    Raises:
        ModelError: vocabularies that differ.
        ConfigError: a head of another hidden size.
    """

    def __init__(self, target: Policy, draft: Policy, stop: Stop | None = None) -> None:
        check_same_vocabulary(target.tokenizer, draft.tokenizer, "draft")
        self.target, self.draft, self.stop = Reader(target), Reader(draft, target.vocab_size), stop or Stop()
        size = draft.causal_lm.get_input_embeddings().weight.shape[1]
        if self.stop.head is not None and self.stop.head.hidden_size != size:
            raise ConfigError(
                f"the acceptance head reads {self.stop.head.hidden_size} hidden units and the draft has {size}: it was "
                "trained with another draft"
            )

    @torch.no_grad()
    def sample(self, prompt: Sequence[int], spec: SamplingConfig, *key: int | str) -> Speculation:
        """One completion.

        Args:
            prompt: its ids, at least one.
            spec: how to draw; ``n`` is not read.
            key: keys the noise, with the seed.

        Raises:
            DataError: a prompt without tokens, or one that fills a model's context.
            ModelError: the target's logits, or the draft's, are not numbers.
        """
        target, draft = self.target.policy, self.draft.policy
        contexts = [each for each in (target.max_length, draft.max_length) if each is not None]
        row = Row(0, 0, spec.room("the prompt", len(prompt), min(contexts, default=None)), key)
        chance, counts, eos = Stream(spec.seed, "speculation", *key), np.zeros(3, dtype=int), target.eos_ids
        decoder = Decoder(target, max_rows=1)
        target.check_ids(torch.tensor(prompt))
        self.target.renew()
        self.draft.renew()
        with evaluation_mode(target), evaluation_mode(draft):
            while row.finish is None:
                left = row.limit - len(row.token_ids)
                ids = [*prompt, *row.token_ids]
                found = speculate(self.target, self.draft, ids, left, spec, self.stop, chance, eos)
                for token, logits_V in zip(found.tokens, found.logits_CV, strict=False):
                    decoder.record([row], _drawn(token, logits_V, spec), spec, eos)
                    if row.finish is not None:
                        break
                kept = len(prompt) + len(row.token_ids) - len(ids)  # a stop string may end it before the others
                counts += (found.drafted, min(found.accepted, kept), 1)
        return Speculation(decoder.finished([row], np.asarray(prompt), spec)[0], *counts.tolist())


def _drawn(token: int, logits_V: Tensor, spec: SamplingConfig) -> Draw:
    tokens_1 = torch.tensor([token])
    logprobs_1 = probabilities(logits_V, spec)[[token]].log()
    return Draw(tokens_1, logprobs_1, logits_V.log_softmax(-1)[[token]])
