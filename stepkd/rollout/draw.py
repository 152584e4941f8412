"""From logits to one token per row, with one uniform number per token.

Inverse-CDF sampling needs a single number from each row's keyed stream, so a row's draw depends only on its own logits
and its own stream: the same for any batch size, order or rank.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stepkd.rollout.sampler import SamplingSpec


class Draw(NamedTuple):
    """One decoding step of B rows."""

    tokens_B: Tensor
    """int64 ids."""
    logprobs_B: Tensor
    """Log-probability under the sampling distribution (0 when greedy)."""
    raw_logprobs_B: Tensor
    """Log-probability under the model at temperature 1."""


def sampling_logprobs(logits_BV: Tensor, spec: SamplingSpec) -> Tensor:
    """Log-probabilities of the distribution that is sampled from; cut tokens are ``-inf``.

    Order: temperature, then top-k, then top-p on the renormalised rest (the order of transformers).

    Args:
        logits_BV: float logits.
        spec: temperature must be positive.
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


def draw(logits_BV: Tensor, uniform_B: Tensor, spec: SamplingSpec) -> Draw:
    """Draw one token per row.

    Args:
        logits_BV: logits over the real vocabulary, at least float32.
        uniform_B: float64 numbers in [0, 1), one per row; unused when greedy.
        spec: how to draw.
    """
    raw_BV = torch.log_softmax(logits_BV, dim=-1)
    if spec.temperature == 0:
        tokens_B = logits_BV.argmax(-1)
        logprobs_B = torch.zeros_like(raw_BV[:, 0])
    else:
        plain = spec.temperature == 1 and not spec.top_k and spec.top_p == 1
        logprobs_BV = raw_BV if plain else sampling_logprobs(logits_BV, spec)
        cdf_BV = logprobs_BV.exp().cumsum(-1, dtype=torch.float64)
        # The first entry whose cumulative probability exceeds u * total: tokens of probability zero are never hit.
        total_B1 = cdf_BV[:, -1:]
        wanted_B1 = torch.minimum(uniform_B.unsqueeze(-1) * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
        found_B1 = torch.searchsorted(cdf_BV, wanted_B1, right=True)
        tokens_B = found_B1.clamp(max=cdf_BV.shape[-1] - 1).squeeze(-1)  # NaN logits find nothing; the caller says so
        logprobs_B = logprobs_BV.gather(-1, tokens_B.unsqueeze(-1)).squeeze(-1)
    return Draw(tokens_B, logprobs_B, raw_BV.gather(-1, tokens_B.unsqueeze(-1)).squeeze(-1))
