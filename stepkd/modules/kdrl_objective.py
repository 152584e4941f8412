"""KDRL's objective: advantages of tokens, weights and counts of completions, and the loss from a chunk of logits.

Axes: R completions of this rank (groups whole), N their tokens or those of a micro-batch, S steps, C tokens of one
chunk, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepkd.data.collate import Batch
from stepkd.losses import (
    clipped_loss,
    entropy,
    group_advantages,
    group_step_advantages,
    kl_estimate,
    reverse_kl,
    segments_to_go,
    target_logps,
    tempered,
    token_normalisation,
    top_k_buckets,
)
from stepkd.modules.distributed import all_reduce
from stepkd.modules.rollouts import Rollout
from stepkd.modules.settings import KDConfig, PolicyLossConfig, RolloutConfig, StepCreditConfig
from stepkd.modules.step_scores import step_scores, step_texts
from stepkd.scorers.scorer import StepScorer
from stepkd.teachers.signals import Signals


@dataclass(eq=False)
class Weigher:
    """Gives rollouts their advantages, weights and counts."""

    rollout: RolloutConfig
    policy_loss: PolicyLossConfig
    kd: KDConfig
    step_credit: StepCreditConfig | None
    distils: bool
    """Whether there is a teacher."""
    tokenizer: Any
    """The policy's."""
    scorer: StepScorer | None
    """Scores steps; needed where ``step_credit`` is given."""

    def __call__(self, rollouts: Sequence[Rollout], extra_R: Tensor | None = None) -> list[Rollout]:
        """The rollouts with all that the loss needs.

        Args:
            rollouts: groups whole.
            extra_R: added to the rewards before they are compared.
        """
        if not rollouts:
            return []
        group_R = torch.tensor([rollout.group for rollout in rollouts])
        reward_R = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
        reward_R = reward_R if extra_R is None else reward_R + extra_R
        length_R = torch.tensor([len(rollout.completion_ids) for rollout in rollouts])
        counted_R = torch.tensor([not (r.cut_off and self.rollout.truncated == "mask") for r in rollouts])
        scores: list[list[float]] = [[] for _ in rollouts]
        if self.scorer is not None:
            written = [step_texts(self.tokenizer, rollout) for rollout in rollouts]
            scores = step_scores(self.scorer, [rollout.row for rollout in rollouts], written)
        advantage_N = self._advantages(rollouts, scores, reward_R, group_R, length_R)
        kept_R = counted_R
        if self.policy_loss.equal_groups == "drop":
            # groups in which some token has an advantage
            kept_R = counted_R & torch.isin(group_R, group_R.repeat_interleave(length_R)[advantage_N != 0])
        pg = self._normalised(length_R, group_R, kept_R)
        distilled_R = counted_R & self._distilled(rollouts, group_R)
        kd = self._normalised(length_R, group_R, distilled_R if self.kd.kept_only else counted_R)
        advantages = advantage_N.split(length_R.tolist())
        return [
            replace(
                rollout,
                step_scores=tuple(scores[i]),
                advantages=tuple(advantages[i].tolist()),
                pg_weight=float(pg[0][i]),
                pg_count=float(pg[1][i]),
                kd_weight=float(kd[0][i]) * bool(distilled_R[i]),
                kd_count=float(kd[1][i]) * self.distils,
            )
            for i, rollout in enumerate(rollouts)
        ]

    def _advantages(
        self,
        rollouts: Sequence[Rollout],
        scores: Sequence[list[float]],
        reward_R: Tensor,
        group_R: Tensor,
        length_R: Tensor,
    ) -> Tensor:
        """(N,) of the answer, and of the steps where they have rewards."""
        loss = self.policy_loss
        known_R = ~reward_R.isnan()  # what every reward passes over has no advantage, and no part in the mean
        outcome_R = torch.zeros_like(reward_R)
        outcome_R[known_R] = group_advantages(
            reward_R[known_R], group_R[known_R], kind=loss.advantage, ddof=loss.ddof, eps=loss.eps
        )
        outcome_N = torch.repeat_interleave(outcome_R, length_R)
        if self.step_credit is None:
            return outcome_N
        if self.step_credit.form == "first_step":
            return self._by_segment(self.step_credit, rollouts, scores, outcome_R, group_R, length_R)
        steps = [
            (score, end, i)
            for i, found in enumerate(scores)
            for score, (_, end) in zip(found, rollouts[i].spans, strict=False)
        ]
        steps_N = group_step_advantages(
            torch.tensor([score for score, _, _ in steps], dtype=torch.float64),
            torch.tensor([end for _, end, _ in steps], dtype=torch.int64),
            torch.tensor([i for _, _, i in steps], dtype=torch.int64),
            group_R,
            length_R.cumsum(0) - length_R,
            int(length_R.sum()),
            ddof=loss.ddof,
            eps=loss.eps,
            discount=self.step_credit.discount,
        )
        return self.step_credit.outcome_weight * outcome_N + self.step_credit.weight * steps_N

    def _by_segment(
        self,
        credit: StepCreditConfig,
        rollouts: Sequence[Rollout],
        scores: Sequence[list[float]],
        outcome_R: Tensor,
        group_R: Tensor,
        length_R: Tensor,
    ) -> Tensor:
        """(N,): the first step has the advantages of its score and of the answer, what follows it the answer's."""
        first_R = torch.tensor([found[0] if found else math.nan for found in scores], dtype=torch.float64)
        end_R = torch.tensor([rollout.spans[0][1] if rollout.spans else 0 for rollout in rollouts])
        row_N = torch.arange(len(rollouts)).repeat_interleave(length_R)
        place_N = torch.arange(len(row_N)) - (length_R.cumsum(0) - length_R)[row_N]
        segment_N = (place_N >= end_R[row_N]).long()
        # A completion without a step has none to be judged: it stands at its group's mean.
        known_R = ~first_R.isnan()
        advantage_R = torch.zeros_like(first_R)
        loss = self.policy_loss
        advantage_R[known_R] = group_advantages(first_R[known_R], group_R[known_R], ddof=loss.ddof, eps=loss.eps)
        weighted_RK = torch.stack([credit.weight * advantage_R, credit.outcome_weight * outcome_R], dim=-1)
        return segments_to_go(weighted_RK, segment_N, row_N)

    def _normalised(self, length_R: Tensor, group_R: Tensor, kept_R: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and count of every completion, 0 for those left out; 1 for ``bnpo``, which divides by micro-batch."""
        weight_R, count_R = torch.zeros(2, len(length_R), dtype=torch.float64)
        kind = self.policy_loss.normalisation
        if kind == "bnpo":
            return kept_R.double(), kept_R.double()
        found = token_normalisation(kind, length_R[kept_R], group_R[kept_R], max_length=self.rollout.max_new_tokens)
        weight_R[kept_R], count_R[kept_R] = found.weight_R, found.counts_R
        return weight_R, count_R

    def _distilled(self, rollouts: Sequence[Rollout], group_R: Tensor) -> Tensor:
        right_R = torch.tensor([bool(rollout.correct) for rollout in rollouts])
        if not self.distils or self.kd.mask == "none":
            return torch.full_like(right_R, self.distils)
        return ~right_R if self.kd.mask == "response" else ~torch.isin(group_R, group_R[right_R])


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

    policy_loss: PolicyLossConfig
    kd: KDConfig
    temperature: float
    """Of sampling; all log-probabilities are at it."""
    step: int
    """Optimiser steps done."""
    scales: Mapping[str, float]
    """Factor of each term (``pg``, ``kd``) in the loss."""
    signals: Signals | None
    """The teacher's; None without one."""

    def constants(self, micro_batch: Batch, counts_for_kd_N: Tensor) -> tuple[Tensor, ...]:
        """What the function wants of every token beside its target, float64: advantage, log-probabilities of the policy
        before the first of several steps (NaN: there is nothing older) and of the sampler, weights in both sums.

        Args:
            micro_batch: of rollouts.
            counts_for_kd_N: 0 for tokens that are left out of the distillation term.
        """
        rollouts: list[Any] = list(micro_batch.examples)

        def spread(values: Iterable[float]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.float64, device=micro_batch.targets_N.device)

        def weights(name: str) -> Tensor:
            weight_N = spread(getattr(each, f"{name}_weight") for each in rollouts)[micro_batch.completion_N]
            if self.policy_loss.normalisation != "bnpo":
                return weight_N
            counted_N = spread(getattr(each, f"{name}_count") for each in rollouts)[micro_batch.completion_N]
            return weight_N / counted_N.sum().clamp_min(1.0)

        sampled_N = spread(value for each in rollouts for value in each.sampled_logps)
        old_N = torch.full_like(sampled_N, math.nan)
        if all(each.old_logps is not None for each in rollouts):
            old_N = spread(value for each in rollouts for value in each.old_logps)
        advantages_N = spread(value for each in rollouts for value in each.advantages)
        return advantages_N, old_N, sampled_N, weights("pg"), weights("kd") * counts_for_kd_N

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


def exact_kl(kd: KDConfig, student_CV: Tensor, teacher_CV: Tensor) -> Tensor:
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
