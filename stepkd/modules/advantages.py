"""From grades to credit: an advantage for every token of a group's completions, and their weights in both sums.

Axes: R completions of this rank (groups whole), N their tokens, S their steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepkd.losses import group_advantages, group_step_advantages, token_normalisation
from stepkd.modules.rollouts import Rollout
from stepkd.modules.settings import PolicyLossConfig, RolloutConfig, StepCreditConfig
from stepkd.modules.step_scores import step_scores
from stepkd.scorers.scorer import StepScorer

Scores = Sequence[Sequence[float]]


@dataclass(eq=False)
class AdvantageEstimator:
    """Gives rollouts their advantages, weights and counts."""

    rollout: RolloutConfig
    policy_loss: PolicyLossConfig
    step_credit: StepCreditConfig | None
    mask: str | None
    """What is distilled on, as :class:`~stepkd.modules.settings.KDConfig` has it; None: there is no teacher."""
    scorer: StepScorer | None
    """Scores steps; needed where ``step_credit`` is given."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts, whole groups of them, with all that the loss needs."""
        if not rollouts:
            return []
        group_R = torch.tensor([rollout.group for rollout in rollouts])
        length_R = torch.tensor([len(rollout.token_ids) for rollout in rollouts])
        counted_R = torch.tensor([not (r.cut_off and self.rollout.truncated == "mask") for r in rollouts])
        scores: Scores = [()] * len(rollouts)
        if self.scorer is not None:
            scores = step_scores(self.scorer, [r.row for r in rollouts], [r.steps for r in rollouts])
        advantage_N = self._advantages(rollouts, scores, group_R, length_R)
        kept_R = counted_R
        if self.policy_loss.equal_groups == "drop":
            # groups in which some token has an advantage
            kept_R = counted_R & torch.isin(group_R, group_R.repeat_interleave(length_R)[advantage_N != 0])
        pg_R2 = self._normalised(length_R, group_R, kept_R)
        kd_R2 = self._normalised(length_R, group_R, counted_R) * (self.mask is not None)
        kd_R2[:, 0] *= self._distilled(rollouts, group_R)
        columns = zip(scores, advantage_N.split(length_R.tolist()), pg_R2.tolist(), kd_R2.tolist(), strict=True)
        return [
            replace(
                rollout,
                step_scores=tuple(own),
                advantages=each.numpy(),
                pg_weight=pg_weight,
                pg_count=pg_count,
                kd_weight=kd_weight,
                kd_count=kd_count,
            )
            for rollout, (own, each, (pg_weight, pg_count), (kd_weight, kd_count)) in zip(
                rollouts, columns, strict=True
            )
        ]

    def _advantages(self, rollouts: Sequence[Rollout], scores: Scores, group_R: Tensor, length_R: Tensor) -> Tensor:
        """(N,) of the answer, and of the steps where they have rewards."""
        reward_R = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
        known_R = ~reward_R.isnan()  # one without a reward has no advantage, and no part in its group's mean
        outcome_R = torch.zeros_like(reward_R)
        outcome_R[known_R] = group_advantages(reward_R[known_R], group_R[known_R], kind=self.policy_loss.advantage)
        outcome_N, credit = outcome_R.repeat_interleave(length_R), self.step_credit
        if credit is None:
            return outcome_N
        steps = [
            (score, end, i)
            for i, found in enumerate(scores)
            for score, end in zip(found, rollouts[i].step_ends.tolist(), strict=False)
        ]
        steps_N = group_step_advantages(
            torch.tensor([score for score, _, _ in steps], dtype=torch.float64),
            torch.tensor([end for _, end, _ in steps], dtype=torch.int64),
            torch.tensor([i for _, _, i in steps], dtype=torch.int64),
            group_R,
            length_R.cumsum(0) - length_R,
            int(length_R.sum()),
            discount=credit.discount,
        )
        return credit.outcome_weight * outcome_N + credit.weight * steps_N

    def _normalised(self, length_R: Tensor, group_R: Tensor, kept_R: Tensor) -> Tensor:
        """(R, 2) weight and count of every completion, 0 for those left out."""
        found = token_normalisation(
            self.policy_loss.normalisation,
            length_R[kept_R],
            group_R[kept_R],
            max_length=self.rollout.sampling.longest,
        )
        normalised_R2 = torch.zeros(len(length_R), 2, dtype=torch.float64)
        normalised_R2[kept_R] = torch.stack(found, dim=-1)
        return normalised_R2

    def _distilled(self, rollouts: Sequence[Rollout], group_R: Tensor) -> Tensor:
        """(R,) bool, whether each completion is distilled on."""
        correct_R = torch.tensor([bool(rollout.correct) for rollout in rollouts])
        if self.mask in (None, "none"):
            return torch.ones_like(correct_R)
        return ~correct_R if self.mask == "response" else ~torch.isin(group_R, group_R[correct_R])
