"""KDRL's objective by token, from a chunk of logits.

Axes: N completion tokens of a micro-batch, C of one chunk, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepkd.losses import clipped_loss, entropy, kl_estimate, reverse_kl, target_logps, tempered, top_k_buckets
from stepkd.modules.distributed import all_reduce
from stepkd.modules.kdrl_settings import KDSpec, PolicyLossSpec
from stepkd.modules.rollouts import TokenView
from stepkd.teachers.signals import Signals

MISMATCH_ALARM = 0.05
"""Mean distance in nats beyond which something is wrong."""


class TokenTerms(NamedTuple):
    """What the objective gives for every token; only ``total_N`` carries a gradient."""

    total_N: Tensor
    """Both terms, each times its scale."""
    pg_N: Tensor
    """Policy-gradient term."""
    kd_N: Tensor
    """Distillation term, beta included."""
    logps_N: Tensor
    """Log-probability of the token."""
    entropy_N: Tensor
    """Entropy in nats."""
    teacher_N: Tensor
    """The teacher's log-probability of the token; 0 without one."""
    low_N: Tensor
    """1 where the lower bound of the ratio took the gradient."""
    high_N: Tensor
    """1 where the upper bound did."""


@dataclass(frozen=True)
class TokenObjective:
    """``fn(logits_CV, targets_C, *constants_C, *signals_C)`` to the columns of :class:`TokenTerms`, (C, 8) in float64.

    Both terms are functions of the logits of their own token alone: everything else about a token is known before, so
    that gradients can be taken chunk by chunk in the forward pass (:func:`~stepkd.losses.fused_sum`).
    """

    policy_loss: PolicyLossSpec
    kd: KDSpec
    temperature: float
    """Of sampling; all log-probabilities are at it."""
    step: int
    """Optimiser steps done."""
    scales: Mapping[str, float]
    """Factor of each term (``pg``, ``kd``) in the loss."""
    signals: Signals | None
    """The teacher's; None without one."""

    def constants(self, tokens: TokenView, counts_for_kd_N: Tensor) -> tuple[Tensor, ...]:
        """What the function wants of every token beside its target.

        Args:
            tokens: advantages, weights and log-probabilities.
            counts_for_kd_N: 0 for tokens that are left out of the distillation term.
        """
        kept_N = self._weights(tokens.kd_N, tokens.kd_counted_N) * counts_for_kd_N
        # NaN: nothing older than the policy itself
        old_N = torch.full_like(tokens.sampled_N, math.nan) if tokens.old_N is None else tokens.old_N
        weights_N = self._weights(tokens.pg_N, tokens.pg_counted_N)
        return tokens.advantages_N, old_N, tokens.sampled_N, weights_N, kept_N

    def __call__(
        self,
        logits_CV: Tensor,
        targets_C: Tensor,
        advantages_C: Tensor,
        old_C: Tensor,
        sampled_C: Tensor,
        weights_C: Tensor,
        kept_C: Tensor,
        *signals: Tensor,
    ) -> Tensor:
        """See the class."""
        log_CV = tempered(logits_CV, self.temperature)
        logps_C = target_logps(log_CV, targets_C)
        teacher_C, exact_C = torch.zeros_like(logps_C), None
        if self.signals is not None:
            student_CV, teacher_CV, _ = self.signals.compare(log_CV, *signals)
            teacher_C = target_logps(teacher_CV, targets_C).to(logps_C.dtype).detach()
            if self.kd.estimator == "full":
                exact_C = exact_kl(self.kd, student_CV, teacher_CV)
        pg_C, low_C, high_C = self._policy_gradient(logps_C, teacher_C, advantages_C, old_C, sampled_C, weights_C)
        kd_C = torch.zeros_like(logps_C)
        if self.signals is not None and self.kd.form == "joint":
            kd_C = self.kd.coefficient(self.step) * kept_C * self._divergence(logps_C, teacher_C, exact_C, kept_C)
        share = self.policy_loss.weight * self.kd.policy_share(self.step)
        total_C = self.scales["pg"] * share * pg_C + self.scales["kd"] * kd_C
        columns = TokenTerms(total_C, share * pg_C, kd_C, logps_C, entropy(log_CV.detach()), teacher_C, low_C, high_C)
        return torch.stack([column.double() for column in columns], dim=-1)

    def _policy_gradient(
        self, logps_C: Tensor, teacher_C: Tensor, advantages_C: Tensor, old_C: Tensor, sampled_C: Tensor, weights_C: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted clipped objective, and where its bounds took the gradient."""
        if self.signals is not None and self.kd.form == "advantage":
            bound = math.inf if self.kd.clamp is None else self.kd.clamp
            reward_C = (teacher_C - logps_C).detach()
            advantages_C = advantages_C + self.kd.coefficient(self.step) * reward_C.clamp(-bound, bound)
        old_C = torch.where(old_C.isnan(), logps_C.detach().double(), old_C)
        clipped = clipped_loss(
            logps_C,
            old_C.to(logps_C.dtype),
            advantages_C.to(logps_C.dtype),
            clip_low=self.policy_loss.clip_low,
            clip_high=self.policy_loss.clip_high,
        )
        pg_C = clipped.loss_N * weights_C
        if self.policy_loss.importance_cap is not None:
            pg_C = pg_C * (old_C - sampled_C).exp().clamp(max=self.policy_loss.importance_cap)
        return pg_C, clipped.low_N, clipped.high_N

    def _divergence(self, logps_C: Tensor, teacher_C: Tensor, exact_C: Tensor | None, kept_C: Tensor) -> Tensor:
        if exact_C is not None:
            return exact_C
        # Tokens that do not count are taken out before: k3 of a far-off one overflows, and 0 times infinity is NaN.
        near_C = torch.where(kept_C > 0, logps_C, teacher_C)
        kind: Any = self.kd.estimator
        return kl_estimate(kind, near_C, teacher_C, clamp=self.kd.clamp, gradient=self.kd.gradient)

    def _weights(self, weight_N: Tensor, counted_N: Tensor) -> Tensor:
        if self.policy_loss.normalisation == "bnpo":
            return weight_N / counted_N.sum().clamp_min(1.0)
        return weight_N


def exact_kl(kd: KDSpec, student_CV: Tensor, teacher_CV: Tensor) -> Tensor:
    """Reverse KL over all tokens, or over the teacher's likeliest and a bucket for the rest."""
    if kd.top_k is not None and kd.top_k < teacher_CV.shape[-1]:
        ids_Ck = teacher_CV.topk(kd.top_k, dim=-1).indices
        student_CV, teacher_CV = (top_k_buckets(each, ids_Ck, tail=kd.tail) for each in (student_CV, teacher_CV))
    return reverse_kl(student_CV, teacher_CV)


class Mismatch:
    """How far the sampler's log-probabilities are from the trainer's: sums of one optimiser step, and one warning.

    They are of one policy and should be equal; a temperature that is missing in one place, weights of another step, or
    a narrow dtype sets them apart, and the samples are off-policy without anybody saying so.
    """

    def __init__(self) -> None:
        self.total = self.most = 0.0
        self.number = 0
        self.warned = False

    def add(self, gap_N: Tensor) -> None:
        """Differences of a micro-batch's tokens, in nats."""
        if len(gap_N):
            self.total += float(gap_N.abs().sum())
            self.most = max(self.most, float(gap_N.abs().max()))
            self.number += len(gap_N)

    def finish(self, step: int, device: torch.device) -> float:
        """End an optimiser step: the largest distance on any rank; warns where this rank's mean is too large."""
        mean = self.total / self.number if self.number else 0.0
        most = all_reduce({"most": self.most}, device, op="max")["most"]
        self.total = self.most = 0.0
        self.number = 0
        if mean > MISMATCH_ALARM and not self.warned:
            self.warned = True
            warnings.warn(
                f"step {step}: the log-probabilities of sampler and trainer differ by {mean:.3f} nats a token (alarm "
                f"above {MISMATCH_ALARM}): another temperature or weights, too narrow a dtype? The samples are not "
                "on-policy; policy_loss.importance_cap corrects small gaps",
                stacklevel=3,
            )
        return most
