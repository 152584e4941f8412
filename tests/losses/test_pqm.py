"""PQM's ranking of steps: closed forms, the formula term by term in float64, and its ends."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from stepkd.losses import pqm

Solution = tuple[Sequence[float], Sequence[bool]]


def by_hand(scores: Tensor, correct: Sequence[bool], margin: float) -> Tensor:
    """Equation 10 of one solution, written out."""
    below = sum((score + margin).exp() for score, good in zip(scores, correct, strict=True) if not good)
    rising, terms = torch.ones((), dtype=scores.dtype), []
    if not all(correct):
        terms.append(-torch.log(rising / (rising + below)))
    for score, good in zip(scores, correct, strict=True):
        if good:
            rising = rising + score.exp()
            terms.append(-torch.log(score.exp() / (rising + below)))
    return torch.stack(terms).mean()


def flat(solutions: Sequence[Solution]) -> tuple[Tensor, Tensor, Tensor]:
    scores = torch.tensor([s for each, _ in solutions for s in each], dtype=torch.float64, requires_grad=True)
    correct = torch.tensor([c for _, each in solutions for c in each])
    completion = torch.tensor([i for i, (each, _) in enumerate(solutions) for _ in each])
    return scores, correct, completion


@pytest.mark.parametrize(
    ("scores", "correct", "expected"),
    [
        ([0.0], [True], math.log(2)),  # against the start alone
        ([0.0], [False], math.log(1 + math.e)),  # the start against a step that is to stand 1 below
        ([math.log(2), math.log(3)], [True, True], (math.log(3 / 2) + math.log(6 / 3)) / 2),
        ([0.0, 0.0], [True, False], (math.log(1 + math.e) + math.log(2 + math.e)) / 2),
        ([0.0, 0.0], [False, True], (math.log(1 + math.e) + math.log(2 + math.e)) / 2),  # also a later correct step
    ],
)
def test_closed_forms(scores: list[float], correct: list[bool], expected: float) -> None:
    found = pqm(*flat([(scores, correct)]), 1, margin=1.0)
    assert float(found.sums["pqm"].detach()) == pytest.approx(expected, rel=1e-12)


def test_value_and_gradient_are_those_of_the_formula_written_out() -> None:
    draws = torch.Generator().manual_seed(5)
    sizes = (4, 1, 7, 3, 1)
    solutions: list[Solution] = [
        (torch.randn(n, generator=draws).mul(3).tolist(), (torch.rand(n, generator=draws) < 0.6).tolist())
        for n in sizes
    ]
    solutions[3] = (solutions[3][0], [True, True, True])
    scores, correct, completion = flat(solutions)
    assert 0 < int(correct.sum()) < len(correct)
    # A completion without a labelled step adds nothing.
    found = pqm(scores, correct, completion + (completion > 1), len(sizes) + 1, margin=2.5).sums["pqm"]
    parts = scores.split(list(sizes))
    expected = torch.stack([by_hand(part, each, 2.5) for part, (_, each) in zip(parts, solutions, strict=True)]).sum()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(found, scores)
    (wanted,) = torch.autograd.grad(expected, scores)
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-10
    assert torch.autograd.gradcheck(lambda values: pqm(values, correct, completion, len(sizes)).sums["pqm"], scores)


def test_far_scores_stay_finite_and_are_ordered() -> None:
    """The authors' code divides exponentials; here nothing overflows."""
    found = pqm(*flat([([400.0, 900.0, -900.0], [True, True, False])]), 1)
    assert float(found.sums["pqm"].detach()) == pytest.approx(0.0, abs=1e-6)
    assert [float(each) for each in found.metrics["pqm_ordered"]] == [3.0, 3.0]
    empty = pqm(torch.zeros(0), torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.long), 2)
    assert float(empty.sums["pqm"]) == 0.0


def test_bad_input() -> None:
    scores, correct, completion = flat([([0.0, 1.0], [True, False])])
    with pytest.raises(ValueError, match="equal ones"):
        pqm(scores, correct[:1], completion, 1)
    with pytest.raises(ValueError, match=r"margin=-1\.0"):
        pqm(scores, correct, completion, 1, margin=-1.0)
