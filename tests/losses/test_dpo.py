"""DPO, Step-DPO and visit smoothing: closed forms, plain Python twins with gradients, reference formulas, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_helper import reduce
from torch import Tensor
from torch.nn import functional as F

from stepkd.losses import dpo, visit_smoothing

CHOSEN = [0.6, -1.5, 3.0, 0.0, 12.0]
REJECTED = [-0.4, 0.5, 2.5, 0.0, -9.0]
LENGTHS = [(3, 4), (1, 9), (7, 2), (5, 5), (20, 11)]
KINDS = ["sigmoid", "ipo"]


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sides() -> tuple[Tensor, Tensor]:
    return double(CHOSEN).requires_grad_(), double(REJECTED).requires_grad_()


def gradient(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [grad.clone() for grad in torch.autograd.grad(loss, inputs, retain_graph=True)]


def close(a: Tensor, b: Tensor) -> None:
    """Norm-wise agreement to 1e-10."""
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape
    assert float((a - b).norm()) <= 1e-10 * max(float(b.norm()), 1e-30)


def twin(
    chosen: list[float],
    rejected: list[float],
    *,
    beta: float,
    loss: str = "sigmoid",
    smoothing: list[float] | None = None,
    lengths: list[tuple[int, int]] | None = None,
) -> tuple[float, list[float], list[float]]:
    """Sum over pairs and its derivatives in both log-ratios, one pair at a time."""
    total, d_chosen, d_rejected = 0.0, [], []
    for i, (w, x) in enumerate(zip(chosen, rejected, strict=True)):
        n_w, n_x = lengths[i] if lengths else (1, 1)
        d = w / n_w - x / n_x
        if loss == "sigmoid":
            a = smoothing[i] if smoothing else 0.0
            correct, incorrect = 1 / (1 + math.exp(-beta * d)), 1 / (1 + math.exp(beta * d))
            total += -(1 - a) * math.log(correct) - a * math.log(incorrect)
            slope = -(1 - a) * beta * incorrect + a * beta * correct
        else:
            total += (d - 1 / (2 * beta)) ** 2
            slope = 2 * (d - 1 / (2 * beta))
        d_chosen.append(slope / n_w)
        d_rejected.append(-slope / n_x)
    return total, d_chosen, d_rejected


# ---- closed form ----------------------------------------------------------------------------------------------------


def test_closed_form_of_step_dpo() -> None:
    """Beta 0.4, as the paper's text has it."""
    terms = dpo(double([0.6]), double([-0.4]), beta=0.4)
    assert list(terms.sums) == ["dpo"]
    assert terms.sums["dpo"].item() == pytest.approx(0.5130153, abs=5e-8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_policy_equal_to_reference(smoothing: float) -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    loss = reduce(dpo(zeros, zeros, label_smoothing=smoothing).sums, {"dpo": 3})
    assert loss.item() == pytest.approx(math.log(2), rel=1e-14)
    assert dpo(zeros, zeros, loss="ipo", beta=0.25).sums["dpo"].item() == 3 * 4.0


def test_visits_closed_form() -> None:
    found = visit_smoothing(torch.tensor([30, 10, 5, 0, 7]), torch.tensor([10, 10, 20, 0, 0]))
    assert found.tolist() == [0.25, 0.5, 0.5, 0.5, 0.0]
    assert found.dtype == torch.float64


@given(st.integers(1, 1000), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_visits_equal_the_papers_code(better: int, worse: int) -> None:
    code = 1 - 1 / (1 + worse / max(1, better))
    assert visit_smoothing(torch.tensor([better]), torch.tensor([worse])).item() == pytest.approx(min(code, 0.5))


def test_smoothing_pulls_towards_a_finite_margin() -> None:
    """With smoothing a the loss is least where ``sigma(beta D) = 1 - a``."""
    best = math.log(0.8 / 0.2) / 0.1
    chosen, rejected = double([best]).requires_grad_(), double([0.0])
    loss = dpo(chosen, rejected, beta=0.1, label_smoothing=0.2).sums["dpo"]
    assert abs(gradient(loss, chosen)[0].item()) < 1e-15


def test_a_half_says_nothing() -> None:
    """At 0.5 the sides can be exchanged."""
    there = dpo(double(CHOSEN), double(REJECTED), label_smoothing=0.5).sums["dpo"]
    back = dpo(double(REJECTED), double(CHOSEN), label_smoothing=0.5).sums["dpo"]
    assert there.item() == pytest.approx(back.item(), rel=1e-14)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_metrics(lengths: Any) -> None:
    metrics = dpo(*sides(), beta=0.5, lengths_P2=None if lengths is None else torch.tensor(lengths)).metrics
    values = {name: total.item() / count.item() for name, (total, count) in metrics.items()}
    n = lengths or [(1, 1)] * 5
    chosen = [w / a for w, (a, _) in zip(CHOSEN, n, strict=True)]
    rejected = [x / b for x, (_, b) in zip(REJECTED, n, strict=True)]
    assert values["reward_chosen"] == pytest.approx(0.5 * sum(chosen) / 5)
    assert values["reward_rejected"] == pytest.approx(0.5 * sum(rejected) / 5)
    assert values["margin"] == pytest.approx(values["reward_chosen"] - values["reward_rejected"])
    assert values["accuracy"] == pytest.approx(sum(w > x for w, x in zip(chosen, rejected, strict=True)) / 5)
    assert not any(tensor.requires_grad for pair in metrics.values() for tensor in pair)


# ---- brute force ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["sums", "length-normalised"])
@pytest.mark.parametrize("beta", [0.1, 1.3])
@pytest.mark.parametrize(
    ("loss", "smoothing"),
    [*((kind, None) for kind in KINDS), ("sigmoid", [0.2] * 5), ("sigmoid", [0.0, 0.25, 0.5, 0.125, 0.4])],
    ids=["sigmoid", "ipo", "smoothed", "smoothed by pair"],
)
def test_brute_force(loss: Any, smoothing: Any, beta: float, lengths: Any) -> None:
    chosen, rejected = sides()
    terms = dpo(
        chosen,
        rejected,
        beta=beta,
        loss=loss,
        label_smoothing=0.0 if smoothing is None else double(smoothing),
        lengths_P2=None if lengths is None else torch.tensor(lengths),
    )
    total, *slopes = twin(CHOSEN, REJECTED, beta=beta, loss=loss, smoothing=smoothing, lengths=lengths)
    assert terms.sums["dpo"].item() == pytest.approx(total, rel=1e-11)
    for ours, expected in zip(gradient(terms.sums["dpo"], chosen, rejected), slopes, strict=True):
        close(ours, double(expected))


def test_one_number_is_the_same_for_every_pair() -> None:
    one, each = (dpo(*sides(), label_smoothing=a).sums["dpo"].item() for a in (0.2, double([0.2] * 5)))
    assert one == each


def test_visit_smoothing_as_label_smoothing() -> None:
    """The paper's loss, pair by pair."""
    better, worse = torch.tensor([30, 4, 9, 1, 0]), torch.tensor([10, 4, 1, 0, 0])
    loss = dpo(*sides(), beta=0.1, label_smoothing=visit_smoothing(better, worse)).sums["dpo"]
    shares = [0.25, 0.5, 0.1, 0.0, 0.5]
    assert loss.item() == pytest.approx(twin(CHOSEN, REJECTED, beta=0.1, smoothing=shares)[0], rel=1e-12)


@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("normalised", [False, True])
def test_gradcheck(loss: Any, normalised: bool) -> None:
    lengths = torch.tensor(LENGTHS) if normalised else None
    smoothing = 0.1 if loss == "sigmoid" else 0.0

    def value(chosen: Tensor, rejected: Tensor) -> Tensor:
        return dpo(chosen, rejected, beta=0.3, loss=loss, label_smoothing=smoothing, lengths_P2=lengths).sums["dpo"]

    assert torch.autograd.gradcheck(value, sides())


# ---- invariance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("loss", KINDS)
def test_micro_batches_give_the_whole_batch(parts: int, loss: Any) -> None:
    chosen, rejected = sides()
    whole = dpo(chosen, rejected, loss=loss)
    pieces = [
        dpo(w, x, loss=loss) for w, x in zip(chosen.tensor_split(parts), rejected.tensor_split(parts), strict=True)
    ]
    total = torch.stack([reduce(piece.sums, {"dpo": 5}) for piece in pieces]).sum()
    expected = reduce(whole.sums, {"dpo": 5})
    assert total.item() == pytest.approx(expected.item(), rel=1e-13)
    for a, b in zip(gradient(total, chosen, rejected), gradient(expected, chosen, rejected), strict=True):
        close(a, b)
    for name, pair in whole.metrics.items():
        summed = [sum(values).item() for values in zip(*(p.metrics[name] for p in pieces), strict=True)]
        assert summed == pytest.approx([value.item() for value in pair])


def test_shared_leading_tokens_cancel() -> None:
    """Only the difference counts: what both sides share can be added to both."""
    plain = dpo(double(CHOSEN), double(REJECTED)).sums["dpo"].item()
    shifted = dpo(double(CHOSEN) + 2.5, double(REJECTED) + 2.5).sums["dpo"].item()
    assert shifted == pytest.approx(plain, rel=1e-13)


def test_no_pairs() -> None:
    empty = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    loss = reduce(dpo(empty, empty).sums, {"dpo": 0})
    assert loss.item() == 0.0
    assert loss.requires_grad


def test_extreme_log_ratios_stay_finite() -> None:
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = dpo(chosen, -chosen.detach(), beta=1.0, label_smoothing=0.1).sums["dpo"]
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert chosen.grad is not None
    assert torch.isfinite(chosen.grad).all()


# ---- the formulas of others -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
def test_parity_with_conservative_dpo(smoothing: float) -> None:
    """The DPO authors' ``preference_loss``: from four log-probabilities, smoothed, averaged over pairs."""
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(2, 8, dtype=torch.float64, generator=generator).mul(3).requires_grad_()
    reference = torch.randn(2, 8, dtype=torch.float64, generator=generator).mul(3)
    logits = (policy[0] - policy[1]) - (reference[0] - reference[1])
    expected = (-F.logsigmoid(0.1 * logits) * (1 - smoothing) - F.logsigmoid(-0.1 * logits) * smoothing).mean()
    ratios = policy - reference
    loss = reduce(dpo(ratios[0], ratios[1], beta=0.1, label_smoothing=smoothing).sums, {"dpo": 8})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    close(gradient(loss, policy)[0], gradient(expected, policy)[0])


def test_parity_with_trl_on_ipo() -> None:
    """DPOTrainer: IPO on means over tokens."""
    chosen, rejected = sides()
    lengths = torch.tensor(LENGTHS)
    means = chosen / lengths[:, 0].clamp(min=1.0) - rejected / lengths[:, 1].clamp(min=1.0)
    ipo = ((means - 1 / (2 * 0.2)) ** 2).sum()
    close(dpo(chosen, rejected, beta=0.2, loss="ipo", lengths_P2=lengths).sums["dpo"], ipo)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "kto"}, "loss='kto': must be one of sigmoid, ipo"),
    ],
    ids=str,
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpo(*sides(), **options)


def test_shapes_that_differ() -> None:
    """A column against a row would broadcast to every chosen side with every rejected one."""
    chosen, rejected = sides()
    with pytest.raises(ValueError, match=r"chosen log-ratios \(5,\) and rejected \(5, 1\)"):
        dpo(chosen, rejected[:, None])
    with pytest.raises(ValueError, match=r"chosen log-ratios \(5,\) and rejected \(1,\)"):
        dpo(chosen, rejected[:1])
    with pytest.raises(ValueError, match=r"label_smoothing of shape \(5, 1\) for 5 pairs"):
        dpo(chosen, rejected, label_smoothing=torch.zeros(5, 1))
    with pytest.raises(ValueError, match=r"lengths of shape \(2, 5\) for 5 pairs"):
        dpo(chosen, rejected, lengths_P2=torch.ones(2, 5))


def test_negative_visits() -> None:
    with pytest.raises(ValueError, match="visit counts must not be negative"):
        visit_smoothing(torch.tensor([3]), torch.tensor([-1]))
