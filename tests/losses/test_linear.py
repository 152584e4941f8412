"""The chunked head equals the plain one, on values and gradients, and never holds all logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepkd.losses import VocabHead, chunked_head, cross_entropy, target_logps, token_logps

N, H, V = 7, 6, 11
HEADS = ("plain", "bias", "tied", "scale", "softcap", "padded", "lora", "lora_dropout", "everything")


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


def value_and_gradients(
    factory: Callable[..., Any], kind: str, run: Callable[[VocabHead, Tensor], Tensor], autocast: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    head, hidden, parameters = factory(kind, torch.float32 if autocast else torch.float64)
    weight_N = torch.linspace(-1, 2, N, dtype=torch.float64)
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out_N = run(head, hidden)
        total = (out_N * weight_N).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()))
    return out_N, dict(zip(parameters, gradients, strict=True))


def targets() -> Tensor:
    return torch.tensor([0, 3, 10, 3, 1, 9, 5])


def test_head_closed_form() -> None:
    linear = nn.Linear(2, 4, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1], [9, 9]]))
        linear.bias.copy_(torch.tensor([0.0, 1, 2, 3]))
    head = VocabHead(linear, logit_scale=0.5, softcap=3.0, vocab_size=3)
    logits = head(torch.tensor([[2.0, -4.0]], dtype=torch.float64))
    plain = torch.tensor([[2.0, -3.0, 0.0]], dtype=torch.float64)
    assert relative(logits, 3 * torch.tanh(plain * 0.5 / 3)) < 1e-15
    assert VocabHead(linear, vocab_size=99)(torch.zeros(1, 2, dtype=torch.float64)).shape == (1, 4)


def test_half_precision_logits_become_float32() -> None:
    linear = nn.Linear(2, 4, dtype=torch.bfloat16)
    assert VocabHead(linear)(torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("kind", [kind for kind in HEADS if kind != "lora_dropout"])
@pytest.mark.parametrize("chunk_size", range(1, N + 4))
def test_chunked_equals_plain(kind: str, chunk_size: int, head_factory: Callable[..., Any]) -> None:
    def plain(head: VocabHead, hidden: Tensor) -> Tensor:
        return torch.log_softmax(head(hidden), -1)[torch.arange(N), targets()]

    def chunked(head: VocabHead, hidden: Tensor) -> Tensor:
        return token_logps(head, hidden, targets(), chunk_size=chunk_size)

    expected, expected_gradients = value_and_gradients(head_factory, kind, plain)
    actual, gradients = value_and_gradients(head_factory, kind, chunked)
    assert relative(actual, expected) < 1e-10
    for name, gradient in gradients.items():
        assert expected_gradients[name].norm() > 0
        assert relative(gradient, expected_gradients[name]) < 1e-10, name


def test_dropout_in_the_head_is_recomputed_with_the_same_mask(head_factory: Callable[..., Any]) -> None:
    """One chunk draws the same mask as the plain head; its backward must recompute with that mask."""
    expected, expected_gradients = value_and_gradients(
        head_factory, "lora_dropout", lambda head, hidden: target_logps(head(hidden), targets())
    )
    actual, gradients = value_and_gradients(
        head_factory, "lora_dropout", lambda head, hidden: token_logps(head, hidden, targets(), chunk_size=N)
    )
    assert relative(actual, expected) < 1e-10
    for name, gradient in gradients.items():
        assert relative(gradient, expected_gradients[name]) < 1e-10, name


@pytest.mark.parametrize("kind", ["plain", "tied", "everything"])
@pytest.mark.parametrize("chunk_size", [1, 3, N, N + 3])
def test_chunked_under_autocast(kind: str, chunk_size: int, head_factory: Callable[..., Any]) -> None:
    """The recomputation runs under the same autocast; bfloat16 sums differ by their order only."""
    expected, expected_gradients = value_and_gradients(
        head_factory, kind, lambda head, hidden: target_logps(head(hidden), targets()), autocast=True
    )
    actual, gradients = value_and_gradients(
        head_factory,
        kind,
        lambda head, hidden: token_logps(head, hidden, targets(), chunk_size=chunk_size),
        autocast=True,
    )
    assert actual.dtype == torch.float32
    assert relative(actual, expected) < 1e-2
    for name, gradient in gradients.items():
        assert relative(gradient, expected_gradients[name]) < 2e-2, name


def test_weighted_cross_entropy_closed_form_and_against_torch(head_factory: Callable[..., Any]) -> None:
    """Weights by token: torch's own weighted mean, with its gradients; weight 1 is no weight."""
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    by_hand = cross_entropy(lambda h: h, logits, torch.tensor([0, 1]), weights_N=torch.tensor([2.0, 0.5]))
    assert float(by_hand.sums["ce"]) == pytest.approx(2.5 * math.log(2), abs=1e-15)
    weights_V = torch.linspace(0, 2, V, dtype=torch.float64)
    found = {}
    for name in ("ours", "torch", "ones", "none"):
        head, hidden, parameters = head_factory("everything")
        weights_N = {"ours": weights_V[targets()], "ones": torch.ones(N)}.get(name)
        if name == "torch":
            loss = nn.functional.cross_entropy(head(hidden), targets(), weight=weights_V)
        else:
            total = N if weights_N is None else weights_N.sum()
            loss = cross_entropy(head, hidden, targets(), weights_N=weights_N, chunk_size=3).sums["ce"] / total
        found[name] = [loss, *torch.autograd.grad(loss, list(parameters.values()))]
    for a, b in (("ours", "torch"), ("ones", "none")):
        assert all(relative(x, y) < 1e-12 for x, y in zip(found[a], found[b], strict=True))


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Largest result of any operation while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("loss", ["cross_entropy", "token_logps"])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_full_logits_in_forward_or_backward(loss: str, frozen: bool) -> None:
    """400 positions x 1,000 tokens in chunks of 8: nothing larger than the weight or a chunk's logits is ever made."""
    positions, hidden_size, vocabulary, chunk = 400, 4, 1000, 8
    linear = nn.Linear(hidden_size, vocabulary)
    linear.requires_grad_(not frozen)
    hidden = torch.randn(positions, hidden_size, requires_grad=True)
    labels = torch.randint(vocabulary, (positions,))
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if loss == "cross_entropy":
                total = cross_entropy(VocabHead(linear), hidden, labels, chunk_size=chunk).sums["ce"]
            else:
                total = token_logps(VocabHead(linear), hidden, labels, chunk_size=chunk).sum()
        total.backward()
    assert max(sizes, default=0) <= positions * hidden_size  # kept for the backward: no logits at all
    assert largest.numel == chunk * vocabulary  # made on the way, in both directions
    # the measure itself sees full logits when they are there
    with LargestTensor() as plain:
        nn.functional.cross_entropy(linear(hidden), labels).backward()
    assert plain.numel == positions * vocabulary


def test_one_head_call_per_chunk_and_none_kept_without_gradients() -> None:
    rows: list[int] = []
    linear = nn.Linear(H, V)

    def head(hidden: Tensor) -> Tensor:
        rows.append(hidden.shape[0])
        out: Tensor = linear(hidden)
        return out

    with torch.no_grad():
        out = token_logps(head, torch.randn(N, H), targets(), chunk_size=3)
    assert rows == [3, 3, 1]
    assert not out.requires_grad
    rows.clear()
    token_logps(head, torch.randn(N, H), targets(), chunk_size=3).sum().backward()
    assert rows == [3, 3, 1, 1, 3, 3]  # the backward makes each chunk once more


def test_per_position_tensors_are_cut_with_the_hidden_states() -> None:
    """Gradients also flow into per-position tensors, and rows may have any trailing shape."""
    linear = nn.Linear(H, V, dtype=torch.float64)
    hidden = torch.randn(N, H, dtype=torch.float64)
    other = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    expected = linear(hidden) * other
    actual = chunked_head(lambda logits, chunk: logits * chunk, linear, hidden, other, chunk_size=2)
    assert relative(actual, expected) < 1e-12
    (gradient,) = torch.autograd.grad(actual.sum(), other)
    assert relative(gradient, linear(hidden)) < 1e-12


def test_no_positions() -> None:
    linear = nn.Linear(H, V, dtype=torch.float64)
    hidden = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    assert token_logps(VocabHead(linear), hidden, none).shape == (0,)
    terms = cross_entropy(VocabHead(linear), hidden, none)
    assert terms.sums["ce"].item() == 0.0
    assert [float(part) for part in terms.metrics["token_accuracy"]] == [0.0, 0.0]
    terms.sums["ce"].backward()  # a rank without targets still runs the same backward
    assert linear.weight.grad is not None
    assert linear.weight.grad.abs().sum() == 0


def test_bad_input() -> None:
    linear, hidden = nn.Linear(H, V), torch.zeros(N, H)
    with pytest.raises(ValueError, match="7 hidden states but a per-position tensor of 6"):
        token_logps(linear, hidden, targets()[1:])
