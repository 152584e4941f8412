"""Weighted sums over positions of functions of logits, with gradients made in the forward pass.

:func:`~stepkd.losses.linear.chunked_head` makes a chunk's logits a second time in the backward pass. Where the weight
of every position is known beforehand, and only their weighted sum is wanted, that is not needed: a chunk's logits are
made once, its gradient with respect to hidden states and head is taken on the spot, and the backward pass multiplies by
one number. What is kept is as large as the hidden states (and the head, if it is trained), never as the logits.

Axes: N needed positions, C positions of one chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stepkd.losses.linear import DEFAULT_CHUNK, VocabHead, check_chunks

PositionFunction = Callable[..., Tensor]
"""``fn(logits_CV, *per_position_C)`` to (C,), or to (C, M) of which the first column is summed."""


def head_parameters(head: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Tensors of a head that are trained: those of the module behind a :class:`~stepkd.losses.linear.VocabHead`."""
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
        ValueError: ``chunk_size`` < 1, or tensors of different length.
    """
    check_chunks(chunk_size, hidden_NH, weights_N, *per_position)
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
