"""Fused sums equal plain ones, on values and gradients, and make every logit once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepkd.losses import VocabHead, forward_kl, fused_sum, generalized_jsd, target_logps, tempered

N, H, V = 7, 6, 11
HEADS = ("plain", "bias", "tied", "scale", "softcap", "padded", "lora", "everything")


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


def weights() -> Tensor:
    return torch.linspace(-1, 2, N, dtype=torch.float64)


def teacher(dtype: torch.dtype = torch.float64) -> tuple[VocabHead, Tensor]:
    """Another head of another width, and hidden states for it."""
    draw = torch.Generator().manual_seed(3)
    linear = nn.Linear(4, V + 2, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(V + 2, 4, generator=draw, dtype=dtype))
    return VocabHead(linear, vocab_size=V), torch.randn(N, 4, generator=draw, dtype=dtype)


def row(logits_CV: Tensor, hidden_CH: Tensor) -> Tensor:
    """The JSD from the teacher, and two more columns."""
    head, _ = teacher(logits_CV.dtype)
    with torch.no_grad():
        log_teacher_CV = tempered(head(hidden_CH), 1.5)
    log_student_CV = tempered(logits_CV, 1.5)
    value = generalized_jsd(log_student_CV, log_teacher_CV, beta=0.3)
    return torch.stack([value, forward_kl(log_student_CV, log_teacher_CV), log_student_CV.argmax(-1).to(value)], dim=-1)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk_size", range(1, N + 4))
def test_fused_equals_plain(kind: str, chunk_size: int, head_factory: Callable[..., Any]) -> None:
    _, hidden_teacher = teacher()
    head, hidden, parameters = head_factory(kind)
    expected_values = row(head(hidden), hidden_teacher)
    expected = (expected_values[:, 0] * weights()).sum()
    expected_gradients = torch.autograd.grad(3.0 * expected, list(parameters.values()))
    head, hidden, parameters = head_factory(kind)
    total, values = fused_sum(row, head, hidden, weights(), hidden_teacher, chunk_size=chunk_size)
    assert relative(total, expected) < 1e-10
    assert relative(values, expected_values) < 1e-10
    assert not values.requires_grad
    for name, gradient, wanted in zip(
        parameters, torch.autograd.grad(3.0 * total, list(parameters.values())), expected_gradients, strict=True
    ):
        assert wanted.norm() > 0
        assert relative(gradient, wanted) < 1e-10, name


def test_dropout_in_the_head_draws_the_plain_mask(head_factory: Callable[..., Any]) -> None:
    targets = torch.tensor([0, 3, 10, 3, 1, 9, 5])
    found = []
    for fused in (False, True):
        head, hidden, parameters = head_factory("lora_dropout")
        torch.manual_seed(5)
        if fused:
            total, _ = fused_sum(target_logps, head, hidden, weights(), targets, chunk_size=N)
        else:
            total = (target_logps(head(hidden), targets) * weights()).sum()
        found.append(torch.autograd.grad(total, list(parameters.values())))
    assert all(relative(a, b) < 1e-10 for a, b in zip(found[1], found[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_heads(dtype: torch.dtype) -> None:
    """Sums over chunks are kept in float32, so that more chunks do not mean more rounding."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 300, bias=False)
    hidden, targets = torch.randn(256, 32), torch.randint(300, (256,))
    (exact,) = torch.autograd.grad((target_logps(linear.double()(hidden.double()), targets)).sum(), [linear.weight])
    errors = []
    for chunk_size in (1, 256):
        head = VocabHead(nn.Linear(32, 300, bias=False).to(dtype))
        head.project.weight.data = linear.weight.data.to(dtype)  # type: ignore[attr-defined]
        total, _ = fused_sum(target_logps, head, hidden.to(dtype), torch.ones(256), targets, chunk_size=chunk_size)
        assert total.dtype == torch.float32
        (gradient,) = torch.autograd.grad(total, [head.project.weight])  # type: ignore[attr-defined]
        assert gradient.dtype == dtype
        errors.append(relative(gradient.double(), exact))
    assert errors[0] < 2 * errors[1]
    assert max(errors) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_autocast(head_factory: Callable[..., Any]) -> None:
    targets = torch.tensor([0, 3, 10, 3, 1, 9, 5])
    found = []
    for fused in (False, True):
        head, hidden, parameters = head_factory("bias", torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if fused:
                total, _ = fused_sum(target_logps, head, hidden, weights(), targets, chunk_size=3)
            else:
                total = (target_logps(head(hidden), targets) * weights().float()).sum()
        found.append((total, *torch.autograd.grad(total, list(parameters.values()))))
    for actual, expected in zip(found[1], found[0], strict=True):
        assert actual.dtype == expected.dtype
        assert relative(actual, expected) < 1e-2


def test_every_logit_is_made_once() -> None:
    seen: list[int] = []

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    head = VocabHead(Counting(H, V))
    hidden = torch.randn(N, H, requires_grad=True)
    total, _ = fused_sum(target_logps, head, hidden, torch.ones(N), torch.zeros(N, dtype=torch.int64), chunk_size=3)
    total.backward()
    assert seen == [3, 3, 1]
    assert hidden.grad is not None


def test_no_gradient_is_made_where_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation, say: the same sum and values, without a backward pass over the vocabulary."""
    linear, hidden = nn.Linear(H, V, dtype=torch.float64), torch.randn(N, H, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(N)
    expected = fused_sum(target_logps, VocabHead(linear), hidden, weights(), targets, chunk_size=3)
    calls: list[int] = []
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: calls.append(1))
    with torch.no_grad():
        found = fused_sum(target_logps, VocabHead(linear), hidden, weights(), targets, chunk_size=3)
    assert not calls
    assert torch.equal(found[0], expected[0].detach())
    assert torch.equal(found[1], expected[1])


def test_what_is_not_trained_gets_no_gradient() -> None:
    linear = nn.Linear(H, V).requires_grad_(False)
    targets = torch.zeros(N, dtype=torch.int64)
    hidden = torch.randn(N, H, requires_grad=True)
    total, _ = fused_sum(target_logps, VocabHead(linear), hidden, torch.ones(N), targets)
    total.backward()
    assert linear.weight.grad is None
    assert hidden.grad is not None
    linear.requires_grad_(True)
    total, _ = fused_sum(target_logps, VocabHead(linear), hidden.detach(), torch.ones(N), targets)
    total.backward()
    assert linear.weight.grad is not None
    with torch.no_grad():
        total, values = fused_sum(target_logps, VocabHead(linear), hidden, torch.ones(N), targets, chunk_size=2)
    assert not total.requires_grad
    assert total.item() == pytest.approx(values.sum().item(), rel=1e-5)


def test_no_positions() -> None:
    linear = nn.Linear(H, V)
    hidden = torch.zeros(0, H, requires_grad=True)
    total, values = fused_sum(
        target_logps, VocabHead(linear), hidden, torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    )
    total.backward()
    assert (total.item(), tuple(values.shape)) == (0.0, (0,))
    assert linear.weight.grad is not None
    assert linear.weight.grad.abs().sum() == 0


def test_mistakes() -> None:
    head, hidden = VocabHead(nn.Linear(H, V)), torch.zeros(N, H)
    with pytest.raises(ValueError, match=r"range\(\) arg 3 must not be zero"):
        fused_sum(target_logps, head, hidden, torch.ones(N), torch.zeros(N), chunk_size=0)
    with pytest.raises(ValueError, match="7 hidden states but a per-position tensor of 3"):
        fused_sum(target_logps, head, hidden, torch.ones(N), torch.zeros(3))
