"""From grades to credit: an advantage for every token of a group's completions, and their weights in both sums.

Axes: R completions of this rank (groups whole), N their tokens, S their steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepkd.losses import group_advantages, group_step_advantages, segments_to_go, token_normalisation
from stepkd.modules.rollouts import Rollout
from stepkd.modules.settings import PolicyLossConfig, RolloutConfig, StepCreditConfig, ToGo
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
    """What is distilled on, as :class:`~stepkd.modules.settings.Sampled` has it; None: there is no teacher."""
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
        length_R = torch.tensor([len(rollout.token_ids) for rollout in rollouts])
        counted_R = torch.tensor([not (r.cut_off and self.rollout.truncated == "mask") for r in rollouts])
        scores: Scores = [()] * len(rollouts)
        if self.scorer is not None:
            scores = step_scores(self.scorer, [r.row for r in rollouts], [r.steps for r in rollouts])
        advantage_N = self._advantages(rollouts, scores, reward_R, group_R, length_R)
        kept_R = counted_R
        if self.policy_loss.equal_groups == "drop":
            # groups in which some token has an advantage
            kept_R = counted_R & torch.isin(group_R, group_R.repeat_interleave(length_R)[advantage_N != 0])
        pg = self._normalised(length_R, group_R, kept_R)
        kd = self._normalised(length_R, group_R, counted_R)
        distilled_R = self._distilled(rollouts, group_R)
        advantages = advantage_N.split(length_R.tolist())
        return [
            replace(
                rollout,
                step_scores=tuple(scores[i]),
                advantages=advantages[i].numpy(),
                pg_weight=float(pg[0][i]),
                pg_count=float(pg[1][i]),
                kd_weight=float(kd[0][i]) * bool(distilled_R[i]),
                kd_count=float(kd[1][i]) * (self.mask is not None),
            )
            for i, rollout in enumerate(rollouts)
        ]

    def _advantages(
        self, rollouts: Sequence[Rollout], scores: Scores, reward_R: Tensor, group_R: Tensor, length_R: Tensor
    ) -> Tensor:
        """(N,) of the answer, and of the steps where they have rewards."""
        outcome_R = _compared(reward_R, group_R, self.policy_loss.advantage)
        if self.step_credit is None:
            return outcome_R.repeat_interleave(length_R)
        if isinstance(self.step_credit, ToGo):
            steps_N = _to_go(self.step_credit, rollouts, scores, group_R, length_R)
            outcome_N = outcome_R.repeat_interleave(length_R)
            return self.step_credit.outcome_weight * outcome_N + self.step_credit.weight * steps_N
        return _first_step(self.step_credit, rollouts, scores, outcome_R, group_R, length_R)

    def _normalised(self, length_R: Tensor, group_R: Tensor, kept_R: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and count of every completion, 0 for those left out; 1 for ``bnpo``, which divides by micro-batch."""
        weight_R, count_R = torch.zeros(2, len(length_R), dtype=torch.float64)
        kind = self.policy_loss.normalisation
        if kind == "bnpo":
            return kept_R.double(), kept_R.double()
        longest = self.rollout.sampling.longest
        found = token_normalisation(kind, length_R[kept_R], group_R[kept_R], max_length=longest)
        weight_R[kept_R], count_R[kept_R] = found.weight_R, found.counts_R
        return weight_R, count_R

    def _distilled(self, rollouts: Sequence[Rollout], group_R: Tensor) -> Tensor:
        correct_R = torch.tensor([bool(rollout.correct) for rollout in rollouts])
        if self.mask in (None, "none"):
            return torch.full_like(correct_R, self.mask is not None)
        return ~correct_R if self.mask == "response" else ~torch.isin(group_R, group_R[correct_R])


def _compared(value_R: Tensor, group_R: Tensor, kind: str = "group_std") -> Tensor:
    """Advantages of values; one that is not known (NaN) has none, and no part in its group's mean."""
    known_R = ~value_R.isnan()
    advantage_R = torch.zeros_like(value_R)
    advantage_R[known_R] = group_advantages(value_R[known_R], group_R[known_R], kind=kind)  # type: ignore[arg-type]
    return advantage_R


def _to_go(credit: ToGo, rollouts: Sequence[Rollout], scores: Scores, group_R: Tensor, length_R: Tensor) -> Tensor:
    """(N,) advantages of the steps: a token has those of its step and of later ones."""
    steps = [
        (score, end, i)
        for i, found in enumerate(scores)
        for score, end in zip(found, rollouts[i].step_ends.tolist(), strict=False)
    ]
    return group_step_advantages(
        torch.tensor([score for score, _, _ in steps], dtype=torch.float64),
        torch.tensor([end for _, end, _ in steps], dtype=torch.int64),
        torch.tensor([i for _, _, i in steps], dtype=torch.int64),
        group_R,
        length_R.cumsum(0) - length_R,
        int(length_R.sum()),
        discount=credit.discount,
    )


def _first_step(
    credit: StepCreditConfig,
    rollouts: Sequence[Rollout],
    scores: Scores,
    outcome_R: Tensor,
    group_R: Tensor,
    length_R: Tensor,
) -> Tensor:
    """(N,): the first step has the advantages of its score and of the answer, what follows it the answer's."""
    # A completion without a step has none to be judged: it stands at its group's mean.
    first_R = torch.tensor([found[0] if found else math.nan for found in scores], dtype=torch.float64)
    end_R = torch.tensor([int(rollout.step_ends[0]) if len(rollout.step_ends) else 0 for rollout in rollouts])
    completion_N = torch.arange(len(rollouts)).repeat_interleave(length_R)
    place_N = torch.arange(len(completion_N)) - (length_R.cumsum(0) - length_R)[completion_N]
    advantage_R = _compared(first_R, group_R)
    weighted_RK = torch.stack([credit.weight * advantage_R, credit.outcome_weight * outcome_R], dim=-1)
    return segments_to_go(weighted_RK, (place_N >= end_R[completion_N]).long(), completion_N)
