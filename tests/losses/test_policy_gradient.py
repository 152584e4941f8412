"""Policy gradients: advantages by hand, TRL's losses on the same tensors, expected gradients by enumeration."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from losses_helper import reduce
from torch import Tensor

from stepkd.errors import ConfigError
from stepkd.losses.policy_gradient import (
    Normalisation,
    clipped_loss,
    group_advantages,
    step_advantages,
    token_normalisation,
)

NORMALISATIONS: tuple[Normalisation, ...] = ("grpo", "dapo", "dr_grpo")
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 2])


# ---- advantages ------------------------------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    group = torch.zeros(4, dtype=torch.int64)
    assert group_advantages(rewards, group).tolist() == pytest.approx(
        [each / (0.5 + 1e-4) for each in (0.75, *[-0.25] * 3)]
    )
    assert group_advantages(rewards, group, kind="group_mean").tolist() == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages(rewards, group, kind="leave_one_out").tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])


@pytest.mark.parametrize("kind", ["group_std", "group_mean", "leave_one_out"])
def test_advantages_of_each_group_alone(kind: Any) -> None:
    rewards = torch.randn(7, dtype=torch.float64)
    found = group_advantages(rewards, GROUPS, kind=kind)
    for group in range(3):
        inside = group == GROUPS
        alone = group_advantages(rewards[inside], torch.zeros(int(inside.sum()), dtype=torch.int64), kind=kind)
        assert torch.allclose(found[inside], alone)
    assert found[6] == 0, "a group of one says nothing"
    for value in (0.1, 0.3, 1.0):
        equal = group_advantages(torch.full((7,), value, dtype=torch.float64), GROUPS, kind=kind)
        assert not equal.any(), "rounding is no signal"
    shuffled = torch.randperm(7)
    assert torch.allclose(group_advantages(rewards[shuffled], GROUPS[shuffled], kind=kind), found[shuffled])
    assert group_advantages(rewards[:0], GROUPS[:0], kind=kind).shape == (0,)


# ---- clipping --------------------------------------------------------------------------------------------------------


def test_clipping() -> None:
    old = torch.zeros(6, dtype=torch.float64)
    logps = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.1, 0.25], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, 2.0], dtype=torch.float64)
    found = clipped_loss(logps, old, advantages, clip_low=0.2, clip_high=0.28)
    ratio = logps.detach().exp()
    expected = [-2 * 1.28, 2 * ratio[1], -2 * ratio[2], 2 * 0.8, -2 * ratio[4], -2 * 1.28]
    assert found.loss_N.tolist() == pytest.approx([float(value) for value in expected])
    assert found.high_N.tolist() == [True, False, False, False, False, True]
    assert found.low_N.tolist() == [False, False, False, True, False, False]
    (gradient,) = torch.autograd.grad(found.loss_N.sum(), logps)
    assert gradient.tolist() == pytest.approx([0, 2 * math.e, -2 / math.e, 0, -2 * math.exp(0.1), 0])


def test_on_policy_the_gradient_is_the_plain_one() -> None:
    logps = torch.randn(5, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(5, dtype=torch.float64)
    found = clipped_loss(logps, logps, advantages)
    assert torch.equal(found.loss_N, -advantages)
    (gradient,) = torch.autograd.grad(found.loss_N.sum(), logps)
    assert torch.allclose(gradient, -advantages)


# ---- normalisations --------------------------------------------------------------------------------------------------


def test_normalisations_by_hand() -> None:
    lengths, group = torch.tensor([3, 1, 2, 4]), torch.tensor([0, 0, 1, 1])
    per_token = torch.arange(1.0, 11.0, dtype=torch.float64)
    row = torch.repeat_interleave(torch.arange(4), lengths)
    sums = [6.0, 4.0, 11.0, 34.0]
    expected = {
        "grpo": (6 / 3 + 4 / 1 + 11 / 2 + 34 / 4) / 4,
        "dapo": sum(sums) / 10,
        "dr_grpo": sum(sums) / (4 * 5),
        "group_token_mean": ((6 + 4) / 4 + (11 + 34) / 6) / 2,
    }
    for kind, value in expected.items():
        weight, counts = token_normalisation(kind, lengths, group, max_length=5)  # type: ignore[arg-type]
        assert float((weight[row] * per_token).sum() / counts.sum()) == pytest.approx(value), kind


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "group_token_mean"])
def test_the_split_does_not_matter(kind: Any) -> None:
    """Weights are those of the whole batch: any micro-batches, added up by reduce, give the same."""
    lengths, group = torch.tensor([3, 1, 2, 4, 6]), torch.tensor([0, 0, 1, 1, 1])
    per_token = torch.randn(16, dtype=torch.float64)
    row = torch.repeat_interleave(torch.arange(5), lengths)
    weight, counts = token_normalisation(kind, lengths, group, max_length=7)
    whole = (weight[row] * per_token).sum() / counts.sum()
    total = torch.zeros((), dtype=torch.float64)
    for rows in ([0, 3], [1, 2, 4]):
        inside = torch.isin(row, torch.tensor(rows))
        total += reduce({"pg": (weight[row] * per_token)[inside].sum()}, {"pg": float(counts.sum())})
    assert total.item() == pytest.approx(whole.item(), rel=1e-12)


def trl_loss(kind: str, logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, maximum: int) -> Tensor:
    """TRL's GRPO loss of one padded batch that is one accumulation window."""
    trl: Any = pytest.importorskip("trl").GRPOTrainer
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    peer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        loss_type=kind,
        epsilon_low=0.2,
        epsilon_high=0.28,
        args=SimpleNamespace(delta=None, steps_per_generation=1),
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=maximum,
        accelerator=accelerator,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    prompt = torch.ones(len(mask), 2, dtype=torch.int64)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": mask.long(),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
    }
    loss: Tensor = trl._compute_loss(peer, None, inputs)
    return loss


@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_losses_are_trls(kind: Normalisation) -> None:
    lengths = torch.tensor([5, 2, 7, 1, 3, 6])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0, 0.0], dtype=torch.float64)
    advantages = group_advantages(rewards, group)
    mask = torch.arange(7)[None] < lengths[:, None]
    draw = torch.Generator().manual_seed(0)
    logps, shift = (torch.randn(6, 7, dtype=torch.float64, generator=draw) for _ in range(2))
    logps = (logps - 2).requires_grad_()
    old = logps.detach() + 0.4 * shift
    theirs = trl_loss(kind, logps, old, advantages, mask.double(), maximum=9)
    (their_gradient,) = torch.autograd.grad(theirs, logps)
    row = torch.repeat_interleave(torch.arange(6), lengths)
    weight, counts = token_normalisation(kind, lengths, group, max_length=9)
    found = clipped_loss(logps[mask], old[mask], advantages[row], clip_low=0.2, clip_high=0.28)
    ours = reduce({"pg": (weight[row] * found.loss_N).sum()}, {"pg": float(counts.sum())})
    (our_gradient,) = torch.autograd.grad(ours, logps)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    assert (our_gradient - their_gradient).norm() < 1e-9 * their_gradient.norm()
    assert found.high_N.any()
    assert found.low_N.any()


# ---- steps -----------------------------------------------------------------------------------------------------------

ROWS = torch.tensor([0, 0, 1, 2, 2])


@pytest.mark.parametrize("discount", [1.0, 0.5, 0.0])
def test_steps_of_a_group_are_normalised_together_and_worth_what_follows(discount: float) -> None:
    rewards = torch.tensor([1.0, 0.0, 1.0, math.nan, 0.0], dtype=torch.float64)
    found = step_advantages(rewards, ROWS, torch.tensor([0, 0, 1]), discount=discount)
    std = math.sqrt(1 / 3) + 1e-4  # of 1, 0, 1 with n - 1
    first, second = (1 - 2 / 3) / std, (0 - 2 / 3) / std
    expected = [first + discount * second, second, first, 0.0, 0.0]  # the last group has one reward only
    assert found.tolist() == pytest.approx(expected)


def test_a_step_without_a_reward_counts_for_nothing_and_passes_later_ones_on() -> None:
    rewards = torch.tensor([math.nan, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    found = step_advantages(rewards, ROWS, torch.zeros(3, dtype=torch.int64))
    known = group_advantages(rewards[1:], torch.zeros(4, dtype=torch.int64)).tolist()
    assert found.tolist() == pytest.approx([known[0], known[0], known[1], known[2] + known[3], known[3]])


def test_one_step_a_solution_is_the_outcomes_advantage() -> None:
    rewards = torch.randn(3, dtype=torch.float64)
    group = torch.zeros(3, dtype=torch.int64)
    assert step_advantages(rewards, torch.arange(3), group).tolist() == group_advantages(rewards, group).tolist()


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes() -> None:
    three = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ConfigError, match="unknown advantage 'std': did you mean 'group_std'"):
        group_advantages(three, GROUPS[:3], kind="std")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(3,\) rewards and \(7,\) group numbers"):
        group_advantages(three, GROUPS)
    with pytest.raises(ValueError, match=r"\(3,\) log-probabilities, \(3,\) old ones and \(2,\) advantages"):
        clipped_loss(three, three, three[:2])
