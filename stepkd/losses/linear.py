"""The vocabulary head in chunks.

Logits over a vocabulary are the largest tensor of language-model training. Here they never exist for more than
``chunk_size`` positions: each chunk's logits are made, used, thrown away, and made again in the backward pass. The
recomputation goes through the head itself, so gradients are exact for whatever the head is: tied or untied weights, a
bias, LoRA on the head, a logit scale, a final soft-cap.

Token log-probabilities and cross-entropy are made of it.

Where the weight of every position is known beforehand, and only a weighted sum is wanted, :func:`fused_sum` makes a
chunk's logits once: its gradient with respect to hidden states and head is taken on the spot, and the backward pass
multiplies by one number. What is kept is as large as the hidden states (and the head, if it is trained).

Axes: N needed positions (those that predict a completion token), C positions of one chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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
        ValueError: tensors of different length.
    """
    _check_lengths(hidden_NH, *per_position)

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


def _check_lengths(hidden_NH: Tensor, *per_position: Tensor) -> None:
    """Refuse what would silently be cut or repeated.

    Raises:
        ValueError: tensors of different length.
    """
    for tensor in per_position:
        if tensor.shape[0] != hidden_NH.shape[0]:
            raise ValueError(f"{hidden_NH.shape[0]} hidden states but a per-position tensor of {tensor.shape[0]}")


def target_logps(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Log-probability of each target under ``softmax(logits)``.

    Args:
        logits_CV: float32 or float64 logits.
        targets_C: int64 target ids in ``[0, V)``.

    Returns:
        (C,) log-probabilities in nats, <= 0, in the dtype of the logits. Differentiable.
    """
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
    weights_N: Tensor | None = None,
    chunk_size: int = DEFAULT_CHUNK,
) -> LossTerms:
    """Masked next-token cross-entropy as a named sum.

    Masking is by selection: only the positions that predict a target are passed in.

    Args:
        head, hidden_NH, targets_N, chunk_size: as in :func:`token_logps`.
        weights_N: weight of every target, >= 0; None: 1.

    Returns:
        ``sums["ce"]``: sum over targets of ``-log p(target)`` in nats, each times its weight; metric
        ``token_accuracy``: share of targets that are the most likely token, whatever they weigh.

    Raises:
        ValueError: lengths that differ.
    """
    stats_N2 = chunked_head(_logp_and_hit, head, hidden_NH, targets_N, chunk_size=chunk_size)
    logps_N, hits_N = stats_N2[:, 0], stats_N2[:, 1].detach()
    count = torch.tensor(float(targets_N.numel()), device=hidden_NH.device)
    weighted_N = logps_N if weights_N is None else logps_N * weights_N.to(logps_N)
    return LossTerms({"ce": -weighted_N.sum()}, {"token_accuracy": (hits_N.sum(), count)})


def _logp_and_hit(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    hits_C = (logits_CV.argmax(-1) == targets_C).to(logits_CV.dtype)
    return torch.stack([target_logps(logits_CV, targets_C), hits_C], dim=-1)


# ---- gradients made in the forward pass ------------------------------------------------------------------------------

PositionFunction = Callable[..., Tensor]
"""``fn(logits_CV, *per_position_C)`` to (C,), or to (C, M) of which the first column is summed."""


def head_parameters(head: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Tensors of a head that are trained, for :func:`fused_sum` to take gradients of.

    Args:
        head: a module, or a :class:`VocabHead` whose ``project`` is one; any other function has no parameters.

    Returns:
        The parameters of that module that require gradients, adapters included; empty where it is frozen.
    """
    project = head.project if isinstance(head, VocabHead) else head
    if not isinstance(project, nn.Module):
        return []
    return [parameter for parameter in project.parameters() if parameter.requires_grad]


def fused_sum(
    fn: PositionFunction,
    head: Callable[[Tensor], Tensor],
    hidden_NH: Tensor,
    weights_N: Tensor,
    *per_position: Tensor,
    chunk_size: int = DEFAULT_CHUNK,
) -> tuple[Tensor, Tensor]:
    """``sum over positions of weight * fn(head(hidden), ...)``, and what ``fn`` gave.

    Args:
        fn: maps a chunk of logits, and the chunk of each tensor in ``per_position``, to (C,), or to (C, M) of which the
            first column is summed; the others are for metrics and pass no gradient.
        head: hidden states to logits, a module or :class:`~stepkd.losses.linear.VocabHead`: what of it is trained gets
            gradients (:func:`head_parameters`).
        hidden_NH: hidden states of the needed positions.
        weights_N: weight of every position; constants, no gradient reaches them.
        *per_position: tensors whose first axis is N; no gradient reaches them.
        chunk_size: positions per chunk, >= 1; changes memory and speed, never the result.

    Returns:
        The sum, a scalar with exact first derivatives (float32, or float64 for float64 values); and the detached values
        of ``fn``, (N,) or (N, M). Peak extra memory is O(chunk_size * V) beside a gradient of the hidden states'
        size and one in float32 of the trained part of the head.

        The trained part of a sharded head (FSDP2) must be gathered, as it is within the model's forward pass.

    Raises:
        ValueError: tensors of different length.
    """
    _check_lengths(hidden_NH, weights_N, *per_position)
    trained = head_parameters(head)
    if any(hasattr(parameter, "full_tensor") for parameter in trained):
        raise RuntimeError("the head is sharded and not gathered: compute the loss in the policy's forward pass")
    constants = tuple(tensor.detach() for tensor in (weights_N, *per_position))
    if not torch.is_grad_enabled():  # nobody will ask for the gradients that are made on the way
        hidden_NH, trained = hidden_NH.detach(), []
    total, values = _FusedSum.apply(fn, head, chunk_size, constants, hidden_NH, *trained)
    return total, values


class _FusedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fn: PositionFunction,
        head: Callable[[Tensor], Tensor],
        chunk_size: int,
        constants: tuple[Tensor, ...],
        hidden_NH: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[4:]
        of_hidden_NH = torch.empty_like(hidden_NH) if wanted[0] else None
        sums = [_accumulator(p) if needed else None for p, needed in zip(parameters, wanted[1:], strict=True)]
        trained = [p for p, needed in zip(parameters, wanted[1:], strict=True) if needed]
        totals, pieces = [], []
        for start in range(0, max(hidden_NH.shape[0], 1), chunk_size):
            rows = slice(start, start + chunk_size)
            weights_C, *chunk = (tensor[rows] for tensor in constants)
            with torch.set_grad_enabled(any(wanted)):
                hidden_CH = hidden_NH[rows].detach().requires_grad_(wanted[0])
                values = fn(head(hidden_CH), *chunk)
                first_C = values if values.dim() == 1 else values[:, 0]
                total = (first_C * weights_C.to(first_C.dtype)).sum()
            totals.append(total.detach())
            pieces.append(values.detach())
            if not total.requires_grad:
                continue
            inputs = ([hidden_CH] if wanted[0] else []) + trained
            gradients = list(torch.autograd.grad(total, inputs, allow_unused=True))
            if of_hidden_NH is not None:
                of_hidden_NH[rows] = gradients.pop(0)
            for kept in (each for each in sums if each is not None):
                if (gradient := gradients.pop(0)) is not None:
                    kept += gradient
        ctx.gradients = (of_hidden_NH, *sums)
        ctx.dtypes = (hidden_NH.dtype, *(p.dtype for p in parameters))
        values = torch.cat(pieces)
        ctx.mark_non_differentiable(values)
        return torch.stack(totals).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            None if gradient is None else (gradient * of_total.to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        return (None, None, None, None, *gradients)


def _accumulator(parameter: Tensor) -> Tensor:
    """Zeros for a sum over chunks: float32 for lower precision."""
    low = parameter.dtype in (torch.float16, torch.bfloat16)
    return torch.zeros_like(parameter, dtype=torch.float32 if low else parameter.dtype)
