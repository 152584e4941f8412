"""The vocabulary head in chunks.

Logits over a vocabulary are the largest tensor of language-model training. Here they never exist for more than
``chunk_size`` positions: each chunk's logits are made, used, thrown away, and made again in the backward pass. The
recomputation goes through the head itself, so gradients are exact for whatever the head is: tied or untied weights, a
bias, LoRA on the head, a logit scale, a final soft-cap.

Axes: N needed positions (those that predict a completion token), C positions of one chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1")
    for tensor in per_position:
        if tensor.shape[0] != hidden_NH.shape[0]:
            raise ValueError(f"{hidden_NH.shape[0]} hidden states but a per-position tensor of {tensor.shape[0]}")

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
