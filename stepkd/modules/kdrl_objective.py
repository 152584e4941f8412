"""KDRL's objective: clipped policy gradient and distillation term of a micro-batch, in one pass over its logits.

Axes: R completions and N completion tokens of a micro-batch, C tokens of one chunk, V vocabulary, M columns of
:class:`_TokenTerms`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stepkd.data.collate import Batch
from stepkd.losses import (
    LossTerms,
    clipped_loss,
    cross_entropy,
    entropy,
    fused_sum,
    kl_estimate,
    reverse_kl,
    target_logps,
    tempered,
)
from stepkd.modules.components import Component, ForwardPass
from stepkd.modules.distributed import all_reduce
from stepkd.modules.kdrl_settings import AsAdvantage, ExactKL, KDConfig, PolicyLossConfig, SampledKL
from stepkd.modules.rollouts import Rollout
from stepkd.teachers.signals import most_likely

MISMATCH_ALARM = 0.05
"""Mean distance in nats beyond which something is wrong."""


class _TokenTerms(NamedTuple):
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


@dataclass(eq=False)
class KDRLObjective(Component):
    """``pg``, the clipped objective, and ``kd``, beta times the divergence from the teacher, both summed by token.

    One component, because both are functions of the same logits: each token's terms depend on its own logits alone, so
    gradients are taken chunk by chunk in the forward pass (:func:`~stepkd.losses.fused_sum`). On given solutions
    (validation) there is nothing to weigh: ``pg`` is their cross-entropy, to look at.
    """

    policy_loss: PolicyLossConfig
    kd: KDConfig
    temperature: float
    """Of sampling; all log-probabilities are at it."""
    reward_names: Sequence[str]
    """Rewards that have metrics of their own."""
    gaps: list[Tensor] = field(default_factory=list)
    """Of this optimiser step's tokens: how far the sampler's log-probability is from the trainer's, in nats."""
    warned: bool = False
    """Whether it was said that they are too far apart."""
    weight: float = 1.0
    """Of the policy-gradient term in the optimiser step that is being taken."""
    beta: float = 0.0
    """Of the distillation in that step."""

    names = ("pg", "kd")

    def at_step(self, step: int) -> None:
        """Set both weights, of the policy gradient and of the distillation, as their schedule has them.

        Args:
            step: the optimiser step that comes next, counted from 0.
        """
        self.weight = self.policy_loss.weight * self.kd.schedule.policy_share(step)
        self.beta = self.kd.schedule.coefficient(self.kd.beta, step)

    def largest_mismatch(self, step: int, device: torch.device) -> float:
        """End an optimiser step: the largest gap on any rank; warns where this rank's mean is too large.

        Engine and trainer are one policy and should say the same; a temperature that is missing in one place, weights
        of another step, or a narrow dtype sets them apart, and the samples are off-policy without anybody saying so.
        """
        gaps_N = torch.cat([*self.gaps, torch.zeros(1, device=device)])
        mean = float(gaps_N.sum()) / max(len(gaps_N) - 1, 1)
        self.gaps = []
        if mean > MISMATCH_ALARM and not self.warned:
            self.warned = True
            warnings.warn(
                f"step {step}: the log-probabilities of sampler and trainer differ by {mean:.3f} nats a token (alarm "
                f"above {MISMATCH_ALARM}): another temperature or weights, too narrow a dtype? The samples are not "
                "on-policy; policy_loss.tis_cap corrects small gaps",
                stacklevel=3,
            )
        return all_reduce({"most": gaps_N.max()}, device, op="max")["most"]

    def count(self, batch: Batch) -> dict[str, float]:
        """Denominators of both terms, as the normalisation has them; tokens of given solutions."""
        rollouts = rollouts_of(batch)
        if not rollouts:
            return {"pg": float(len(batch.targets_N)), "kd": 0.0}
        return {"pg": math.fsum(r.pg_count for r in rollouts), "kd": math.fsum(r.kd_count for r in rollouts)}

    def terms(self, forward: ForwardPass) -> LossTerms:
        """See the class."""
        batch, signals, scales = forward.batch, forward.signals, forward.scales
        distils = signals is not None or forward.teacher_N is not None
        rollouts = rollouts_of(batch)
        if not rollouts:
            hidden_NH = forward.hidden_NH
            ce = cross_entropy(forward.head, hidden_NH, batch.targets_N, chunk_size=forward.chunk_size).sums["ce"]
            return LossTerms({"pg": ce, "kd": ce * 0.0})

        def position(logits_CV: Tensor, targets_C: Tensor, *constants: Tensor) -> Tensor:
            advantages_C, old_C, sampled_C, pg_weight_C, kd_weight_C, teacher_C, *chunk = constants
            log_CV = tempered(logits_CV, self.temperature)
            logps_C = target_logps(log_CV, targets_C)
            teacher_C, kd_C = teacher_C.to(logps_C.dtype), torch.zeros_like(logps_C)
            if signals is not None:  # of ExactKL
                student_CV, teacher_CV, _ = signals.compare(log_CV, *chunk)
                teacher_C = target_logps(teacher_CV, targets_C).to(logps_C.dtype).detach()
                assert isinstance(self.kd, ExactKL)
                kd_C = reverse_kl(*most_likely(student_CV, teacher_CV, self.kd.top_k))
            elif distils and isinstance(self.kd, SampledKL):
                # Tokens that do not count are taken out before: k3 of a far-off one overflows, and 0 inf is NaN.
                near_C = torch.where(kd_weight_C > 0, logps_C, teacher_C)
                kd_C = kl_estimate(self.kd.estimator, near_C, teacher_C)
            elif distils and isinstance(self.kd, AsAdvantage):
                advantages_C = advantages_C + self.beta * (teacher_C - logps_C).detach()
            kd_C = self.beta * kd_weight_C * kd_C
            pg_C, low_C, high_C = self._clipped(logps_C, advantages_C, old_C, sampled_C, pg_weight_C)
            total_C = scales["pg"] * self.weight * pg_C + scales["kd"] * kd_C
            entropy_C = entropy(log_CV.detach())
            columns = _TokenTerms(total_C, self.weight * pg_C, kd_C, logps_C, entropy_C, teacher_C, low_C, high_C)
            return torch.stack([each.double() for each in columns], dim=-1)

        constants = self._constants(batch, rollouts)
        teacher_N = torch.zeros_like(constants[0]) if forward.teacher_N is None else forward.teacher_N
        loss, columns_NM = fused_sum(
            position,
            forward.head,
            forward.hidden_NH,
            torch.ones_like(constants[0]),
            batch.targets_N,
            *constants,
            teacher_N,
            *(() if signals is None else signals.tensors),
            chunk_size=forward.chunk_size,
        )
        found = _TokenTerms(*columns_NM.unbind(-1))
        _, old_N, sampled_N, *_ = constants
        gap_N = sampled_N - torch.where(old_N.isnan(), found.logps_N, old_N)
        if not batch.is_dummy:
            self.gaps.append(gap_N.abs())
        sums = {"pg": found.pg_N.sum(), "kd": found.kd_N.sum()}
        metrics = self._metrics(rollouts, found, gap_N, distils=distils)
        return LossTerms(sums, metrics, loss)

    @staticmethod
    def _constants(batch: Batch, rollouts: Sequence[Rollout]) -> tuple[Tensor, ...]:
        """What the loss wants of every token beside its target, float64: advantage, log-probabilities of the policy
        before the first of several steps (NaN: there is nothing older) and of the sampler, weights in both sums."""
        device = batch.targets_N.device
        advantages_N, sampled_N = (
            torch.from_numpy(np.concatenate([getattr(r, name) for r in rollouts])).to(device)
            for name in ("advantages", "logprobs")
        )
        old_N = torch.full_like(sampled_N, math.nan)
        if all(r.old_logps is not None for r in rollouts):
            old_N = torch.from_numpy(np.concatenate([r.old_logps for r in rollouts])).to(device)
        weights_R2 = torch.tensor([(r.pg_weight, r.kd_weight) for r in rollouts], dtype=torch.float64, device=device)
        return advantages_N, old_N, sampled_N, *weights_R2[batch.completion_N].unbind(-1)

    def _clipped(
        self, logps_C: Tensor, advantages_C: Tensor, old_C: Tensor, sampled_C: Tensor, pg_weight_C: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted clipped objective, and where its bounds took the gradient."""
        old_C = torch.where(old_C.isnan(), logps_C.detach().double(), old_C)
        clipped = clipped_loss(
            logps_C,
            old_C.to(logps_C.dtype),
            advantages_C.to(logps_C.dtype),
            clip_low=self.policy_loss.clip_low,
            clip_high=self.policy_loss.clip_high,
        )
        pg_C = clipped.loss_N * pg_weight_C
        if self.policy_loss.tis_cap is not None:
            pg_C = pg_C * (old_C - sampled_C).exp().clamp(max=self.policy_loss.tis_cap)
        return pg_C, clipped.low_N, clipped.high_N

    def _metrics(
        self, rollouts: Sequence[Rollout], found: _TokenTerms, gap_N: Tensor, *, distils: bool
    ) -> dict[str, tuple[Tensor, Tensor]]:
        number = gap_N.new_tensor(float(len(gap_N)))

        def of_rows(values: Sequence[float | None]) -> tuple[Tensor, Tensor]:
            known = [value for value in values if value is not None and not math.isnan(value)]
            return gap_N.new_tensor(float(sum(known))), gap_N.new_tensor(float(len(known)))

        metrics = {
            "reward": of_rows([rollout.reward for rollout in rollouts]),
            "accuracy": of_rows([rollout.correct for rollout in rollouts]),
            "length": of_rows([len(rollout.token_ids) for rollout in rollouts]),
            "cut_off": of_rows([rollout.cut_off for rollout in rollouts]),
            "no_signal": of_rows([not rollout.advantages.any() for rollout in rollouts]),
            "entropy": (found.entropy_N.sum(), number),
            "clip_low": (found.low_N.sum(), number),
            "clip_high": (found.high_N.sum(), number),
            "sampler_mismatch": (gap_N.abs().sum(), number),
            "sampler_kl": (gap_N.sum(), number),
        }
        metrics |= {f"reward/{name}": of_rows([r.parts.get(name) for r in rollouts]) for name in self.reward_names}
        if distils:
            metrics["kl_to_teacher"] = ((found.logps_N - found.teacher_N).sum(), number)
            metrics["distilled"] = of_rows([rollout.kd_weight > 0 for rollout in rollouts])
        return metrics


def rollouts_of(batch: Batch) -> list[Rollout]:
    """What a micro-batch has of them: all of its examples in training, none in validation."""
    return [example for example in batch.examples if isinstance(example, Rollout)]
