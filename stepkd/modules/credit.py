"""Who gets how much of the loss: advantages of tokens, and weights and counts of completions in both terms.

Axes: R completions of this rank (groups whole), N their tokens, S their steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stepkd.losses import group_advantages, group_step_advantages, segments_to_go, token_normalisation
from stepkd.modules.kdrl_settings import KDSpec, PolicyLossSpec, RolloutSpec, StepCreditSpec
from stepkd.modules.rollouts import Rollout
from stepkd.modules.step_scores import step_scores, step_texts
from stepkd.scorers import StepScorer


@dataclass(eq=False)
class Weigher:
    """Gives rollouts their advantages, weights and counts."""

    rollout: RolloutSpec
    policy_loss: PolicyLossSpec
    kd: KDSpec
    step_credit: StepCreditSpec | None
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
        scores = self._scores(rollouts)
        advantage_N = self._advantages(rollouts, scores, reward_R, group_R, length_R)
        kept_R = counted_R
        if self.policy_loss.equal_groups == "drop":
            kept_R = counted_R & with_signal(advantage_N, group_R, length_R)
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

    def _scores(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Of every completion's steps; nothing without step credit."""
        if self.step_credit is None:
            return [[] for _ in rollouts]
        assert self.scorer is not None
        written = [step_texts(self.tokenizer, rollout) for rollout in rollouts]
        return step_scores(self.scorer, [rollout.row for rollout in rollouts], written)

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
            return self._by_segment(rollouts, scores, outcome_R, group_R)
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
        self, rollouts: Sequence[Rollout], scores: Sequence[list[float]], outcome_R: Tensor, group_R: Tensor
    ) -> Tensor:
        """(N,) of the first step's score and the answer in it, of the answer behind it."""
        assert self.step_credit is not None
        first_R = torch.tensor([found[0] if found else math.nan for found in scores], dtype=torch.float64)
        ends = [rollout.spans[0][1] if rollout.spans else 0 for rollout in rollouts]
        segment_N = torch.cat(
            [
                (torch.arange(len(rollout.completion_ids)) >= end).long()
                for rollout, end in zip(rollouts, ends, strict=True)
            ]
        )
        row_N = torch.repeat_interleave(
            torch.arange(len(rollouts)), torch.tensor([len(rollout.completion_ids) for rollout in rollouts])
        )
        # A completion without a step has none to be judged: it stands at its group's mean.
        known_R = ~first_R.isnan()
        advantage_R = torch.zeros_like(first_R)
        loss = self.policy_loss
        advantage_R[known_R] = group_advantages(first_R[known_R], group_R[known_R], ddof=loss.ddof, eps=loss.eps)
        weighted_RK = torch.stack(
            [self.step_credit.weight * advantage_R, self.step_credit.outcome_weight * outcome_R], dim=-1
        )
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


def with_signal(advantage_N: Tensor, group_R: Tensor, length_R: Tensor) -> Tensor:
    """Which completions belong to a group in which some token has an advantage."""
    group_N = torch.repeat_interleave(group_R, length_R)
    return torch.isin(group_R, group_N[advantage_N != 0])
