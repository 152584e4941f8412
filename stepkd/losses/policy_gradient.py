"""Policy gradients: group advantages, clipped ratios, the normalisations of the literature, step credit.

Axes: R completions of a batch, G groups (a group is the completions of one prompt), N completion tokens, S steps.

A loss is a sum over tokens of ``weight * value``; :func:`token_normalisation` says the weights and what the sum is
divided by, so that :mod:`stepkd.losses.reduce` alone divides.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from stepkd.errors import check_choice
from stepkd.losses.reduce import segment_sum

Advantage = Literal["group_std", "group_mean", "leave_one_out"]
Normalisation = Literal["grpo", "dapo", "group_token_mean", "dr_grpo"]
STD_EPSILON = 1e-4
"""Added to a group's standard deviation (TRL's)."""


def group_advantages(rewards_R: Tensor, group_R: Tensor, *, kind: Advantage = "group_std") -> Tensor:
    """How much better each completion is than those of the same prompt.

    Args:
        rewards_R: rewards, float32 or float64.
        group_R: int64 number of each completion's group, >= 0.
        kind: ``group_std``: ``(r - mean) / (std + 1e-4)`` (GRPO, arXiv 2402.03300), the squared deviations divided by
            n - 1 as in TRL (rewards 1, 0, 0, 0 give 1.5); ``group_mean``: ``r - mean`` (Dr. GRPO, arXiv 2503.20783);
            ``leave_one_out``: ``r`` minus the mean of the others (RLOO, arXiv 2402.14740).

    Returns:
        (R,) advantages; exactly 0 in a group of one, and where all rewards of a group are equal.

    Raises:
        ConfigError: another kind.
        ValueError: shapes that differ.
    """
    check_choice("advantage", kind, get_args(Advantage))
    if rewards_R.shape != group_R.shape:
        raise ValueError(f"{tuple(rewards_R.shape)} rewards and {tuple(group_R.shape)} group numbers")
    if not len(rewards_R):
        return rewards_R
    groups = int(group_R.max()) + 1
    size_G = segment_sum(torch.ones_like(rewards_R), group_R, groups)
    mean_G = segment_sum(rewards_R, group_R, groups) / size_G.clamp_min(1)
    ends_G = [
        rewards_R.new_zeros(groups).scatter_reduce(0, group_R, rewards_R, how, include_self=False)
        for how in ("amin", "amax")
    ]
    # Rounding leaves equal rewards a little off their mean, and a division by their deviation would make much of it.
    centred_R = torch.where((ends_G[0] < ends_G[1])[group_R], rewards_R - mean_G[group_R], 0.0)
    if kind == "group_mean":
        return centred_R
    size_R = size_G[group_R]
    if kind == "leave_one_out":
        return torch.where(size_R > 1, centred_R * size_R / (size_R - 1).clamp_min(1), 0.0)
    variance_G = segment_sum(centred_R.square(), group_R, groups) / (size_G - 1).clamp_min(1)
    return centred_R / (variance_G.sqrt()[group_R] + STD_EPSILON)


class Clipped(NamedTuple):
    """Per-token values of the clipped objective, from :func:`clipped_loss`; the bool tensors are for metrics."""

    loss_N: Tensor
    """``-min(ratio A, clip(ratio) A)``."""
    low_N: Tensor
    """bool: the lower bound took its gradient."""
    high_N: Tensor
    """bool: the upper bound took its gradient."""


def clipped_loss(
    logps_N: Tensor, old_logps_N: Tensor, advantages_N: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Clipped:
    """PPO's clipped objective by token (arXiv 1707.06347), with bounds of their own (clip-higher, arXiv 2503.14476).

    Args:
        logps_N: log-probabilities under the policy; gradients flow through them.
        old_logps_N: those under the policy that the batch is taken to be of. Equal to ``logps_N`` on-policy: the ratio
            is 1 then, and carries the gradient only.
        advantages_N: of every token.
        clip_low, clip_high: bounds 1 - low and 1 + high, in [0, 1) and >= 0.

    Returns:
        (N,) losses, and for each token whether the lower or the upper bound took its gradient. Nothing is summed:
        weights and denominators are those of :func:`token_normalisation`.

    Raises:
        ValueError: shapes that differ.
    """
    if not logps_N.shape == old_logps_N.shape == advantages_N.shape:
        raise ValueError(
            f"{tuple(logps_N.shape)} log-probabilities, {tuple(old_logps_N.shape)} old ones and "
            f"{tuple(advantages_N.shape)} advantages"
        )
    ratio_N = (logps_N - old_logps_N.detach()).exp()
    bounded_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    loss_N = -torch.min(ratio_N * advantages_N, bounded_N * advantages_N)
    with torch.no_grad():
        low_N = (ratio_N < 1 - clip_low) & (advantages_N < 0)
        high_N = (ratio_N > 1 + clip_high) & (advantages_N > 0)
    return Clipped(loss_N, low_N, high_N)


def token_normalisation(
    kind: Normalisation, lengths_R: Tensor, group_R: Tensor, *, max_length: int
) -> tuple[Tensor, Tensor]:
    """Weights and denominators of the normalisations in use; ``sum_R weight_R sum_t value / sum_R counts_R`` each.

    ===================  ==============================================================================================
    ``grpo``             mean over completions of the mean over their tokens (arXiv 2402.03300)
    ``dapo``             mean over all tokens of the global batch (arXiv 2503.14476)
    ``group_token_mean`` mean over groups of the mean over all tokens of the group (KDRL, arXiv 2506.02208)
    ``dr_grpo``          sum over all tokens / (completions * ``max_length``) (arXiv 2503.20783)
    ===================  ==============================================================================================

    Args:
        kind: which one.
        lengths_R: tokens of every completion of the batch; an empty one has no weight and (``dapo`` apart) counts.
        group_R: number of each completion's group. For ``group_token_mean`` all completions of a group must be given.
        max_length: the constant of ``dr_grpo``, >= 1; the others do not read it.

    Returns:
        Weight of every token of a completion, and what a completion adds to the denominator: (R,) each, float64.

    Raises:
        ConfigError: another kind.
    """
    check_choice("normalisation", kind, get_args(Normalisation))
    lengths_R = lengths_R.double()
    ones_R = torch.ones_like(lengths_R)
    if kind == "grpo":
        return 1 / lengths_R.clamp_min(1), ones_R
    if kind == "dapo":
        return ones_R, lengths_R
    if kind == "dr_grpo":
        return ones_R / max_length, ones_R
    groups = int(group_R.max()) + 1 if len(group_R) else 0
    tokens_R = segment_sum(lengths_R, group_R, groups)[group_R]
    size_R = segment_sum(ones_R, group_R, groups)[group_R]
    return 1 / tokens_R.clamp_min(1), 1 / size_R.clamp_min(1)


def step_advantages(rewards_S: Tensor, completion_S: Tensor, group_R: Tensor, *, discount: float = 1.0) -> Tensor:
    """An advantage for every step, that of all of its tokens, from rewards of steps.

    Process supervision of DeepSeekMath (arXiv 2402.03300, section 4.1.3; from memory): every step's reward is
    normalised by mean and standard deviation of all step rewards of its group, and a token's advantage is the sum of
    those of its step and of later ones.

    Args:
        rewards_S: reward of every step, completion after completion; NaN for a step without one, which counts for
            nothing.
        completion_S: int64 completion of every step, not decreasing.
        group_R: int64 group of every completion.
        discount: factor on a step's reward for every step between it and the token's, in [0, 1]; 0 leaves every token
            the reward of its own step.

    Returns:
        (S,) advantages.
    """
    known_S = ~rewards_S.isnan()
    worth_S = torch.zeros_like(rewards_S)
    worth_S[known_S] = group_advantages(rewards_S[known_S], group_R[completion_S[known_S]])
    worth, completions = worth_S.tolist(), completion_S.tolist()
    for step in range(len(worth) - 2, -1, -1):
        if completions[step] == completions[step + 1]:
            worth[step] += discount * worth[step + 1]
    return rewards_S.new_tensor(worth)
