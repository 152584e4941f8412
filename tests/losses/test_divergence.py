"""Divergences: values by plain sums, gradients by closed forms, ends, bounds, buckets, and TRL's JSD."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from stepkd.losses import (
    balanced_kl,
    entropy,
    forward_kl,
    generalized_jsd,
    nkd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    temperature_slope,
    tempered,
    top_k_buckets,
)

Divergence = Callable[[Tensor, Tensor], Tensor]
NAMED: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd_0.1": partial(generalized_jsd, beta=0.1),
    "jsd_0.5": partial(generalized_jsd, beta=0.5),
    "jsd_0.9_scaled": partial(generalized_jsd, beta=0.9, scaled=True),
    "skew_forward": partial(skew_forward_kl, skew=0.1),
    "skew_reverse": partial(skew_reverse_kl, skew=0.3),
    "balanced": partial(balanced_kl, delta=3.0),
}


def logits(seed: int, rows: int = 5, vocabulary: int = 7, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher."""
    draw = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, rows, vocabulary, generator=draw, dtype=torch.float64)
    return student, teacher


def plain_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mixed(share: float, p: list[float], q: list[float]) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def plain_entropy(p: list[float]) -> float:
    return -sum(a * math.log(a) for a in p if a > 0)


def plain_jsd(s: list[float], t: list[float], beta: float) -> float:
    m = mixed(beta, t, s)
    return beta * plain_kl(t, m) + (1 - beta) * plain_kl(s, m)


def plain_balanced(s: list[float], t: list[float]) -> float:
    surer = plain_entropy(s) < plain_entropy(t)
    return (3.0 if surer else 1.0) * plain_kl(t, s) + (1.0 if surer else 3.0) * plain_kl(s, t)


PLAIN: dict[str, Callable[[list[float], list[float]], float]] = {
    "forward_kl": lambda s, t: plain_kl(t, s),
    "reverse_kl": plain_kl,
    "jsd_0.1": partial(plain_jsd, beta=0.1),
    "jsd_0.5": partial(plain_jsd, beta=0.5),
    "jsd_0.9_scaled": lambda s, t: plain_jsd(s, t, 0.9) / 0.09,
    "skew_forward": lambda s, t: plain_kl(t, mixed(0.1, t, s)),
    "skew_reverse": lambda s, t: plain_kl(s, mixed(0.3, s, t)),
    "balanced": plain_balanced,
}


@pytest.mark.parametrize("name", NAMED)
def test_values_are_plain_sums(name: str) -> None:
    student, teacher = (tempered(each) for each in logits(1))
    found = NAMED[name](student, teacher)
    expected = [PLAIN[name](s.tolist(), t.tolist()) for s, t in zip(student.exp(), teacher.exp(), strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert (found > 0).all()
    assert NAMED[name](teacher, teacher).abs().max() < 1e-14


@pytest.mark.parametrize("name", NAMED)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    student, teacher = logits(2, rows=3, vocabulary=5)
    teacher = tempered(teacher, 1.5)
    assert torch.autograd.gradcheck(
        lambda z: NAMED[name](tempered(z, 1.5), teacher), (student.requires_grad_(),), eps=1e-6, atol=1e-7
    )


def closed_form(name: str, z: Tensor, log_t: Tensor, beta: float = 0.5) -> Tensor:
    """dD/dz of a student with logits z."""
    log_s = z.log_softmax(-1)
    s, t = log_s.exp(), log_t.exp()
    if name == "forward_kl":
        return s - t
    if name == "reverse_kl":
        return s * (log_s - log_t - (s * (log_s - log_t)).sum(-1, keepdim=True))
    log_m = torch.log(beta * t + (1 - beta) * s)
    return (1 - beta) * s * (log_s - log_m - (s * (log_s - log_m)).sum(-1, keepdim=True))


@pytest.mark.parametrize(("name", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.1), ("jsd", 0.7)])
def test_gradients_are_the_closed_forms(name: str, beta: float) -> None:
    z, teacher = logits(3)
    log_t = tempered(teacher)
    z.requires_grad_()
    generalized_jsd(tempered(z), log_t, beta=beta).sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, closed_form(name, z.detach(), log_t, beta), rtol=1e-10, atol=1e-14)


def test_the_worked_example() -> None:
    """P = (.7, .2, .1) is the teacher, Q = (.2, .5, .3) the student."""
    t, s = (torch.tensor([row], dtype=torch.float64).log() for row in ([0.7, 0.2, 0.1], [0.2, 0.5, 0.3]))
    assert forward_kl(s, t).item() == pytest.approx(0.5838147, abs=1e-7)
    assert reverse_kl(s, t).item() == pytest.approx(0.5371764, abs=1e-7)
    for beta, value in ((0.1, 0.0509950), (0.5, 0.1329180), (0.9, 0.0478640)):
        assert generalized_jsd(s, t, beta=beta).item() == pytest.approx(value, abs=1e-7)


def test_the_ends_of_the_jsd() -> None:
    student, teacher = (tempered(each) for each in logits(4))
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    for scaled in (False, True):
        assert torch.equal(generalized_jsd(student, teacher, beta=0.0, scaled=scaled), forward)
        assert torch.equal(generalized_jsd(student, teacher, beta=1.0, scaled=scaled), reverse)
    near = partial(generalized_jsd, student, teacher, scaled=True)
    torch.testing.assert_close(near(beta=1e-6), forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(near(beta=1 - 1e-6), reverse, rtol=1e-4, atol=0)
    # Unscaled, the value tends to 0 and jumps to the KL at the very end.
    assert generalized_jsd(student, teacher, beta=1e-6).max() < 1e-4 < forward.min()
    torch.testing.assert_close(skew_forward_kl(student, teacher, skew=0.0), forward)
    torch.testing.assert_close(skew_reverse_kl(student, teacher, skew=0.0), reverse)
    assert skew_forward_kl(student, teacher, skew=1.0).abs().max() < 1e-14
    torch.testing.assert_close(balanced_kl(student, teacher, delta=1.0), forward + reverse)


def test_mode_covering_and_mode_seeking() -> None:
    """The best student between two modes: the forward KL covers both, the reverse KL takes one."""
    grid = torch.arange(60, dtype=torch.float64)

    def bump(centre: Tensor, width: float) -> Tensor:
        return (-((grid - centre.unsqueeze(-1)) ** 2) / (2 * width**2)).log_softmax(-1)

    modes = bump(torch.tensor([15.0, 45.0], dtype=torch.float64), 3.0).exp()
    teacher = (0.6 * modes[0] + 0.4 * modes[1]).log()
    widths = torch.linspace(2, 25, 24, dtype=torch.float64)
    students = torch.cat([bump(grid, float(width)) for width in widths])
    teachers = teacher.expand_as(students)

    def best(divergence: Divergence) -> tuple[int, float]:
        found = int(divergence(students, teachers).argmin())
        return found % 60, float(widths[found // 60])

    assert best(forward_kl)[0] in range(25, 30)
    assert best(forward_kl)[1] > 10
    assert best(reverse_kl) == (15, 3.0)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_jsd_is_trls(beta: float, temperature: float) -> None:
    """Values and gradients. (TRL's trainer never passes its temperature on to this function.)"""
    peer: Any = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    student, teacher = logits(5, rows=6, vocabulary=50)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    labels = torch.tensor([[3, -100, 5, 7, -100, 9]])
    mask = labels[0] != -100
    expected = peer.generalized_jsd_loss(
        theirs[None], teacher[None], labels=labels, beta=beta, temperature=temperature, reduction="batchmean"
    )
    found = generalized_jsd(
        tempered(ours[mask], temperature), tempered(teacher[mask], temperature), beta=beta
    ).sum() / int(mask.sum())
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    found.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-12)


def test_nkd_by_hand() -> None:
    student, teacher = logits(6, rows=2, vocabulary=4)
    targets = torch.tensor([2, 0])
    found = nkd(tempered(student), tempered(teacher), targets, gamma=1.5, temperature=2.0)
    for row in range(2):
        y = int(targets[row])
        s, t = student[row].softmax(0).tolist(), teacher[row].softmax(0).tolist()
        rest = [i for i in range(4) if i != y]
        n_s, n_t = ((z[row, rest] / 2.0).softmax(0).tolist() for z in (student, teacher))
        other = sum(a * math.log(b) for a, b in zip(n_t, n_s, strict=True))
        assert found[row].item() == pytest.approx(-t[y] * math.log(s[y]) - 1.5 * 4.0 * other)
    assert torch.autograd.gradcheck(
        lambda z: nkd(tempered(z), tempered(teacher), targets, temperature=2.0), (student.requires_grad_(),)
    )


def test_nkd_of_a_teacher_that_is_certain_is_finite() -> None:
    teacher = torch.full((1, 5), -200.0, dtype=torch.float64)
    teacher[0, 3] = 0.0
    student = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    value = nkd(tempered(student), tempered(teacher), torch.tensor([3]))
    value.sum().backward()
    assert value.item() == pytest.approx(math.log(5) + 1.5 * math.log(4))
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMED)
def test_zero_probabilities(name: str) -> None:
    """A teacher that rules tokens out: finite where the formula is, infinite where it is, never NaN."""
    student, teacher = logits(7)
    teacher[:, 2] = -math.inf
    student.requires_grad_()
    value = NAMED[name](tempered(student), tempered(teacher))
    if name in ("reverse_kl", "balanced"):
        assert torch.isposinf(value).all()
        return
    assert value.isfinite().all()
    value.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    bounds = {"jsd_0.5": math.log(2), "skew_forward": -math.log(0.1)}
    assert value.max() <= bounds.get(name, math.inf) + 1e-12


def test_low_precision_logits_are_read_in_float32() -> None:
    student, teacher = logits(8)
    found = forward_kl(tempered(student.bfloat16()), tempered(teacher.bfloat16()))
    assert found.dtype == torch.float32
    expected = forward_kl(tempered(student.bfloat16().double()), tempered(teacher.bfloat16().double()))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_buckets() -> None:
    student, teacher = (tempered(each) for each in logits(9, rows=4, vocabulary=12))
    ids = teacher.topk(3).indices
    s, t = (top_k_buckets(each, ids) for each in (student, teacher))
    assert s.shape == (4, 4)
    torch.testing.assert_close(s.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(s[:, 3].exp(), 1 - student.gather(1, ids).exp().sum(-1))
    for name, divergence in NAMED.items():
        if name in ("balanced",):  # its gate may open the other way
            continue
        assert (divergence(s, t) <= divergence(student, teacher) + 1e-12).all(), name
    whole = teacher.topk(12).indices
    torch.testing.assert_close(
        forward_kl(*(top_k_buckets(each, whole, tail=False) for each in (student, teacher))),
        forward_kl(student, teacher),
    )


def test_only_the_tail_sees_mass_outside_the_teachers_tokens() -> None:
    teacher = torch.tensor([[0.6, 0.3, 0.06, 0.04]], dtype=torch.float64).log()
    student = torch.tensor([[0.2, 0.1, 0.3, 0.4]], dtype=torch.float64).log()  # same shape among the first two
    ids = torch.tensor([[0, 1]])
    assert forward_kl(*(top_k_buckets(each, ids, tail=False) for each in (student, teacher))).item() == pytest.approx(0)
    assert forward_kl(*(top_k_buckets(each, ids) for each in (student, teacher))).item() > 0.5


def test_the_tail_is_exact_where_the_student_is_sure() -> None:
    logits_CV = torch.full((1, 6), -40.0)
    logits_CV[0, 0] = 0.0
    tail = top_k_buckets(tempered(logits_CV), torch.tensor([[0, 1]]))[0, 2]
    assert tail.item() == pytest.approx(-40 + math.log(4), rel=1e-6)  # 1 - kept would be exactly 0 in float32


def test_entropy() -> None:
    assert entropy(torch.full((1, 8), -math.log(8), dtype=torch.float64)).item() == pytest.approx(math.log(8))
    assert entropy(torch.tensor([[0.0, -math.inf]])).item() == 0


def test_a_tail_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="all 3 tokens are chosen, so that no tail is left"):
        top_k_buckets(torch.zeros(1, 3).log_softmax(-1), torch.tensor([[2, 0, 1]]))


# --- a temperature of the teacher's ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_slope_is_the_derivative_by_the_temperatures_logarithm(temperature: float) -> None:
    """Of the loss written out, by autograd."""
    student, teacher = (each.log_softmax(-1) for each in logits(4))
    targets = torch.arange(5) % 7
    logarithm = torch.full((5, 1), math.log(temperature), dtype=torch.float64, requires_grad=True)
    softened = (teacher / logarithm.exp()).log_softmax(-1)
    loss = -softened.gather(-1, targets[:, None])[:, 0] + (softened.exp() * (softened - student)).sum(-1)
    (expected,) = torch.autograd.grad(loss.sum(), logarithm)
    found = temperature_slope(student, teacher, targets, temperature=temperature)
    assert torch.allclose(found, expected[:, 0], rtol=1e-10, atol=1e-13)


def test_the_slope_of_two_tokens_by_hand() -> None:
    """Log-odds z of the target, an even student: T = sigmoid(z); the slope is z (1 - T) - z^2 T (1 - T)."""
    z = 1.2
    t = 1 / (1 + math.exp(-z))
    teacher, student = torch.tensor([[t, 1 - t]], dtype=torch.float64).log(), torch.full((1, 2), 0.5).double().log()
    found = temperature_slope(student, teacher, torch.tensor([0]), temperature=1.0)
    assert float(found) == pytest.approx(z * (1 - t) - z * z * t * (1 - t), rel=1e-12)


def test_impossible_tokens_leave_the_slope_finite() -> None:
    teacher = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    slope = temperature_slope(torch.full((1, 3), 1 / 3).double().log(), teacher, torch.tensor([1]), temperature=2.0)
    assert float(slope) == pytest.approx(0.0, abs=1e-15)
