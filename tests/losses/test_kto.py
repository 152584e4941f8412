"""KTO and Step-KTO: closed forms, plain Python twins with gradients, invariances, TRL's formula, bad input."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_helper import reduce
from torch import Tensor
from torch.nn import functional as F

from stepkd.losses import (
    LossTerms,
    kto,
    kto_values,
    outcome_cross_entropy,
    ratio_rule,
    reference_point,
    step_kto,
    step_kto_counts,
)
from stepkd.losses.kto import Reduction

REDUCTIONS = get_args(Reduction)


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gradient(loss: Tensor, *inputs: Tensor) -> list[list[float]]:
    return [grad.tolist() for grad in torch.autograd.grad(loss, inputs, retain_graph=True)]


def close(ours: Any, expected: Any) -> None:
    """Norm-wise agreement to 1e-10."""
    a, b = double(ours), double(expected)
    assert a.shape == b.shape
    assert float((a - b).norm()) <= 1e-10 * max(float(b.norm()), 1e-30)


# ---- the twins ------------------------------------------------------------------------------------------------------


def one_value(ratio: float, label: int, z: float, beta: float, weights: tuple[float, float]) -> tuple[float, float]:
    """Loss and its derivative in the log-ratio of one item, written out."""
    if label < 0:
        return 0.0, 0.0
    sign, weight = (1.0, weights[0]) if label == 1 else (-1.0, weights[1])
    value = sigmoid(sign * beta * (ratio - z))
    return weight * (1 - value), -weight * sign * beta * value * (1 - value)


def twin(
    solutions: list[tuple[int, list[tuple[float, int]]]],
    *,
    z0: float = 0.0,
    z0_step: list[float] | float = 0.0,
    beta: float = 0.1,
    reduction: str = "mean_steps",
    weights: tuple[float, float] = (1.0, 1.0),
    step_weights: tuple[float, float] = (1.0, 1.0),
    w_s: float = 1.0,
) -> tuple[float, list[float]]:
    """The loss of a whole batch and its gradient in every step's log-ratio, one solution at a time.

    A solution is (outcome, steps), a step (log-ratio, label).
    """
    outcomes = sum(outcome >= 0 for outcome, _ in solutions)
    judged = [sum(label >= 0 for _, label in steps) for _, steps in solutions]
    items = sum(n > 0 for n in judged)
    loss, gradients, number = 0.0, [], 0
    for (outcome, steps), n in zip(solutions, judged, strict=True):
        whole, slope = one_value(sum(ratio for ratio, _ in steps), outcome, z0, beta, weights)
        loss += whole / outcomes if outcomes else 0.0
        for ratio, label in steps:
            z = z0_step if isinstance(z0_step, float) else z0_step[number]
            own, own_slope = one_value(ratio, label, z, beta, step_weights)
            scale = w_s / items if items else 0.0
            if reduction == "mean_steps" and n:
                scale /= n
            loss += own * scale
            gradients.append((slope / outcomes if outcomes else 0.0) + own_slope * scale)
            number += 1
    return loss, gradients


SOLUTIONS: list[tuple[int, list[tuple[float, int]]]] = [
    (1, [(0.5, 1), (-1.25, 0), (2.0, 1)]),
    (0, [(-0.75, 1), (0.25, 0)]),
    (1, [(3.0, -1)]),
    (-1, [(-2.0, 0), (1.5, -1), (0.75, 1), (0.1, 1)]),
    (0, [(0.0, -1), (-0.3, -1)]),
]


def tensors(solutions: list[tuple[int, list[tuple[float, int]]]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    steps = [(k, ratio, label) for k, (_, own) in enumerate(solutions) for ratio, label in own]
    ratios_S = double([ratio for _, ratio, _ in steps]).requires_grad_()
    labels_S = torch.tensor([label for *_, label in steps], dtype=torch.long)
    completion_S = torch.tensor([k for k, *_ in steps], dtype=torch.long)
    return ratios_S, labels_S, completion_S, torch.tensor([outcome for outcome, _ in solutions], dtype=torch.long)


# ---- closed form ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "ratio"), [(1, 2.0), (0, -1.0)])
def test_closed_form(label: int, ratio: float) -> None:
    terms = kto(double([ratio]), torch.tensor([label]), z0=0.5, beta=0.1)
    assert list(terms.sums) == ["outcome"]
    assert terms.sums["outcome"].item() == pytest.approx(0.4625702, abs=5e-8)


def test_outcome_cross_entropy_by_hand() -> None:
    """The two halves of ImplicitPRM's loss, with gradients; completions without a label are in nothing."""
    ratios, labels, beta = [3.0, -8.0, 0.5, -2.0, 40.0], [1, 1, 0, 0, -1], 0.3
    inputs = double(ratios).requires_grad_()
    terms = outcome_cross_entropy(inputs, torch.tensor(labels), beta=beta)
    chances = [sigmoid(beta * ratio) for ratio in ratios]
    known = [(p, label) for p, label in zip(chances, labels, strict=True) if label >= 0]
    close(terms.sums["outcome"].item(), -sum(math.log(p if label else 1 - p) for p, label in known))
    close(gradient(terms.sums["outcome"], inputs)[0], [*(beta * (p - label) for p, label in known), 0.0])
    metrics = {name: (float(total), float(count)) for name, (total, count) in terms.metrics.items()}
    assert metrics["reward_correct"] == pytest.approx((0.3 * -5, 2))
    assert metrics["reward_incorrect"] == pytest.approx((0.3 * -1.5, 2))
    assert metrics["accuracy"] == (2, 4)
    close(terms.sums["outcome"].item(), -kto_values(inputs[:4], torch.tensor(labels[:4]), beta=beta).log().sum().item())


def test_outcome_cross_entropy_of_anything_stays_finite() -> None:
    inputs = double([1e6, -1e6, 0.0]).requires_grad_()
    terms = outcome_cross_entropy(inputs, torch.tensor([0, 1, -1]), beta=0.1)
    close(terms.sums["outcome"].item(), 2e5)
    close(gradient(terms.sums["outcome"], inputs)[0], [0.1, -0.1, 0.0])
    with pytest.raises(ValueError, match=r"log-ratios \(3,\) and labels \(2,\)"):
        outcome_cross_entropy(inputs, torch.tensor([0, 1]))
    points = torch.linspace(-4, 4, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 0, 1, 0, -1, 1])
    assert torch.autograd.gradcheck(lambda r: outcome_cross_entropy(r, labels, beta=0.7).sums["outcome"], points)


def test_policy_equal_to_reference() -> None:
    """Every value is a half, so the loss is half the class weight, whatever beta and the labels are."""
    zeros, labels = torch.zeros(4, dtype=torch.float64), torch.tensor([1, 0, 0, -1])
    assert kto_values(zeros, labels, beta=0.7).tolist() == [0.5] * 4
    assert kto(zeros, labels, beta=0.7).sums["outcome"].item() == 1.5
    assert kto(zeros, labels, weights=(3.0, 0.25)).sums["outcome"].item() == 0.5 * (3 + 2 * 0.25)
    for reduction, expected in (("mean_steps", 0.5 * ((2 + 4) / 2 + 4)), ("sum_steps", 0.5 * (2 + 4 + 4))):
        terms = step_kto(
            *(zeros, labels, torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0])),
            step_weights=(2.0, 4.0),
            reduction=reduction,  # type: ignore[arg-type]
        )
        assert terms.sums["outcome"].item() == 1.0
        assert terms.sums["step"].item() == expected


def test_a_reference_point_moves_the_two_classes_apart() -> None:
    ratios, labels = double([0.3, 0.3]), torch.tensor([1, 0])
    low, high = (kto_values(ratios, labels, reference=z) for z in (0.0, 2.0))
    assert high[0] < low[0]
    assert high[1] > low[1]
    assert kto_values(ratios, labels).sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(("total", "count", "expected"), [(3.0, 4.0, 0.75), (-3.0, 4.0, 0.0), (2.0, 0.0, 0.0)])
def test_reference_point(total: float, count: float, expected: float) -> None:
    assert reference_point(total, count) == expected


@pytest.mark.parametrize(
    ("counts", "weights"),
    [((10, 10), (1, 1)), ((10, 30), (3, 1)), ((8, 2), (1, 4)), ((0, 5), (1, 1)), ((5, 0), (1, 1))],
)
def test_ratio_rule(counts: tuple[int, int], weights: tuple[float, float]) -> None:
    assert ratio_rule(*counts) == weights
    if all(counts):
        assert weights[0] * counts[0] == weights[1] * counts[1]


def test_metrics() -> None:
    ratios, labels = double([2.0, 4.0, -1.0, 50.0, 9.0]).requires_grad_(), torch.tensor([1, 1, 0, 1, -1])
    metrics = kto(ratios, labels, z0=1.0, beta=0.5).metrics
    values = {name: (total.item(), count.item()) for name, (total, count) in metrics.items()}
    assert values == {"reward_correct": (28.0, 3.0), "reward_incorrect": (-0.5, 1.0), "saturated": (1.0, 4.0)}
    assert not any(tensor.requires_grad for pair in metrics.values() for tensor in pair)


def test_step_metrics_and_correct_answers_with_an_incorrect_step() -> None:
    ratios, labels, completions, outcomes = tensors(SOLUTIONS)
    metrics = step_kto(ratios, labels, completions, outcomes, beta=0.1).metrics
    values = {name: (total.item(), count.item()) for name, (total, count) in metrics.items()}
    assert values["reward_correct"] == pytest.approx((0.1 * (1.25 + 3.0), 2))
    assert values["step_reward_correct"] == pytest.approx((0.1 * (0.5 + 2.0 - 0.75 + 0.75 + 0.1), 5))
    assert values["step_reward_incorrect"] == pytest.approx((0.1 * (-1.25 + 0.25 - 2.0), 3))
    assert values["labels/correct_with_incorrect_step"] == (1.0, 1.0), "the other correct answer has no judged step"
    assert not any(tensor.requires_grad for pair in metrics.values() for tensor in pair)


# ---- brute force ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.5, 0.5)])
def test_kto_brute_force(weights: tuple[float, float]) -> None:
    ratios = double([2.0, -1.0, 0.0, 30.0, -7.5, 4.0]).requires_grad_()
    labels = [1, 0, -1, 0, 1, -1]
    loss = kto(ratios, torch.tensor(labels), z0=0.4, beta=0.3, weights=weights).sums["outcome"]
    pairs = [one_value(r, y, 0.4, 0.3, weights) for r, y in zip(ratios.tolist(), labels, strict=True)]
    close(loss.item(), sum(value for value, _ in pairs))
    close(gradient(loss, ratios)[0], [slope for _, slope in pairs])


CASES: list[dict[str, Any]] = [
    {},
    {"beta": 0.5, "w_s": 0.25},
    {"z0": 0.7, "z0_step": 0.2},
    {"z0_step": [0.1 * i for i in range(12)], "beta": 1.5},
    {"weights": (2.0, 0.5), "step_weights": (0.25, 3.0), "beta": 0.8},
]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: ",".join(case) or "plain")
def test_step_kto_brute_force(case: dict[str, Any], reduction: Any) -> None:
    ratios, labels, completions, outcomes = tensors(SOLUTIONS)
    options: dict[str, Any] = {key: double(value) if isinstance(value, list) else value for key, value in case.items()}
    weight = options.pop("w_s", 1.0)
    terms = step_kto(ratios, labels, completions, outcomes, reduction=reduction, **options)
    counts = step_kto_counts(labels, completions, outcomes)
    loss = reduce(terms.sums, counts, weights={"step": weight})
    expected, slopes = twin(SOLUTIONS, reduction=reduction, **case)
    close(loss.item(), expected)
    close(gradient(loss, ratios)[0], slopes)


steps = st.tuples(st.floats(-20, 20), st.sampled_from([1, 0, -1]))
batches = st.lists(st.tuples(st.sampled_from([1, 0, -1]), st.lists(steps, min_size=1, max_size=5)), max_size=6)
positive = st.floats(0.05, 4)


@given(batches, st.sampled_from(REDUCTIONS), positive, st.tuples(positive, positive), st.floats(0, 3))
@settings(max_examples=150, deadline=None)
def test_step_kto_brute_force_on_anything(
    solutions: list[tuple[int, list[tuple[float, int]]]],
    reduction: Any,
    beta: float,
    weights: tuple[float, float],
    z: float,
) -> None:
    """Batches without a class, without labels or without a solution included."""
    ratios, labels, completions, outcomes = tensors(solutions)
    same: dict[str, Any] = {"z0": z, "z0_step": z / 3, "beta": beta, "weights": weights}
    terms = step_kto(ratios, labels, completions, outcomes, reduction=reduction, **same)
    loss = reduce(terms.sums, step_kto_counts(labels, completions, outcomes))
    expected, slopes = twin(solutions, reduction=reduction, **same)
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-13)
    assert torch.allclose(torch.autograd.grad(loss, ratios)[0], double(slopes), rtol=1e-9, atol=1e-13)


def test_gradcheck() -> None:
    ratios, labels, completions, outcomes = tensors(SOLUTIONS)

    def loss(values: Tensor) -> Tensor:
        terms = step_kto(values, labels, completions, outcomes, z0=0.3, z0_step=0.1, beta=0.6)
        return terms.sums["outcome"] + 0.5 * terms.sums["step"]

    assert torch.autograd.gradcheck(loss, (ratios,))


def test_no_gradient_flows_through_the_reference_points() -> None:
    ratios, labels, completions, outcomes = tensors(SOLUTIONS)
    z0, z0_step = double(0.5).requires_grad_(), torch.full((12,), 0.25, dtype=torch.float64, requires_grad=True)
    terms = step_kto(ratios, labels, completions, outcomes, z0=z0, z0_step=z0_step)
    found = torch.autograd.grad(sum(terms.sums.values()), (z0, z0_step), allow_unused=True)  # type: ignore[arg-type]
    assert found == (None, None)


# ---- invariance -----------------------------------------------------------------------------------------------------


def test_step_log_ratios_add_up_to_the_completions() -> None:
    """The outcome term reads nothing but their sum."""
    ratios, labels, completions, outcomes = tensors(SOLUTIONS)
    totals = double([sum(ratio for ratio, _ in own) for _, own in SOLUTIONS]).requires_grad_()
    ours = step_kto(ratios, labels, completions, outcomes, z0=0.2, weights=(2.0, 1.0)).sums["outcome"]
    whole = kto(totals, outcomes, z0=0.2, weights=(2.0, 1.0)).sums["outcome"]
    close(ours.item(), whole.item())
    close(gradient(ours, ratios)[0], double(gradient(whole, totals)[0])[completions].tolist())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_step_per_solution_is_kto(reduction: Any) -> None:
    """The step term alone, where the only step is the solution and has its label."""
    ratios, labels = double([0.5, -2.0, 1.0, 3.0]).requires_grad_(), torch.tensor([1, 0, -1, 1])
    terms = step_kto(
        ratios, labels, torch.arange(4), labels, z0_step=0.3, beta=0.7, reduction=reduction, step_weights=(2.0, 3.0)
    )
    counts = step_kto_counts(labels, torch.arange(4), labels)
    alone = reduce({"step": terms.sums["step"]}, counts)
    plain = reduce(kto(ratios, labels, z0=0.3, beta=0.7, weights=(2.0, 3.0)).sums, {"outcome": 3})
    close(alone.item(), plain.item())
    close(gradient(alone, ratios)[0], gradient(plain, ratios)[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_micro_batches_give_the_whole_batch(parts: int, reduction: Any) -> None:
    ratios, labels, completions, outcomes = tensors(SOLUTIONS)
    whole_counts = step_kto_counts(labels, completions, outcomes)
    options: dict[str, Any] = {"z0": 0.4, "z0_step": 0.1, "weights": (2.0, 1.0), "step_weights": (1.0, 3.0)}
    whole = step_kto(ratios, labels, completions, outcomes, reduction=reduction, **options)
    pieces: list[LossTerms] = []
    counts = {"outcome": 0.0, "step": 0.0}
    for group in torch.arange(len(SOLUTIONS)).tensor_split(parts):
        mine = torch.isin(completions, group)
        own = (labels[mine], completions[mine] - group[0], outcomes[group])
        pieces.append(step_kto(ratios[mine], *own, reduction=reduction, **options))
        for name, count in step_kto_counts(*own).items():
            counts[name] += count
    assert counts == whole_counts
    loss = torch.stack([reduce(piece.sums, counts) for piece in pieces]).sum()
    expected = reduce(whole.sums, whole_counts)
    close(loss.item(), expected.item())
    close(gradient(loss, ratios)[0], gradient(expected, ratios)[0])
    for name, pair in whole.metrics.items():
        summed = [sum(values).item() for values in zip(*(p.metrics[name] for p in pieces), strict=True)]
        assert summed == pytest.approx([value.item() for value in pair], rel=1e-10, abs=1e-12)


def test_reductions_weigh_long_solutions_differently() -> None:
    """One judged step against three: averaged over its solution, or summed."""
    solutions = [(-1, [(0.0, 1)]), (-1, [(0.0, 1)] * 3)]
    ratios, labels, completions, outcomes = tensors(solutions)
    expected = {"mean_steps": 0.5, "sum_steps": 1.0}
    shares = {"mean_steps": [1 / 2] + [1 / 6] * 3, "sum_steps": [1 / 2] * 4}
    for reduction in REDUCTIONS:
        terms = step_kto(ratios, labels, completions, outcomes, beta=1.0, reduction=reduction)
        loss = reduce(terms.sums, step_kto_counts(labels, completions, outcomes))
        assert loss.item() == pytest.approx(expected[reduction], rel=1e-14)
        close(gradient(loss, ratios)[0], [-share / 4 for share in shares[reduction]])


def test_steps_without_a_label_do_not_count() -> None:
    """Neither in the loss, nor in the mean, nor through a reference point that is not a number."""
    labelled = [(1, [(0.5, 1), (-1.0, 0)]), (0, [(2.0, 0)])]
    more = [(1, [(0.5, 1), (7.0, -1), (-1.0, 0)]), (0, [(2.0, 0)]), (-1, [(9.0, -1)])]
    for reduction in REDUCTIONS:
        losses = []
        for solutions in (labelled, more):
            ratios, labels, completions, outcomes = tensors(solutions)
            terms = step_kto(ratios, labels, completions, outcomes, reduction=reduction)
            losses.append(terms.sums["step"].item())
            counts = step_kto_counts(labels, completions, outcomes)
            assert counts == {"outcome": 2.0, "step": 2.0}
        assert losses[0] == pytest.approx(losses[1], rel=1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_labelled_is_zero_and_stays_in_the_graph(reduction: Any) -> None:
    ratios, labels, completions, outcomes = tensors([(-1, [(1.0, -1), (2.0, -1)]), (-1, [(3.0, -1)])])
    terms = step_kto(ratios, labels, completions, outcomes, reduction=reduction)
    counts = step_kto_counts(labels, completions, outcomes)
    assert counts == {"outcome": 0.0, "step": 0.0}
    loss = reduce(terms.sums, counts)
    assert loss.item() == 0.0
    assert gradient(loss, ratios) == [[0.0] * 3]
    assert all(count == 0 and total == 0 for total, count in terms.metrics.values())


def test_extreme_log_ratios_stay_finite() -> None:
    ratios = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    loss = kto(ratios, torch.tensor([1, 1, 0, 0]), beta=1.0).sums["outcome"]
    loss.backward()
    assert loss.item() == 2.0
    assert ratios.grad is not None
    assert torch.isfinite(ratios.grad).all()


# ---- TRL's formula --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.33, 0.7)])
def test_parity_with_trl(weights: tuple[float, float]) -> None:
    """KTOTrainer: ``1 - sigmoid(beta (r - kl))`` of the chosen, ``1 - sigmoid(beta (kl - r))`` of the rejected."""
    ratios = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(8).requires_grad_()
    labels, kl = torch.arange(16) % 3 % 2, double(0.8)
    chosen, rejected = ratios[labels == 1], ratios[labels == 0]
    losses = (weights[0] * (1 - F.sigmoid(0.1 * (chosen - kl))), weights[1] * (1 - F.sigmoid(0.1 * (kl - rejected))))
    expected = torch.cat(losses).mean()
    loss = reduce(kto(ratios, labels, z0=kl, beta=0.1, weights=weights).sums, {"outcome": 16})
    close(loss.item(), expected.item())
    close(gradient(loss, ratios)[0], gradient(expected, ratios)[0])


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "mean"}, "reduction='mean': must be one of mean_steps, sum_steps"),
    ],
    ids=str,
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_kto(*tensors(SOLUTIONS), **options)


def test_shapes_that_differ() -> None:
    ratios, labels, completions, outcomes = tensors(SOLUTIONS)
    with pytest.raises(ValueError, match=r"\(12,\) step log-ratios, \(11,\) labels and \(12,\) completion numbers"):
        step_kto(ratios, labels[:-1], completions, outcomes)
    # A column of labels would broadcast: every label against every log-ratio, and a loss that looks fine.
    with pytest.raises(ValueError, match=r"log-ratios \(3,\) and labels \(3, 1\)"):
        kto(double([1.0, 2.0, 3.0]), torch.tensor([[1], [0], [1]]))
    with pytest.raises(ValueError, match=r"log-ratios \(3,\) and labels \(1,\)"):
        kto_values(double([1.0, 2.0, 3.0]), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"reference points \(3, 1\) for log-ratios \(3,\)"):
        kto_values(double([1.0, 2.0, 3.0]), torch.tensor([1, 0, 1]), reference=double([[0.1], [0.2], [0.3]]))
