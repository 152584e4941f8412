"""Token log-probabilities and cross-entropy from hidden states of the needed positions.

Axes: N needed positions, H hidden size, V vocabulary, C chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepkd.losses.linear import DEFAULT_CHUNK, chunked_head
from stepkd.losses.reduce import LossTerms


def target_logps(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Log-probability of each target under ``softmax(logits)``: (C,), nats, <= 0."""
    picked_C = logits_CV.gather(-1, targets_C.unsqueeze(-1)).squeeze(-1)
    return picked_C - logits_CV.logsumexp(-1)


def token_logps(
    head: Callable[[Tensor], Tensor],
    hidden_NH: Tensor,
    targets_N: Tensor,
    *,
    chunk_size: int = DEFAULT_CHUNK,
) -> Tensor:
    """Log-probability of every target token, without ever holding (N, V) logits.

    Args:
        head: hidden states to logits (a :class:`~stepkd.losses.linear.VocabHead`).
        hidden_NH: last hidden states at the positions *before* each target.
        targets_N: int64 target ids in ``[0, V)``.
        chunk_size: positions per chunk; does not change the result.

    Returns:
        N log-probabilities (nats), float32, or float64 for float64 logits. Differentiable with exact gradients.

    Raises:
        ValueError: lengths that differ.
    """
    return chunked_head(target_logps, head, hidden_NH, targets_N, chunk_size=chunk_size)


def cross_entropy(
    head: Callable[[Tensor], Tensor],
    hidden_NH: Tensor,
    targets_N: Tensor,
    *,
    chunk_size: int = DEFAULT_CHUNK,
) -> LossTerms:
    """Masked next-token cross-entropy as a named sum.

    Masking is by selection: only the positions that predict a target are passed in.

    Args:
        head, hidden_NH, targets_N, chunk_size: as in :func:`token_logps`.

    Returns:
        ``sums["ce"]``: sum over targets of ``-log p(target)`` in nats; metric ``token_accuracy``: share of targets that
        are the most likely token.

    Raises:
        ValueError: lengths that differ.
    """
    stats_N2 = chunked_head(_logp_and_hit, head, hidden_NH, targets_N, chunk_size=chunk_size)
    logps_N, hits_N = stats_N2[:, 0], stats_N2[:, 1].detach()
    count = torch.tensor(float(targets_N.numel()), device=hidden_NH.device)
    return LossTerms({"ce": -logps_N.sum()}, {"token_accuracy": (hits_N.sum(), count)})


def _logp_and_hit(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    hits_C = (logits_CV.argmax(-1) == targets_C).to(logits_CV.dtype)
    return torch.stack([target_logps(logits_CV, targets_C), hits_C], dim=-1)
