"""The only place that divides, and sums by segment."""

from __future__ import annotations

import pytest
import torch
from losses_helper import reduce

from stepkd.losses import segment_sum


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def test_closed_form() -> None:
    ce, kl = scalar(6.0), scalar(10.0)
    loss = reduce({"ce": ce, "kl": kl}, {"ce": 3, "kl": 4, "unused": 9}, weights={"kl": 0.5})
    assert loss.item() == 6 / 3 + 0.5 * 10 / 4
    loss.backward()
    assert ce.grad is not None
    assert kl.grad is not None
    assert (ce.grad.item(), kl.grad.item()) == (1 / 3, 0.5 / 4)


def test_empty_component_is_exactly_zero_and_stays_in_the_graph() -> None:
    ce, empty = scalar(6.0), scalar(5.0)
    loss = reduce({"ce": ce, "step": empty}, {"ce": 3, "step": 0})
    assert loss.item() == 2.0
    loss.backward()
    assert empty.grad is not None
    assert empty.grad.item() == 0.0
    only_empty = reduce({"step": scalar(0.0)}, {"step": 0})
    assert only_empty.item() == 0.0
    assert only_empty.requires_grad


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
def test_ranks_and_micro_batches_give_the_whole_batch(world_size: int, micro_batches: int) -> None:
    """Gradients summed over micro-batches and averaged over ranks are those of the whole batch."""
    generator = torch.Generator().manual_seed(0)
    x_N = torch.randn(37, generator=generator, dtype=torch.float64)
    weight = scalar(0.3)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, weight)[0]

    whole = reduce({"a": (weight * x_N).exp().sum()}, {"a": 37})
    expected = gradient(whole)
    total, loss = torch.zeros((), dtype=torch.float64), 0.0
    for rank_part in x_N.tensor_split(world_size):
        for part in rank_part.tensor_split(micro_batches):
            piece = reduce({"a": (weight * part).exp().sum()}, {"a": 37}, world_size=world_size)
            total += gradient(piece) / world_size
            loss += piece.item() / world_size
    assert abs(total - expected) / abs(expected) < 1e-12
    assert abs(loss - whole.item()) / whole.item() < 1e-12


@pytest.mark.parametrize("count", [-1, float("nan"), float("inf")])
def test_a_denominator_that_is_no_count_is_refused(count: float) -> None:
    with pytest.raises(ValueError, match=rf"denominator of 'ce' is {float(count)}: must be a finite count"):
        reduce({"ce": torch.tensor(1.0)}, {"ce": count})


def test_segment_sum_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(50, generator=generator, dtype=torch.float64, requires_grad=True)
    segments = torch.randint(-2, 7, (50,), generator=generator)
    expected = [sum(v for v, s in zip(values.tolist(), segments.tolist(), strict=True) if s == k) for k in range(9)]
    sums = segment_sum(values, segments, 9)
    assert sums.tolist() == pytest.approx(expected, rel=1e-12)
    assert sums[7:].tolist() == [0.0, 0.0]
    weights = torch.arange(1.0, 10.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((sums * weights).sum(), values)
    assert gradient.tolist() == [0.0 if s < 0 else float(weights[s]) for s in segments.tolist()]


def test_segment_sum_edges() -> None:
    nothing = torch.zeros(0, requires_grad=True)
    assert segment_sum(nothing, torch.zeros(0, dtype=torch.long), 3).tolist() == [0.0, 0.0, 0.0]
    left_out = torch.ones(2, requires_grad=True)
    sums = segment_sum(left_out, torch.tensor([-1, -1]), 0)
    assert sums.shape == (0,)
    sums.sum().backward()
    assert left_out.grad is not None
    assert left_out.grad.tolist() == [0.0, 0.0]
    # a value that is left out may be anything
    assert segment_sum(torch.tensor([float("nan"), 2.0]), torch.tensor([-1, 0]), 1).tolist() == [2.0]
    with pytest.raises((IndexError, RuntimeError)):
        segment_sum(torch.ones(1), torch.tensor([3]), 3)
