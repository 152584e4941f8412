"""What teachers of reward models have beside probabilities: MCMI by closed form and brute force, LELP's sub-classes by
their properties."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stepkd.errors import ConfigError
from stepkd.losses import class_centroids, mcmi, subclass_directions, subclass_targets

L, H = 60, 7


def double(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def entropy(probs: Sequence[float]) -> float:
    return -sum(p * math.log(p) for p in probs if p)


# --- MCMI ----------------------------------------------------------------------------------------------------------


def test_closed_form_on_a_table_of_two_by_two() -> None:
    """Two steps of each label: the information is the entropy of a label's mean prediction less their mean entropy."""
    probs = double([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.2, 0.8]])
    labels = double([[1, 0], [1, 0], [0, 1], [0, 1]])
    centroids = class_centroids(probs.log(), labels)
    assert torch.allclose(centroids, double([[0.7, 0.3], [0.2, 0.8]]), rtol=1e-14)
    information = (2 * entropy([0.7, 0.3]) - entropy([0.9, 0.1]) - entropy([0.5, 0.5])) / 4
    found = mcmi(probs.log(), labels, centroids).sums
    assert list(found) == ["mcmi"]
    assert found["mcmi"].item() == pytest.approx(-4 * information, rel=1e-13)


def test_equal_predictions_for_a_label_have_no_information() -> None:
    logps, labels = double([[0.3, 0.7]] * 3).log(), F.one_hot(torch.tensor([1, 1, 1]), 2).double()
    centroids = class_centroids(logps, labels)
    assert centroids[0].tolist() == [0.5, 0.5], "a class without steps"
    assert mcmi(logps, labels, centroids).sums["mcmi"].item() == pytest.approx(0, abs=1e-15)


def test_a_class_that_never_has_a_probability_above_0_gives_finite_values() -> None:
    """In float32 a gap of 120 underflows."""
    logits = torch.tensor([[0.0, 120.0], [0.0, 130.0]], requires_grad=True)
    labels = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    loss = mcmi(logits, labels, class_centroids(logits.detach(), labels)).sums["mcmi"]
    (gradient,) = torch.autograd.grad(loss, logits)
    assert math.isfinite(loss.item())
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("classes", [2, 3])
def test_mcmi_brute_force(classes: int) -> None:
    """Python floats, one step at a time, soft labels; the gradient written out."""
    logits, targets = draw(9, classes).mul(2).requires_grad_(), draw(9, classes, seed=1).softmax(-1)
    centroids = draw(classes, classes, seed=2).softmax(-1)
    loss = mcmi(logits.log_softmax(-1) - 0.7, targets, centroids).sums["mcmi"]  # among other tokens, too
    total, wanted = 0.0, []
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        norm = math.log(sum(map(math.exp, row)))
        gradient = [0.0] * classes
        for weight, centroid in zip(target, centroids.tolist(), strict=True):
            ratios = [value - norm - math.log(q) for value, q in zip(row, centroid, strict=True)]
            distance = sum(math.exp(value - norm) * ratio for value, ratio in zip(row, ratios, strict=True))
            total -= weight * distance
            for c, (value, ratio) in enumerate(zip(row, ratios, strict=True)):
                gradient[c] -= weight * math.exp(value - norm) * (ratio - distance)
        wanted.append(gradient)
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert torch.allclose(torch.autograd.grad(loss, logits)[0], double(wanted), rtol=1e-11, atol=1e-14)


def test_with_the_centroids_of_its_own_steps_the_gradient_is_that_of_the_information() -> None:
    logits, labels = draw(12, 2).requires_grad_(), F.one_hot(torch.arange(12) % 2, 2).double()
    probs = logits.softmax(-1)
    means = torch.stack([probs[labels[:, c] == 1].mean(0) for c in (0, 1)])
    information = (-(means * means.log()).sum() * 6) + (probs * probs.log()).sum()
    loss = mcmi(logits.log_softmax(-1), labels, class_centroids(logits, labels).detach()).sums["mcmi"]
    ours, whole = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, -information))
    assert loss.item() == pytest.approx(-information.item(), rel=1e-12)
    assert torch.allclose(ours, whole, rtol=1e-10, atol=1e-14)
    assert torch.autograd.gradcheck(
        lambda x: mcmi(x.log_softmax(-1), labels, double([[0.6, 0.4], [0.1, 0.9]])).sums["mcmi"], (logits,)
    )


# --- LELP ----------------------------------------------------------------------------------------------------------


def teacher() -> tuple[Tensor, Tensor, Tensor]:
    """Features of which the first two are what the output reads, log-probabilities, and the output's weights."""
    features, weights = draw(L, H) * double([3, 2, 5, 1, 0.5, 0.2, 0.1]), torch.zeros(2, H, dtype=torch.float64)
    weights[:, :2] = draw(2, 2, seed=3)
    return features, (features @ weights.T).log_softmax(-1), weights


def test_one_subclass_is_soft_cross_entropy() -> None:
    features, logps, weights = teacher()
    targets = subclass_targets(logps, features, *subclass_directions(features, logps, weights, 1))
    assert torch.equal(targets, logps.softmax(-1))


@pytest.mark.parametrize("subclasses", [2, 4])
def test_subclasses_add_up_to_their_class(subclasses: int) -> None:
    features, logps, weights = teacher()
    found = subclass_directions(features, logps, weights, subclasses)
    targets = subclass_targets(logps, features, *found, temperature=0.7)
    assert targets.shape == (L, 2 * subclasses)
    assert torch.allclose(targets.view(L, 2, subclasses).sum(-1), logps.softmax(-1), rtol=1e-13)
    assert (targets > 0).all()


def test_a_target_by_hand() -> None:
    directions, offsets = double([[[1, 0], [0, 1]], [[0, 2], [1, 0]]]), double([[0, 0], [0, 1]])
    targets = subclass_targets(double([[0.25, 0.75]]).log(), double([[3, 1]]), directions, offsets, temperature=2.0)
    # projections 3, 1 of the first class and 2, 2 of the second
    split = math.exp(1.5) / (math.exp(1.5) + math.exp(0.5))
    assert targets[0].tolist() == pytest.approx([0.25 * split, 0.25 * (1 - split), 0.375, 0.375], rel=1e-13)


def test_directions_are_unread_centred_and_of_unit_variance_on_average() -> None:
    features, logps, weights = teacher()
    directions, offsets = subclass_directions(features, logps, weights, 3)
    assert (directions @ weights.T).abs().max() < 1e-12, "in the null space of the output"
    for c in (0, 1):
        share = logps.softmax(-1)[:, c] / logps.softmax(-1)[:, c].sum()
        projections = features @ directions[c].T - offsets[c]
        assert (share @ projections).abs().max() < 1e-12
        assert float((share @ projections.square()).mean()) == pytest.approx(1, rel=1e-12)
        gram = directions[c] @ directions[c].T
        assert torch.allclose(gram, gram[0, 0] * torch.eye(3, dtype=torch.float64), atol=1e-11), "at right angles"


def test_the_direction_is_that_of_most_variance_where_the_output_does_not_look() -> None:
    features, logps, weights = teacher()
    features[:, 2:] = 0.0
    features[:, 3] = -2 * draw(L, seed=5)
    directions, _ = subclass_directions(features, logps, weights, 1)
    assert directions[:, 0].abs().argmax(-1).tolist() == [3, 3], "not 0 or 1, which vary more and are read"
    assert torch.allclose(directions[:, 0, [0, 1, 2, 4, 5, 6]], torch.zeros(2, 6, dtype=torch.float64), atol=1e-12)
    mirrored, _ = subclass_directions(-features, logps, weights, 1)
    assert torch.allclose(mirrored, directions), "the sign is not left to the solver"


def test_the_directions_are_a_rotation_of_the_principal_ones() -> None:
    """Of each class: they span the same as numpy's, none of them is one of those, and they are the same every time."""
    features, logps, weights = teacher()
    found, again = (subclass_directions(features, logps, weights, 3)[0] for _ in range(2))
    assert torch.equal(found, again)
    unread = torch.linalg.svd(weights).Vh[2:]
    for c in (0, 1):
        share = logps.softmax(-1)[:, c]
        values, vectors = torch.linalg.eigh(torch.cov((features @ unread.T).T, aweights=share, correction=0))
        principal = vectors.T[-3:] @ unread
        cosines = principal @ found[c].T / found[c].norm(dim=-1)
        assert torch.allclose(cosines @ cosines.T, torch.eye(3, dtype=torch.float64), atol=1e-10)
        assert cosines.abs().max() < 0.999
        assert float(found[c][0].norm()) == pytest.approx(float(values[-3:].mean()) ** -0.5, rel=1e-10)


def test_the_order_of_steps_does_not_matter() -> None:
    features, logps, weights = teacher()
    ways = (
        subclass_directions(features, logps, weights, 3),
        subclass_directions(features.flip(0), logps.flip(0), weights, 3),
    )
    for one, other in zip(*ways, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


def test_features_that_vary_in_too_few_directions_are_refused() -> None:
    features, logps, weights = teacher()
    with pytest.raises(ConfigError, match=r"fewer than 6 directions that its output does not read: lower head\.subcl"):
        subclass_directions(features, logps, weights, 6)
    features[:, 3:] = 1.0
    with pytest.raises(ConfigError, match="fewer than 2 directions"):
        subclass_directions(features, logps, weights, 2)
    with pytest.raises(ConfigError, match="fewer than 9 directions"):
        subclass_directions(features, logps, weights, 9)
