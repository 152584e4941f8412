"""One token of each row: the inverse of the cumulative distribution, at a number of the row's own stream.

Axes: B rows, V vocabulary, M blocks of it, X tokens of one block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stepkd.sampling.engine import SamplingConfig


class Draw(NamedTuple):
    """One decoding step of B rows."""

    tokens_B: Tensor
    """int64 ids."""
    logprobs_B: Tensor
    """Log-probability under the sampling distribution (0 when greedy)."""
    raw_logprobs_B: Tensor
    """Log-probability under the model at temperature 1."""


def sampling_logprobs(logits_BV: Tensor, spec: SamplingConfig) -> Tensor:
    """Log-probabilities of the distribution that is sampled from; cut tokens are ``-inf``.

    Order: temperature, then top-k, then top-p on the renormalised rest (the order of transformers).

    Args:
        logits_BV: float logits.
        spec: temperature must be positive.

    Returns:
        (B, V) log-probabilities in nats, each row renormalised over the tokens that are left; at least one is.
    """
    logprobs_BV = torch.log_softmax(logits_BV / spec.temperature, dim=-1)
    if 0 < spec.top_k < logits_BV.shape[-1]:
        kth_B1 = logprobs_BV.topk(spec.top_k, dim=-1).values[:, -1:]
        logprobs_BV = torch.log_softmax(logprobs_BV.masked_fill(logprobs_BV < kth_B1, float("-inf")), dim=-1)
    if spec.top_p < 1:
        sorted_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()  # probability of the strictly more likely tokens
        cut_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV >= spec.top_p)
        logprobs_BV = torch.log_softmax(logprobs_BV.masked_fill(cut_BV, float("-inf")), dim=-1)
    return logprobs_BV


def entropies(logits_BV: Tensor) -> Tensor:
    """(B,) entropies in nats, at least 0, of the distributions at temperature 1.

    Args:
        logits_BV: float logits; entropy of a token that a model rules out (-inf) is 0.
    """
    return torch.special.entr(logits_BV.softmax(-1)).sum(-1).clamp(min=0)


def draw(logits_BV: Tensor, uniform_B: Tensor, spec: SamplingConfig) -> Draw:
    """Draw one token per row, by the inverse of the cumulative distribution; greedy takes the argmax.

    Args:
        logits_BV: logits over the real vocabulary, at least float32.
        uniform_B: float64 numbers in [0, 1), one per row; unused when greedy.
        spec: how to draw.

    Returns:
        Tokens, with their log-probabilities under the sampling distribution and under the model. A token of probability
        zero is never drawn; logits that are NaN give NaN log-probabilities.
    """
    raw = _Masses.of(logits_BV)
    if spec.temperature == 0:
        tokens_B1 = logits_BV.argmax(-1, keepdim=True)
        logprobs_B1 = torch.zeros_like(logits_BV[:, :1])
    else:
        cut = spec.top_k or spec.top_p < 1
        plain = spec.temperature == 1 and not cut
        drawn = (
            raw if plain else _Masses.of(sampling_logprobs(logits_BV, spec) if cut else logits_BV / spec.temperature)
        )
        tokens_B1 = drawn.tokens(uniform_B.unsqueeze(-1))
        logprobs_B1 = drawn.logprobs(tokens_B1)
    return Draw(*(found_B1.squeeze(-1) for found_B1 in (tokens_B1, logprobs_B1, raw.logprobs(tokens_B1))))


_BLOCK = 256
"""Tokens of a block of the vocabulary: a draw finds its block first, then the token in it. A running sum in float64 of
the whole vocabulary, which finds the same token, takes longer than everything else in a draw."""


class _Masses(NamedTuple):
    """Unnormalised probabilities of each row."""

    logits_BV: Tensor
    top_B1: Tensor
    """The row's largest logit."""
    mass_BV: Tensor
    """Exponentials of the logits less it."""
    blocks_BM: Tensor
    """Sums over blocks of tokens, the last of which is shorter, in float64."""

    @classmethod
    def of(cls, logits_BV: Tensor) -> _Masses:
        top_B1 = logits_BV.amax(-1, keepdim=True)
        mass_BV = (logits_BV - top_B1).exp_()
        whole = mass_BV.shape[-1] // _BLOCK * _BLOCK
        sums_BM = mass_BV[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1)
        rest_B1 = mass_BV[:, whole:].sum(-1, keepdim=True)
        return cls(logits_BV, top_B1, mass_BV, torch.cat([sums_BM, rest_B1], -1).double())

    def logprobs(self, tokens_B1: Tensor) -> Tensor:
        """Log-probability of one token of each row."""
        centred_B1 = self.logits_BV.gather(-1, tokens_B1) - self.top_B1
        return centred_B1 - self.blocks_BM.sum(-1, keepdim=True).log().to(self.mass_BV.dtype)

    def tokens(self, uniform_B1: Tensor) -> Tensor:
        """The first token of each row up to which the mass exceeds ``uniform`` times the row's."""
        last = self.mass_BV.shape[-1] - 1
        block_B1, wanted_B1 = first_above(self.blocks_BM, uniform_B1 * self.blocks_BM.sum(-1, keepdim=True))
        tokens_BX = block_B1 * _BLOCK + torch.arange(_BLOCK, device=block_B1.device)
        mass_BX = self.mass_BV.gather(-1, tokens_BX.clamp(max=last)).double().masked_fill(tokens_BX > last, 0)
        # NaN logits find nothing; the caller says so
        return tokens_BX.gather(-1, first_above(mass_BX, wanted_B1)[0]).clamp(max=last)


def first_above(mass_BX: Tensor, wanted_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The first entry whose running sum exceeds what is wanted, and how much is wanted of it.

    No more is wanted than there is, so that an entry without mass is never found.
    """
    sums_BX = mass_BX.cumsum(-1)
    total_B1 = sums_BX[:, -1:]
    wanted_B1 = torch.minimum(wanted_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    found_B1 = torch.searchsorted(sums_BX, wanted_B1, right=True).clamp(max=mass_BX.shape[-1] - 1)
    return found_B1, wanted_B1 - torch.nn.functional.pad(sums_BX, (1, 0)).gather(-1, found_B1)
