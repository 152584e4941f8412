"""KL estimators by exact enumeration of a softmax: what each value and each gradient is on average."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stepkd.errors import ConfigError
from stepkd.losses import forward_kl, kl_estimate, reverse_kl


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """Logits of a policy over five tokens, and log-probabilities of another model."""
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(5, generator=draw, dtype=torch.float64).requires_grad_()
    return logits, torch.randn(5, generator=draw, dtype=torch.float64).log_softmax(-1)


def expected_gradient(pair: tuple[Tensor, Tensor], **how: Any) -> tuple[float, Tensor]:
    """Mean value and mean gradient over all five tokens, each with its probability; that weight is no loss."""
    logits, other = pair
    logps = logits.log_softmax(-1)
    values = kl_estimate(how.pop("kind"), logps, other, **how)
    (gradient,) = torch.autograd.grad((logps.detach().exp() * values).sum(), logits)
    return float((logps.detach().exp() * values.detach()).sum()), gradient


def exact(pair: tuple[Tensor, Tensor], divergence: Any) -> tuple[float, Tensor]:
    logits, other = pair
    value = divergence(logits.log_softmax(-1), other)
    (gradient,) = torch.autograd.grad(value, logits)
    return float(value.detach()), gradient


def test_k1_is_unbiased_and_teaches_nothing(pair: Any) -> None:
    value, gradient = expected_gradient(pair, kind="k1")
    assert value == pytest.approx(exact(pair, reverse_kl)[0], abs=1e-12)
    assert gradient.abs().max() < 1e-10


def test_k2_has_the_gradient_of_the_reverse_kl(pair: Any) -> None:
    assert (expected_gradient(pair, kind="k2")[1] - exact(pair, reverse_kl)[1]).abs().max() < 1e-10


def test_k3_has_the_gradient_of_the_forward_kl(pair: Any) -> None:
    value, gradient = expected_gradient(pair, kind="k3")
    assert value == pytest.approx(exact(pair, reverse_kl)[0], abs=1e-12)
    assert (gradient - exact(pair, forward_kl)[1]).abs().max() < 1e-10


def test_values_by_hand() -> None:
    own, other = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)
    found = [kl_estimate(kind, own, other).item() for kind in ("k1", "k2", "k3")]  # type: ignore[arg-type]
    assert found == pytest.approx([1.0, 0.5, 0.367879], abs=1e-6)


def test_joint_loss_and_token_advantage_have_equal_gradients(pair: Any) -> None:
    """``A`` as a policy-gradient loss plus beta k2, and ``A + beta sg[R]`` as one (KDRL's two forms)."""
    logits, other = pair
    advantages, beta = torch.randn(5, dtype=torch.float64), 0.3
    logps = logits.log_softmax(-1)
    joint = -(advantages * (logps - logps.detach()).exp()) + beta * kl_estimate("k2", logps, other)
    reward = (other - logps).detach()
    shaped = -(advantages + beta * reward) * (logps - logps.detach()).exp()
    gradients = [torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (joint, shaped)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-10


def test_no_gradient_reaches_the_other_model() -> None:
    logps, other = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    kl_estimate("k3", logps, other).sum().backward()
    assert other.grad is None


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="unknown KL estimator 'k4'"):
        kl_estimate("k4", torch.zeros(2), torch.zeros(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(2,\) log-probabilities and \(3,\) of the other model"):
        kl_estimate("k1", torch.zeros(2), torch.zeros(3))
