"""Token log-probabilities and cross-entropy: closed form, torch's own, brute force, invariance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from losses_helper import reduce
from torch import nn

from stepkd.losses import VocabHead, cross_entropy, target_logps, token_logps

N, H, V = 7, 6, 11


def case() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(H, V, dtype=torch.float64)
    return linear, torch.randn(N, H, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 10, 3, 1, 9, 5])


def test_closed_form() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [5.0, 5.0]], dtype=torch.float64)
    logps = target_logps(logits, torch.tensor([1, 0]))
    assert logps.tolist() == pytest.approx([math.log(0.75), math.log(0.5)], rel=1e-14)
    identity: Callable[[torch.Tensor], torch.Tensor] = lambda hidden: hidden  # noqa: E731
    terms = cross_entropy(identity, logits, torch.tensor([1, 0]))
    assert terms.sums["ce"].item() == pytest.approx(-math.log(0.75) - math.log(0.5), rel=1e-14)
    hits, count = terms.metrics["token_accuracy"]
    assert (hits.item(), count.item()) == (2.0, 2.0)
    assert not hits.requires_grad


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    logps = target_logps(logits.expand(2, 3), torch.tensor([0, 1]))
    assert logps.tolist() == [0.0, -2e4]
    logps.sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("chunk_size", [1, 2, 5, N, 100])
def test_equals_torch(chunk_size: int) -> None:
    linear, hidden, targets = case()
    expected = nn.functional.cross_entropy(linear(hidden), targets, reduction="sum")
    expected_gradients = torch.autograd.grad(expected, [hidden, *linear.parameters()])
    terms = cross_entropy(VocabHead(linear), hidden, targets, chunk_size=chunk_size)
    gradients = torch.autograd.grad(terms.sums["ce"], [hidden, *linear.parameters()])
    assert abs(terms.sums["ce"] - expected) / expected < 1e-12
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert (actual - wanted).norm() / wanted.norm() < 1e-10
    hits, count = terms.metrics["token_accuracy"]
    assert hits.item() == (linear(hidden).argmax(-1) == targets).sum().item()
    assert count.item() == N


def test_log_probabilities_equal_brute_force() -> None:
    linear, hidden, targets = case()
    expected = linear(hidden).log_softmax(-1)[range(N), targets]
    actual = token_logps(VocabHead(linear), hidden, targets, chunk_size=2)
    assert (actual - expected).norm() / expected.norm() < 1e-12


@pytest.mark.parametrize("kind", ["plain", "softcap", "everything"])
def test_gradcheck(kind: str, head_factory: Callable[..., Any]) -> None:
    head, hidden, parameters = head_factory(kind)
    targets = torch.tensor([0, 3, 10, 3, 1, 9, 5])
    tensors = [p for p in parameters.values() if p is not hidden]
    assert tensors

    def run(hidden: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return token_logps(head, hidden, targets, chunk_size=3)

    assert torch.autograd.gradcheck(run, (hidden, *tensors))


@pytest.mark.parametrize("parts", [1, 2, 4, 7])
def test_micro_batch_split_does_not_matter(parts: int) -> None:
    linear, hidden, targets = case()
    variables = [hidden, *linear.parameters()]
    whole = reduce(cross_entropy(linear, hidden, targets).sums, {"ce": N})
    expected = torch.autograd.grad(whole, variables)
    totals = [torch.zeros_like(v) for v in variables]
    for index in torch.arange(N).tensor_split(parts):
        loss = reduce(cross_entropy(linear, hidden[index], targets[index], chunk_size=2).sums, {"ce": N})
        for total, gradient in zip(totals, torch.autograd.grad(loss, variables), strict=True):
            total += gradient
    for total, wanted in zip(totals, expected, strict=True):
        assert (total - wanted).norm() / wanted.norm() < 1e-10


def test_float32_and_bfloat16_states() -> None:
    linear, hidden, targets = case()
    expected = token_logps(linear, hidden, targets)
    single = token_logps(VocabHead(linear.float()), hidden.float(), targets)
    assert single.dtype == torch.float32
    assert (single - expected).norm() / expected.norm() < 1e-5
    half = token_logps(VocabHead(linear.bfloat16()), hidden.bfloat16(), targets)
    assert half.dtype == torch.float32
    assert (half - expected).norm() / expected.norm() < 2e-2


def test_padded_rows_take_no_probability() -> None:
    linear, hidden, targets = case()
    padded = nn.Linear(H, V + 9, dtype=torch.float64)
    with torch.no_grad():
        padded.weight[:V] = linear.weight
        padded.bias[:V] = linear.bias
        padded.bias[V:] = 100.0
    actual = token_logps(VocabHead(padded, vocab_size=V), hidden, targets)
    expected = token_logps(VocabHead(linear), hidden, targets)
    assert (actual - expected).norm() / expected.norm() < 1e-12
    gradient = torch.autograd.grad(actual.sum(), padded.weight)[0]
    assert gradient[V:].abs().sum() == 0


def test_target_outside_the_vocabulary() -> None:
    linear, hidden, targets = case()
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        token_logps(VocabHead(linear), hidden, torch.where(targets == 10, -100, targets))
