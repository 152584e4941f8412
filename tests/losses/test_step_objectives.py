"""Regression on step values, ratings as two decisions, and the ranking of levels: closed forms, the formulas written
out in float64 with their gradients, their ends, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from losses_helper import reduce
from torch import Tensor
from torch.nn import functional as F

from stepkd.losses import multilevel_ranking, step_cross_entropy, step_decision_counts, step_decisions, step_regression

Solution = tuple[list[float], list[int]]


def double(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def case(classes: int, count: int = 8) -> tuple[Tensor, Tensor]:
    """Logits that require gradients, and soft targets among which some are hard."""
    draws = torch.Generator().manual_seed(3)
    logits, values = (torch.randn(count, classes, dtype=torch.float64, generator=draws) for _ in range(2))
    targets = values.softmax(-1)
    targets[: count // 2] = F.one_hot(torch.arange(count // 2) % classes, classes).double()
    return (2 * logits).requires_grad_(), targets


def same_gradient(found: Tensor, expected: Tensor, inputs: Tensor) -> None:
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    (ours,), (wanted,) = (torch.autograd.grad(each, inputs, retain_graph=True) for each in (found, expected))
    assert float((ours - wanted).norm()) <= 1e-10 * float(wanted.norm())


# --- regression ------------------------------------------------------------------------------------------------------


def test_regression_closed_form() -> None:
    logps, targets = double([[0.25, 0.75], [0.5, 0.5]]).log(), double([[0.5, 0.5], [1, 0]])
    assert step_regression(logps, targets, form="mse").sums["value"].item() == pytest.approx(0.0625 + 0.25, rel=1e-14)
    found = step_regression(logps, targets, form="bce").sums["value"].item()
    assert found == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2 + math.log(2), rel=1e-14)
    ratings = step_regression(double([[0.2, 0.3, 0.5]]).log(), double([[0, 1, 0]]), form="mse")
    assert ratings.sums["value"].item() == pytest.approx(0.2**2, rel=1e-13)  # neutral is not incorrect


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("form", ["mse", "bce"])
def test_regression_is_the_formula_written_out(form: Any, classes: int) -> None:
    """Also on log-probabilities over a vocabulary, which do not sum to one."""
    logits, targets = case(classes)
    value = targets[:, 1:].sum(-1)
    r = 1 - logits.softmax(-1)[:, 0]
    expected = (r - value) ** 2 if form == "mse" else -value * r.log() - (1 - value) * (1 - r).log()
    terms = step_regression(logits.log_softmax(-1) - 1.5, targets, form=form)
    same_gradient(terms.sums["value"], expected.sum(), logits)
    assert set(terms.metrics) == set(step_cross_entropy(logits.log_softmax(-1), targets).metrics)
    assert torch.autograd.gradcheck(
        lambda x: step_regression(x.log_softmax(-1), targets, form=form).sums["value"], logits
    )


def test_binary_cross_entropy_is_cross_entropy_of_two_classes() -> None:
    logits, targets = case(2)
    expected = step_cross_entropy(logits.log_softmax(-1), targets).sums["prm"]
    same_gradient(step_regression(logits.log_softmax(-1), targets, form="bce").sums["value"], expected, logits)


def test_regression_of_far_scores_stays_finite() -> None:
    logits = double([[500.0, -500.0]]).requires_grad_()
    for form, expected in (("mse", 1.0), ("bce", 1000.0)):
        terms = step_regression(logits.log_softmax(-1), double([[0, 1]]), form=form)  # type: ignore[arg-type]
        assert terms.sums["value"].item() == pytest.approx(expected)
        assert torch.isfinite(torch.autograd.grad(terms.sums["value"], logits)[0]).all()


# --- decisions -------------------------------------------------------------------------------------------------------


def test_decisions_closed_form() -> None:
    """-1 answers the first question alone; 0 and 1 share its answer and differ in the second."""
    logps = double([[0.5, 0.3, 0.2]] * 3).log()
    targets = torch.eye(3, dtype=torch.float64)
    sums = step_decisions(logps, targets).sums
    assert sums["ordinal_incorrect"].item() == pytest.approx(3 * math.log(2), rel=1e-14)
    assert sums["ordinal_neutral"].item() == pytest.approx(-math.log(0.6) - math.log(0.4), rel=1e-14)
    counts = step_decision_counts(targets)
    assert counts == {"ordinal_incorrect": 3.0, "ordinal_neutral": 2.0}
    expected = math.log(2) - (math.log(0.6) + math.log(0.4)) / 2
    assert reduce(sums, counts).item() == pytest.approx(expected, rel=1e-14)


def test_decisions_are_the_formula_written_out_and_undivided_cross_entropy() -> None:
    logits, targets = case(3)
    probs = logits.softmax(-1)
    incorrect, neutral = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for p, t in zip(probs, targets, strict=True):
        incorrect = incorrect - t[0] * p[0].log() - (t[1] + t[2]) * (p[1] + p[2]).log()
        neutral = neutral - t[1] * (p[1] / (p[1] + p[2])).log() - t[2] * (p[2] / (p[1] + p[2])).log()
    sums = step_decisions(logits.log_softmax(-1) - 0.7, targets).sums  # among the three classes alone
    same_gradient(sums["ordinal_incorrect"], incorrect, logits)
    same_gradient(sums["ordinal_neutral"], neutral, logits)
    whole = step_cross_entropy(logits.log_softmax(-1), targets).sums["prm"]
    same_gradient(sums["ordinal_incorrect"] + sums["ordinal_neutral"], whole, logits)


def test_no_step_gets_to_the_second_decision() -> None:
    logits = double([[0.0, 1.0, 2.0]]).requires_grad_()
    terms = step_decisions(logits.log_softmax(-1), double([[1, 0, 0]]))
    assert step_decision_counts(double([[1, 0, 0]]))["ordinal_neutral"] == 0.0
    assert terms.sums["ordinal_neutral"].item() == 0.0
    assert torch.autograd.grad(terms.sums["ordinal_neutral"], logits)[0].abs().max() == 0


# --- the ranking of levels -------------------------------------------------------------------------------------------


def ranked(solutions: list[Solution], **settings: Any) -> tuple[Tensor, Any]:
    scores = torch.tensor([s for each, _ in solutions for s in each], dtype=torch.float64, requires_grad=True)
    levels = torch.tensor([level for _, each in solutions for level in each], dtype=torch.long)
    owner = torch.tensor([i for i, (each, _) in enumerate(solutions) for _ in each], dtype=torch.long)
    return scores, multilevel_ranking(scores, levels, owner, len(solutions), **{"num_levels": 3, **settings})


@pytest.mark.parametrize(
    ("scores", "levels", "expected", "ordered"),
    [
        ([0.0, 0.3, 0.6], [0, 1, 2], 0.0, (3, 3)),  # just far enough apart
        ([0.9, 0.1], [2, 0], 0.0, (1, 1)),
        ([0.5, 0.4], [2, 0], 0.6 - 0.1, (1, 1)),  # two levels apart, and 0.6 is asked for
        ([0.5, 0.4], [2, 1], 0.3 - 0.1, (1, 1)),
        ([0.1, 0.9], [2, 0], 0.8, (0, 1)),  # in the incorrect order, far apart
        ([0.4, 0.5], [2, 0], (0.6 - 0.1) + 0.1, (0, 1)),
        ([0.2, 0.6], [1, 1], 0.2 - 0.1, (0, 0)),  # one level, whose scores lie 0.2 from their mean
        ([0.7], [0], 0.0, (0, 0)),
    ],
)
def test_ranking_closed_forms(
    scores: list[float], levels: list[int], expected: float, ordered: tuple[int, int]
) -> None:
    _, found = ranked([(scores, levels)])
    assert found.sums["ranking"].item() == pytest.approx(expected, abs=1e-12)
    assert tuple(int(each) for each in found.metrics["ranking_ordered"]) == ordered


def by_hand(scores: Tensor, levels: list[int], lower: float, upper: float) -> Tensor:
    """The loss of one solution, level by level."""
    members = {level: [i for i, each in enumerate(levels) if each == level] for level in sorted(set(levels))}
    means = {level: scores[own].mean() for level, own in members.items()}
    total = scores.sum() * 0
    for level, own in members.items():
        total = total + torch.relu(torch.stack([(scores[i] - means[level]).abs() for i in own]).mean() - upper)
    for worse in means:
        for better in means:
            if better > worse:
                total = total + torch.relu((better - worse) * lower - (means[better] - means[worse]).abs())
                total = total + torch.relu(means[worse] - means[better])
    return total


def test_ranking_is_the_formula_written_out() -> None:
    draws = torch.Generator().manual_seed(7)
    sizes = (5, 1, 8, 3)
    solutions: list[Solution] = [
        (torch.rand(n, generator=draws).tolist(), torch.randint(3, (n,), generator=draws).tolist()) for n in sizes
    ]
    solutions.insert(2, ([], []))  # one without a labelled step
    scores, found = ranked(solutions, lower=0.4, upper=0.05)
    parts = scores.split([len(each) for each, _ in solutions])
    expected = [by_hand(part, each, 0.4, 0.05) for part, (_, each) in zip(parts, solutions, strict=True) if each]
    same_gradient(found.sums["ranking"], torch.stack(expected).sum(), scores)
    alone = ranked([solutions[0]], lower=0.4, upper=0.05)[1].sums["ranking"]
    assert alone.item() == pytest.approx(expected[0].item(), rel=1e-12)


def test_means_a_little_out_of_order_have_no_gradient() -> None:
    """As the docstring says: separation and order cancel there."""
    scores, found = ranked([([0.45, 0.55], [2, 0])])
    assert torch.autograd.grad(found.sums["ranking"], scores)[0].abs().max() == 0
    far, apart = ranked([([0.1, 0.9], [2, 0])])
    assert torch.autograd.grad(apart.sums["ranking"], far)[0].tolist() == [-1.0, 1.0]


# --- bad input -------------------------------------------------------------------------------------------------------


def test_no_step_is_a_sum_of_zero() -> None:
    none2, none3 = torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0, 3, dtype=torch.float64)
    assert step_regression(none2, none2, form="mse").sums["value"].item() == 0.0
    assert step_regression(none2, none2, form="bce").sums["value"].item() == 0.0
    assert [value.item() for value in step_decisions(none3, none3).sums.values()] == [0.0, 0.0]
    assert ranked([([], [])])[1].sums["ranking"].item() == 0.0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"log-probabilities \(1, 2\) but targets \(1, 3\)"):
        step_regression(torch.zeros(1, 2), torch.zeros(1, 3), form="mse")
    with pytest.raises(ValueError, match="form='mae': mse or bce"):
        step_regression(torch.zeros(1, 2), torch.zeros(1, 2), form="mae")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 classes: the two decisions are on three"):
        step_decisions(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="equal ones"):
        multilevel_ranking(torch.zeros(2), torch.zeros(1, dtype=torch.long), torch.zeros(2).long(), 1, num_levels=2)
