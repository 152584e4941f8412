"""The vocabulary head in chunks.

Logits over a vocabulary are the largest tensor of language-model training. Here they never exist for more than
``chunk_size`` positions: each chunk's logits are made, used, thrown away, and made again in the backward pass. The
recomputation goes through the head itself, so gradients are exact for whatever the head is: tied or untied weights, a
bias, LoRA on the head, a logit scale, a final soft-cap.

Token log-probabilities and cross-entropy are made of it.

Axes: N needed positions (those that predict a completion token), C positions of one chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stepkd.losses.reduce import LossTerms

DEFAULT_CHUNK = 1024


@dataclass(frozen=True)
class VocabHead:
    """A language-model head as a function from hidden states to float logits.

    Calling it with ``hidden_CH`` gives ``logits_CV`` in float32 (float64 stays float64).
    """

    project: Callable[[Tensor], Tensor]
    """The head's own linear layer, bias and adapters included: (C, H) -> (C, rows of the weight)."""
    logit_scale: float = 1.0
    """Factor on the logits before soft-capping (Cohere's ``logit_scale``; 1 / ``logits_scaling`` for Granite)."""
    softcap: float | None = None
    """Final soft-capping: ``cap * tanh(logits / cap)`` (Gemma 2); None for none."""
    vocab_size: int | None = None
    """Number of real tokens V; rows beyond it are padding and are cut off before any softmax."""

    def __post_init__(self) -> None:
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap={self.softcap}: must be positive, or None")

    def __call__(self, hidden_CH: Tensor) -> Tensor:
        logits_CV = self.project(hidden_CH)
        if self.vocab_size is not None and self.vocab_size < logits_CV.shape[-1]:
            logits_CV = logits_CV[..., : self.vocab_size]
        if logits_CV.dtype in (torch.float16, torch.bfloat16):
            logits_CV = logits_CV.float()
        if self.logit_scale != 1.0:
            logits_CV = logits_CV * self.logit_scale
        if self.softcap is not None:
            logits_CV = self.softcap * torch.tanh(logits_CV / self.softcap)
        return logits_CV


def chunked_head(
    fn: Callable[..., Tensor],
    head: Callable[[Tensor], Tensor],
    hidden_NH: Tensor,
    *per_position: Tensor,
    chunk_size: int = DEFAULT_CHUNK,
) -> Tensor:
    """Apply ``fn(logits_CV, *per_position_C)`` to all positions, ``chunk_size`` at a time.

    Args:
        fn: maps a chunk of logits, and the chunk of each tensor in ``per_position``, to one row per position: (C, ...).
        head: hidden states to logits, for instance a :class:`VocabHead`.
        hidden_NH: hidden states of the needed positions.
        *per_position: tensors whose first axis is N (targets, weights, teacher states).
        chunk_size: positions per chunk, >= 1; changes memory and speed, never the result.

    Returns:
        (N, ...) results in order. Peak extra memory is O(chunk_size * V), in the backward pass too.

    Raises:
        ValueError: ``chunk_size`` < 1, or tensors of different length.
    """
    check_chunks(chunk_size, hidden_NH, *per_position)

    def run(hidden_CH: Tensor, *chunk: Tensor) -> Tensor:
        return fn(head(hidden_CH), *chunk)

    pieces = []
    for start in range(0, max(hidden_NH.shape[0], 1), chunk_size):
        arguments = [tensor[start : start + chunk_size] for tensor in (hidden_NH, *per_position)]
        if torch.is_grad_enabled():
            pieces.append(checkpoint(run, *arguments, use_reentrant=False))
        else:
            pieces.append(run(*arguments))
    return torch.cat(pieces)


def check_chunks(chunk_size: int, hidden_NH: Tensor, *per_position: Tensor) -> None:
    """Refuse what would silently be cut or repeated.

    Raises:
        ValueError: ``chunk_size`` < 1, or tensors of different length.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1")
    for tensor in per_position:
        if tensor.shape[0] != hidden_NH.shape[0]:
            raise ValueError(f"{hidden_NH.shape[0]} hidden states but a per-position tensor of {tensor.shape[0]}")


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
