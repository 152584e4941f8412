"""Cross-entropy on step labels: closed form, torch's own, brute force, chunks, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from losses_helper import reduce
from torch import Tensor
from torch.nn import functional as F

from stepkd.losses import VocabHead, label_token_logps, step_cross_entropy, step_weights

S, C = 9, 3


def double(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def case(classes: int = C) -> tuple[Tensor, Tensor]:
    """Logits that require gradients, and labels in which every class occurs."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(S, classes, dtype=torch.float64, generator=generator).mul(2).requires_grad_()
    return logits, torch.arange(S) % classes


def gradient(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [grad.clone() for grad in torch.autograd.grad(loss, inputs, retain_graph=True)]


# --- closed form ---------------------------------------------------------------------------------------------------


def test_closed_form_hard_and_soft() -> None:
    logps = double([[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]]).log()
    hard = step_cross_entropy(logps, double([[0, 1], [1, 0], [0, 1]]))
    assert list(hard.sums) == ["prm"]
    assert hard.sums["prm"].item() == pytest.approx(-math.log(0.75) - math.log(0.5) - math.log(0.1), rel=1e-14)
    soft = step_cross_entropy(logps[:1], double([[0.625, 0.375]]))
    assert soft.sums["prm"].item() == pytest.approx(-0.625 * math.log(0.25) - 0.375 * math.log(0.75), rel=1e-14)
    mean = reduce(hard.sums, {"prm": float(step_weights(double([[0, 1], [1, 0], [0, 1]])).sum())})
    assert mean.item() == pytest.approx(hard.sums["prm"].item() / 3, rel=1e-14)


def test_a_soft_loss_is_least_at_its_own_target() -> None:
    """At p the loss is the entropy of the target, and its gradient in the logits is zero."""
    p = 0.3
    logits = double([[math.log(1 - p), math.log(p)]]).requires_grad_()
    loss = step_cross_entropy(logits.log_softmax(-1), double([[1 - p, p]])).sums["prm"]
    assert loss.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-14)
    assert gradient(loss, logits)[0].abs().max() < 1e-15


def test_metrics() -> None:
    logps = double([[0.2, 0.8], [0.3, 0.7], [0.6, 0.4], [0.1, 0.9]]).log().requires_grad_()
    targets = double([[0, 1], [1, 0], [1, 0], [0.25, 0.75]])
    metrics = step_cross_entropy(logps, targets).metrics
    values = {name: (total.item(), count.item()) for name, (total, count) in metrics.items()}
    assert values["accuracy"] == (3.0, 4.0)
    assert values["accuracy_correct"] == (2.0, 2.0)
    assert values["accuracy_incorrect"] == (1.0, 2.0)
    assert values["brier"] == pytest.approx((0.2**2 + 0.7**2 + 0.4**2 + 0.15**2, 4.0), rel=1e-13)
    assert not any(tensor.requires_grad for pair in metrics.values() for tensor in pair)


def test_even_odds_count_as_the_better_class() -> None:
    """As everywhere a step is correct from 0.5 on."""
    metrics = step_cross_entropy(double([[0.4, 0.6], [0.6, 0.4]]).log(), double([[0.5, 0.5]] * 2)).metrics
    assert [value.item() for value in metrics["accuracy"]] == [1.0, 2.0]
    assert [value.item() for value in metrics["accuracy_correct"]] == [1.0, 2.0]
    assert [value.item() for value in metrics["accuracy_incorrect"]] == [0.0, 0.0]


def test_brier_is_among_the_labels_when_the_loss_is_over_the_vocabulary() -> None:
    logps = double([[0.01, 0.03]]).log()  # the rest of the probability is on other tokens
    total, count = step_cross_entropy(logps, double([[0, 1]])).metrics["brier"]
    assert (total / count).item() == pytest.approx(0.25**2, rel=1e-12)


def test_a_class_without_steps_counts_zero_not_nan() -> None:
    metrics = step_cross_entropy(double([[0.2, 0.8]]).log(), double([[0, 1]])).metrics
    assert [value.item() for value in metrics["accuracy_incorrect"]] == [0.0, 0.0]


# --- torch's own ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
def test_hard_labels_equal_torch(classes: int) -> None:
    logits, labels = case(classes)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    loss = step_cross_entropy(logits.log_softmax(-1), F.one_hot(labels, classes).double()).sums["prm"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    assert torch.allclose(*gradient(loss, logits), *gradient(expected, logits), rtol=1e-12, atol=1e-15)


def test_soft_labels_are_two_way_cross_entropy() -> None:
    logits, _ = case(2)
    chance = torch.linspace(0, 1, S, dtype=torch.float64)
    targets = torch.stack([1 - chance, chance], dim=-1)
    loss = step_cross_entropy(logits.log_softmax(-1), targets).sums["prm"]
    expected = F.cross_entropy(logits, targets, reduction="sum")
    binary = F.binary_cross_entropy_with_logits(logits[:, 1] - logits[:, 0], chance, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    assert loss.item() == pytest.approx(binary.item(), rel=1e-13)
    assert torch.allclose(*gradient(loss, logits), *gradient(binary, logits), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("weights", [[3.0, 1.0, 0.5], [1.0, 0.0, 2.0]])
def test_class_weights_equal_torch_after_reduce(weights: list[float]) -> None:
    logits, labels = case()
    targets = F.one_hot(labels, C).double()
    terms = step_cross_entropy(logits.log_softmax(-1), targets, class_weights=weights)
    loss = reduce(terms.sums, {"prm": float(step_weights(targets, weights).sum())})
    expected = F.cross_entropy(logits, labels, weight=double(weights))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    assert torch.allclose(*gradient(loss, logits), *gradient(expected, logits), rtol=1e-12, atol=1e-15)


def test_weighted_soft_labels_divide_by_the_weights_of_their_targets() -> None:
    """Equal chances everywhere make the weighted mean a constant that can be written down."""
    targets = double([[0.75, 0.25], [0.0, 1.0]])
    assert step_weights(targets, [4.0, 1.0]).tolist() == [3.25, 1.0]
    assert step_weights(targets).tolist() == [1.0, 1.0]
    terms = step_cross_entropy(double([[0.5, 0.5]] * 2).log(), targets, class_weights=[4.0, 1.0])
    assert reduce(terms.sums, {"prm": 4.25}).item() == pytest.approx(math.log(2), rel=1e-14)


# --- brute force ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [2.0, 1.0, 0.25]])
def test_brute_force(weights: list[float] | None) -> None:
    """Python floats, one step at a time; the gradient is weight * (softmax * sum of targets - target)."""
    logits, labels = case()
    targets = torch.softmax(torch.randn(S, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), -1)
    targets[0] = F.one_hot(labels[0], C)
    terms = step_cross_entropy(logits.log_softmax(-1), targets, class_weights=weights)
    total, wanted = 0.0, []
    factors = weights or [1.0] * C
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        normaliser = math.log(sum(math.exp(value) for value in row))
        scaled = [t * w for t, w in zip(target, factors, strict=True)]
        total -= sum(s * (value - normaliser) for s, value in zip(scaled, row, strict=True))
        wanted.append([math.exp(v - normaliser) * sum(scaled) - s for s, v in zip(scaled, row, strict=True)])
    assert terms.sums["prm"].item() == pytest.approx(total, rel=1e-12)
    assert torch.allclose(gradient(terms.sums["prm"], logits)[0], double(wanted), rtol=1e-11, atol=1e-14)


def test_splitting_the_steps_changes_nothing() -> None:
    logits, labels = case()
    targets = F.one_hot(labels, C).double()
    whole = step_cross_entropy(logits.log_softmax(-1), targets, class_weights=[3.0, 1.0, 0.5])
    parts = [
        step_cross_entropy(logits[i : i + 2].log_softmax(-1), targets[i : i + 2], class_weights=[3.0, 1.0, 0.5])
        for i in range(0, S, 2)
    ]
    total = torch.stack([part.sums["prm"] for part in parts]).sum()
    assert total.item() == pytest.approx(whole.sums["prm"].item(), rel=1e-13)
    for name, pair in whole.metrics.items():
        for whole_value, values in zip(pair, zip(*(part.metrics[name] for part in parts), strict=True), strict=True):
            assert sum(value.item() for value in values) == pytest.approx(whole_value.item(), rel=1e-12)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = step_cross_entropy(logits.log_softmax(-1), torch.tensor([[0.0, 1.0], [0.0, 1.0]])).sums["prm"]
    loss.backward()
    assert loss.item() == 2e4
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


# --- label tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "tied", "bias", "padded", "softcap", "lora"])
@pytest.mark.parametrize("chunk_size", [1, 2, 100])
@pytest.mark.parametrize("restricted", [True, False])
def test_label_tokens_brute_force(kind: str, chunk_size: int, restricted: bool, head_factory: Any) -> None:
    """The two logits alone, or all of them, on values and on every parameter's gradient."""
    head, hidden, parameters = head_factory(kind)
    labels = [7, 2]  # worst first, not in the order of their ids
    logps = label_token_logps(head, hidden, labels, restricted=restricted, chunk_size=chunk_size)
    logits = head(hidden)
    expected = (logits[:, labels] if restricted else logits).log_softmax(-1)
    expected = expected if restricted else expected[:, labels]
    assert torch.allclose(logps, expected, rtol=1e-12, atol=1e-14)
    sums = logps.exp().sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums)) is restricted
    weights = torch.randn(logps.shape, dtype=logps.dtype, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((weights * logps).sum(), list(parameters.values()), retain_graph=True)
    plain = torch.autograd.grad((weights * expected).sum(), list(parameters.values()))
    for a, b in zip(ours, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)


def test_three_label_tokens(head_factory: Any) -> None:
    head, hidden, _ = head_factory("plain")
    logps = label_token_logps(head, hidden, (4, 0, 9))
    assert torch.allclose(logps, head(hidden)[:, [4, 0, 9]].log_softmax(-1), rtol=1e-12)


def test_full_vocabulary_loss_is_torch_over_the_vocabulary(head_factory: Any) -> None:
    """ASPRM's choice: plain next-token cross-entropy with the label's id, at the marker itself."""
    head, hidden, _ = head_factory("plain")
    labels, ids = torch.arange(hidden.shape[0]) % 2, torch.tensor([7, 2])
    logps = label_token_logps(head, hidden, ids.tolist(), restricted=False)
    loss = step_cross_entropy(logps, F.one_hot(labels, 2).double()).sums["prm"]
    expected = F.cross_entropy(head(hidden), ids[labels], reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    assert torch.allclose(*gradient(loss, hidden), *gradient(expected, hidden), rtol=1e-11, atol=1e-14)


def test_half_precision_heads_give_float32() -> None:
    linear = torch.nn.Linear(4, 6, dtype=torch.bfloat16)
    logps = label_token_logps(VocabHead(linear), torch.ones(2, 4, dtype=torch.bfloat16), [1, 3])
    assert logps.dtype == torch.float32


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match=r"log-probabilities \(1, 2\) but targets \(1, 3\)"):
        step_cross_entropy(double([[0.5, 0.5]]).log(), double([[0, 0, 1]]))
    with pytest.raises(ValueError, match="3 class weights for 2 classes"):
        step_cross_entropy(double([[0.5, 0.5]]).log(), double([[0, 1]]), class_weights=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="1 class weights for 2 classes"):
        step_weights(double([[0, 1]]), [1.0])
    with pytest.raises(ValueError, match=r"range\(\) arg 3 must not be zero"):
        label_token_logps(VocabHead(torch.nn.Linear(2, 3)), torch.ones(1, 2), [0, 1], chunk_size=0)
