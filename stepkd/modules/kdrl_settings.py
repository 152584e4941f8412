"""Settings of reinforcement learning with a teacher: rollouts, policy loss, distillation term, step credit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from stepkd.errors import check_bounds
from stepkd.sampling.engine import SamplingConfig
from stepkd.teachers.config import TopK


@dataclass(frozen=True)
class RolloutConfig:
    """What is sampled for every prompt."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(n=8, max_new_tokens=256))
    """How completions are drawn, ``n`` of every prompt (advantages need at least 2). The temperature is that of every
    log-probability in the loss, too; the seed is the run's."""
    segmenter: str = "newline"
    """How completions are cut into steps, for step credit, rewards and ``samples.jsonl``."""
    truncated: Literal["keep", "mask"] = "keep"
    """Whether completions that were cut off count in the loss; ``mask`` is DAPO's overlong filtering."""
    overlong_penalty: int | None = None
    """Soft overlong penalty (DAPO, arXiv 2503.14476): over the last so many tokens before ``max_new_tokens`` the
    reward falls linearly by 1; null: off."""
    dynamic_sampling: int = 0
    """How often prompts whose completions all earn the same are sampled anew (DAPO), >= 0; such groups have nothing to
    say, and every new draw costs as much as the first."""

    def __post_init__(self) -> None:
        longest = f"[1, {self.sampling.longest}]"
        check_bounds("rollout.", self, dynamic_sampling="[0, inf)", overlong_penalty=longest)
        self.sampling.check_unbiased("rollout.sampling")

    def penalty(self, tokens: int) -> float:
        """What a completion's reward loses for its length (DAPO's soft overlong punishment, arXiv 2503.14476).

        Args:
            tokens: of the completion.

        Returns:
            0 up to ``overlong_penalty`` tokens before the longest completion, rising linearly to 1 there; 0 where it is
            off.
        """
        if self.overlong_penalty is None:
            return 0.0
        over = tokens - (self.sampling.longest - self.overlong_penalty)
        return min(max(over, 0) / self.overlong_penalty, 1.0)


@dataclass(frozen=True)
class PolicyLossConfig:
    """The policy-gradient term; see :mod:`stepkd.losses.policy_gradient`."""

    weight: float = 1.0
    """Weight of the term, >= 0; 0 distils only."""
    advantage: Literal["group_std", "group_mean", "leave_one_out"] = "group_std"
    """How rewards are compared within a prompt's completions: over their standard deviation (GRPO), with their mean
    (``group_mean``, Dr. GRPO), or with the mean of the others (``leave_one_out``, RLOO)."""
    normalisation: Literal["group_token_mean", "grpo", "dapo", "dr_grpo"] = "group_token_mean"
    """What the sum over tokens is divided by: as KDRL does, or as ``grpo``, ``dapo`` or ``dr_grpo`` do."""
    clip_low: float = 0.2
    """Lower bound 1 - clip_low of the ratio, in [0, 1)."""
    clip_high: float = 0.2
    """Upper bound 1 + clip_high of the ratio, >= 0; DAPO's clip-higher has 0.28."""
    num_iterations: int = 1
    """Optimiser steps on every batch of rollouts, >= 1; above 1 ratio and clipping matter."""
    tis_cap: float | None = None
    """Truncated importance sampling: every token is weighed by the trainer's over the sampler's probability, at most
    this, > 0; null: not. For engines whose probabilities are a little off."""
    equal_groups: Literal["keep", "drop"] = "keep"
    """Whether groups without a single advantage, which have nothing to say, count in this term's denominator."""

    def __post_init__(self) -> None:
        check_bounds("policy_loss.", self, weight="[0, inf)", clip_low="[0, 1)", clip_high="[0, inf)")
        check_bounds("policy_loss.", self, num_iterations="[1, inf)", tis_cap="(0, inf)")


class Schedule(ABC):
    """How a coefficient changes with the optimiser steps: Constant, Linear or Switch."""

    @abstractmethod
    def coefficient(self, beta: float, step: int) -> float:
        """The coefficient of the distillation term at an optimiser step.

        Args:
            beta: the coefficient that it begins with, >= 0.
            step: optimiser step, counted from 0.
        """

    def policy_share(self, step: int) -> float:
        """Factor on the policy-gradient term at an optimiser step, counted from 0: 1, save for a :class:`Switch`."""
        return 1.0


class Steady(Schedule):
    """A schedule that leaves the policy gradient alone: Constant or Linear."""


@dataclass(frozen=True)
class Constant(Steady):
    """Always the same."""

    def coefficient(self, beta: float, step: int) -> float:
        """See :meth:`Schedule.coefficient`."""
        return beta


@dataclass(frozen=True)
class Linear(Steady):
    """Falls with every step, to a floor (KDRL-Annealing: beta 5e-3, falling by 5e-5 to 1e-3)."""

    delta: float = 5e-5
    """Fall per optimiser step, >= 0; the paper's."""
    beta_min: float = 1e-3
    """Floor, >= 0; the paper's."""

    def __post_init__(self) -> None:
        check_bounds("kd.schedule.", self, delta="[0, inf)", beta_min="[0, inf)")

    def coefficient(self, beta: float, step: int) -> float:
        """See :meth:`Schedule.coefficient`."""
        return max(beta - self.delta * step, min(beta, self.beta_min))


@dataclass(frozen=True)
class Switch(Schedule):
    """Distillation alone, then the policy gradient alone."""

    until_step: int
    """Optimiser steps of distillation, >= 1."""

    def __post_init__(self) -> None:
        check_bounds("kd.schedule.", self, until_step="[1, inf)")

    def coefficient(self, beta: float, step: int) -> float:
        """See :meth:`Schedule.coefficient`."""
        return beta if step < self.until_step else 0.0

    def policy_share(self, step: int) -> float:
        """0 while it distils."""
        return float(step >= self.until_step)


Mask = Literal["none", "response", "group"]


class KDConfig(ABC):
    """The distillation term (KDRL, arXiv 2506.02208), ``beta`` times a reverse KL to the teacher on the policy's own
    samples: a term of its own (SampledKL or ExactKL), or a part of every token's advantage (AsAdvantage)."""

    beta: float
    schedule: Schedule
    mask: Mask = "none"
    """What is distilled on: every completion."""

    def __post_init__(self) -> None:
        check_bounds("kd.", self, beta="[0, inf)")


@dataclass(frozen=True)
class _Term(KDConfig):
    """A term of its own, the paper's joint loss."""

    beta: float = 2e-3
    """Coefficient of the distillation term at the first optimiser step, >= 0; the default is the paper's."""
    schedule: Schedule = field(default_factory=Constant)
    """How the coefficient changes: Constant, Linear, or Switch, which distils first and learns from rewards then."""
    mask: Mask = "none"
    """What is distilled on: every completion (``none``), only incorrect ones (``response``), or only prompts without a
    correct one (``group``). The term is divided by all tokens (the paper's choice was not found)."""


@dataclass(frozen=True)
class SampledKL(_Term):
    """A term of its own from the sampled tokens' log-probabilities alone, by an estimator of the KL."""

    estimator: Literal["k1", "k2", "k3"] = "k2"
    """What estimates the KL: ``k2`` is the paper's, whose expected gradient is the reverse KL's; that of ``k3`` is
    the forward KL's, and that of ``k1`` is 0: it is there to compare with."""


@dataclass(frozen=True)
class ExactKL(_Term):
    """A term of its own, the exact reverse KL at every sampled prefix."""

    top_k: TopK | None = None
    """Over the teacher's most likely tokens and one bucket for the others; null: over the whole vocabulary. A KL over
    the most likely alone is reported to be unstable (arXiv 2506.02208, as others tell it)."""


@dataclass(frozen=True)
class AsAdvantage(KDConfig):
    """``beta (log teacher - log policy)`` is added to every token's advantage: on-policy the same gradient as k2's."""

    beta: float = 2e-3
    """Coefficient of the distillation at the first optimiser step, >= 0; the default is the paper's."""
    schedule: Steady = field(default_factory=Constant)
    """How the coefficient changes: Constant or Linear."""


@dataclass(frozen=True)
class SampleLogConfig:
    """What ``samples.jsonl`` in the run folder keeps of the rollouts; ``stepkd samples`` shows it."""

    every: int = 20
    """Optimiser steps between two entries, >= 1."""
    number: int = 8
    """Completions in an entry, one per prompt as far as they go, >= 0; the lengths of all are counted anyway."""

    def __post_init__(self) -> None:
        check_bounds("samples.", self, every="[1, inf)", number="[0, inf)")


@dataclass(frozen=True)
class StepCreditConfig:
    """Rewards of steps beside that of the answer: a token has the rewards of its step and of later ones, normalised
    over all steps of the group (DeepSeekMath's process supervision, arXiv 2402.03300)."""

    scorer: str
    """What scores steps: ``checker`` (the tiny world), ``arithmetic``, ``gain`` (what of the row's solution a step
    adds), a process reward model, or ``judge:MODEL``."""
    weight: float = 1.0
    """Weight of the steps' advantages in the sum with the answer's, >= 0; they are always divided by their group's
    deviation."""
    outcome_weight: float = 1.0
    """Weight of the answer's advantage in that sum, >= 0."""
    discount: float = 1.0
    """Factor on a reward for every step that it is away, in [0, 1]; 0: a step has its own only."""

    def __post_init__(self) -> None:
        check_bounds("step_credit.", self, weight="[0, inf)", outcome_weight="[0, inf)", discount="[0, 1]")
