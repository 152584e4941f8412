"""Settings of distillation (divergence, samples) and of reinforcement learning with a teacher (rollouts, advantages,
policy loss, distillation term, step credit)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from stepkd.errors import ConfigError, check_bounds
from stepkd.losses import (
    balanced_kl,
    forward_kl,
    generalized_jsd,
    nkd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from stepkd.losses.policy_gradient import STD_EPSILON, Advantage, Normalisation
from stepkd.sampling.engines import EngineConfig, InProcess
from stepkd.sampling.sampler import SamplingConfig

Kind = Literal[
    "jsd", "forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "balanced_kl", "total_variation", "nkd"
]
Divergence = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Log-probabilities of student and teacher (C, W) and targets (C,), to (C,)."""


@dataclass(frozen=True)
class DivergenceConfig:
    """How far a student is from its teacher at a position; see :mod:`stepkd.losses.divergence`."""

    kind: Kind = "jsd"
    """``jsd`` is GKD's generalised Jensen-Shannon divergence; ``forward_kl`` covers the teacher's modes, ``reverse_kl``
    seeks one."""
    beta: float = 0.5
    """``jsd``: in [0, 1]; towards 0 it acts like the forward KL, towards 1 like the reverse KL."""
    scaled: bool = False
    """``jsd``: divide by beta (1 - beta), so that the scale does not depend on beta."""
    skew: float = 0.1
    """``skew_...``: in [0, 1]; 0 is the plain KL."""
    delta: float = 2.0
    """``balanced_kl``: weight of the raised term, >= 1."""
    gamma: float = 1.5
    """``nkd``: weight of the term of the other tokens, >= 0."""
    temperature: float = 1.0
    """Divides the logits of both sides, > 0 (``nkd``: only in the term of the other tokens). Apart from the temperature
    of sampling."""
    top_k: int | None = None
    """Compare the teacher's k likeliest tokens and one bucket for all others; null: the whole vocabulary."""
    tail: bool = True
    """Whether ``top_k`` has that bucket; false renormalises the k."""

    def __post_init__(self) -> None:
        check_bounds(
            "divergence.",
            self,
            beta="[0, 1]",
            skew="[0, 1]",
            delta="[1, inf)",
            gamma="[0, inf)",
            temperature="(0, inf)",
        )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"divergence.top_k={self.top_k}: at least 1, or null for the whole vocabulary")
        if self.kind == "nkd" and self.top_k is not None:
            raise ConfigError("divergence: nkd renormalises over all tokens but the target and cannot be cut to top_k")

    @property
    def logits_temperature(self) -> float:
        """What divides both sides' logits before the divergence sees them."""
        return 1.0 if self.kind == "nkd" else self.temperature

    def function(self) -> Divergence:
        """The divergence with its settings."""
        if self.kind == "nkd":
            return lambda s, t, targets: nkd(s, t, targets, gamma=self.gamma, temperature=self.temperature)
        simple: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "jsd": lambda s, t: generalized_jsd(s, t, beta=self.beta, scaled=self.scaled),
            "forward_kl": forward_kl,
            "reverse_kl": reverse_kl,
            "skew_forward_kl": lambda s, t: skew_forward_kl(s, t, skew=self.skew),
            "skew_reverse_kl": lambda s, t: skew_reverse_kl(s, t, skew=self.skew),
            "balanced_kl": lambda s, t: balanced_kl(s, t, delta=self.delta),
            "total_variation": total_variation,
        }
        chosen = simple[self.kind]
        return lambda s, t, targets: chosen(s, t)


@dataclass(frozen=True)
class MixConfig:
    """Divergence and cross-entropy as one target: weights a and 1 - a, with a rising linearly over optimiser steps.

    With the forward KL that is a cross-entropy with the soft target ``(1 - a) onehot + a teacher`` (PS-KD, arXiv
    2006.12000, whose a rises once per epoch, from 0 to 0.8).
    """

    start: float = 0.0
    """a at the first step, in [0, 1]."""
    end: float = 0.8
    """a at the last one, in [0, 1]; validation uses it throughout."""
    steps: int | None = None
    """Steps that the rise takes, >= 1; null: the whole run."""

    def __post_init__(self) -> None:
        check_bounds("mix.", self, start="[0, 1]", end="[0, 1]")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"mix.steps={self.steps}: must be at least 1, or null for the whole run")

    def share(self, step: int, total: int | None) -> float:
        """a at an optimiser step, counted from 0.

        Raises:
            ConfigError: neither ``steps`` nor the run has an end.
        """
        steps = self.steps or total
        if steps is None:
            raise ConfigError("mix.steps is null and the run has no planned end: set mix.steps or trainer.max_steps")
        return self.start + (self.end - self.start) * min(step / max(steps - 1, 1), 1.0)


@dataclass(frozen=True)
class SourceConfig:
    """Whose completions a batch is distilled on. One source serves a whole global batch (GKD, algorithm 1)."""

    student: float = 0.5
    """lambda: probability that a batch is sampled from the student, in [0, 1]; 1 is purely on-policy, 0 never samples
    from it."""
    teacher: float = 0.0
    """Of the other batches, the share that is sampled from the teacher (sequence-level KD), in [0, 1]; the rest are the
    data's own completions."""
    temperature: float = 1.0
    """Of sampling, > 0."""
    max_new_tokens: int = 256
    """Longest sampled completion in tokens, >= 1."""
    engine: EngineConfig = field(default_factory=InProcess)
    """Where the student is sampled: InProcess, VLLMServer or VLLMColocated."""
    segmenter: str = "newline"
    """How sampled completions are cut into steps."""
    reuse: int = 1
    """Optimiser steps on every batch, >= 1; above 1 the student has moved on from its samples."""

    def __post_init__(self) -> None:
        check_bounds("source.", self, student="[0, 1]", teacher="[0, 1]")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"source.temperature={self.temperature}: must be positive; greedy samples are no samples")
        check_bounds("source.", self, max_new_tokens="[1, inf)", reuse="[1, inf)")

    def sampling(self, seed: int) -> SamplingConfig:
        """The same settings as a sampler wants them. No nucleus and no top-k: they would change the distribution."""
        return SamplingConfig(temperature=self.temperature, max_new_tokens=self.max_new_tokens, seed=seed)


@dataclass(frozen=True)
class RolloutConfig:
    """What is sampled for every prompt."""

    group_size: int = 8
    """Completions of every prompt, >= 1; advantages need at least 2."""
    temperature: float = 1.0
    """Of sampling, and of every log-probability in the loss, > 0."""
    max_new_tokens: int = 256
    """Longest completion in tokens."""
    engine: EngineConfig = field(default_factory=InProcess)
    """Where they are sampled: InProcess, VLLMServer or VLLMColocated."""
    segmenter: str = "newline"
    """How completions are cut into steps."""
    truncated: Literal["keep", "mask"] = "keep"
    """Whether completions that were cut off count in the loss."""
    overlong: int | None = None
    """Soft overlong punishment (DAPO, arXiv 2503.14476): over the last so many tokens before ``max_new_tokens`` the
    reward falls linearly by 1; null: off."""
    resample: int = 0
    """How often prompts whose completions all earn the same are sampled anew (dynamic sampling), >= 0."""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("group_size", "max_new_tokens"), "[1, inf)")
        check_bounds("rollout.", self, **counts, temperature="(0, inf)", resample="[0, inf)")
        if self.overlong is not None and not 1 <= self.overlong <= self.max_new_tokens:
            raise ConfigError(f"rollout.overlong={self.overlong}: must lie between 1 and max_new_tokens")

    def sampling(self, seed: int) -> SamplingConfig:
        """The same settings as a sampler wants them."""
        return SamplingConfig(
            n=self.group_size, temperature=self.temperature, max_new_tokens=self.max_new_tokens, seed=seed
        )

    def punishment(self, tokens: int) -> float:
        """What a completion's reward loses for its length, in [0, 1]."""
        if self.overlong is None:
            return 0.0
        return min(max(tokens - (self.max_new_tokens - self.overlong), 0) / self.overlong, 1.0)


@dataclass(frozen=True)
class PolicyLossConfig:
    """The policy-gradient term; see :mod:`stepkd.losses.policy_gradient`."""

    weight: float = 1.0
    """Of the term, >= 0; 0 distils only."""
    advantage: Advantage = "group_std"
    """``group_std``, ``group_mean`` or ``leave_one_out``."""
    ddof: int = 1
    """Of the standard deviation: 1 or 0."""
    eps: float = STD_EPSILON
    """Added to it, >= 0."""
    normalisation: Normalisation = "group_token_mean"
    """KDRL's own; ``grpo``, ``dapo``, ``dr_grpo``, ``bnpo``."""
    clip_low: float = 0.2
    """Lower bound 1 - clip_low of the ratio."""
    clip_high: float = 0.2
    """Upper bound 1 + clip_high."""
    inner_steps: int = 1
    """Optimiser steps on every batch of rollouts, >= 1; above 1 ratio and clipping matter."""
    importance_cap: float | None = None
    """Weigh every token by trainer's over sampler's probability, at most this; null: not."""
    equal_groups: Literal["keep", "drop"] = "keep"
    """Whether groups without a single advantage, which have nothing to say, count in this term's denominator."""

    def __post_init__(self) -> None:
        check_bounds(
            "policy_loss.",
            self,
            weight="[0, inf)",
            eps="[0, inf)",
            clip_low="[0, 1)",
            clip_high="[0, inf)",
            inner_steps="[1, inf)",
        )
        if self.ddof not in (0, 1):
            raise ConfigError(f"policy_loss.ddof={self.ddof}: must be 0 or 1")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ConfigError(f"policy_loss.importance_cap={self.importance_cap}: must be positive, or null")


@dataclass(frozen=True)
class KDConfig:
    """The distillation term (KDRL, arXiv 2506.02208): beta times a reverse KL to the teacher on the same samples."""

    beta: float = 2e-3
    """Coefficient at the first step, >= 0."""
    schedule: Literal["constant", "linear", "switch"] = "constant"
    """``linear``: falls by ``delta`` a step to ``beta_min`` (the paper's annealing: 5e-3, 5e-5, 1e-3). ``switch``: beta
    for ``until_step`` steps of distillation alone, then the policy gradient alone."""
    delta: float = 5e-5
    """``linear``: fall per optimiser step."""
    beta_min: float = 1e-3
    """``linear``: floor."""
    until_step: int = 0
    """``switch``: optimiser steps of distillation, >= 1."""
    estimator: Literal["k1", "k2", "k3", "full"] = "k2"
    """``full``: the exact reverse KL over the vocabulary at every sampled prefix."""
    gradient: Literal["k1", "k2", "k3"] | None = None
    """Straight-through: the term's value stays the estimator's, its gradient is this one's; null: its own."""
    top_k: int | None = None
    """``full``: over the teacher's k likeliest tokens and one bucket for the rest, >= 1; null: all tokens. A KL over
    the k alone is reported to be unstable (arXiv 2506.02208, as others tell it)."""
    tail: bool = True
    """``top_k``: whether the rest is a bucket of its own, or the k are renormalised."""
    form: Literal["joint", "advantage", "reward"] = "joint"
    """``joint``: a term of its own (the paper's). ``advantage``: ``beta R`` is added to every token's advantage: the
    same gradient on-policy. ``reward``: ``beta sum_t R`` is added to the reward before it is normalised, which loses
    what each token deserves (a form of our own, for comparison)."""
    clamp: float | None = None
    """Bound on |R| = |log teacher - log policy| in the gradient, > 0; null: none."""
    mask: Literal["none", "response", "group"] = "none"
    """``response``: only wrong completions are distilled on; ``group``: only prompts without a right one."""
    kept_only: bool = False
    """Whether a masked term is divided by what is left, not by all tokens (the paper's choice was not found)."""
    skip_eos: bool = False
    """Leave the end token out of this term: for a teacher that ends otherwise."""

    def __post_init__(self) -> None:
        check_bounds("kd.", self, beta="[0, inf)", delta="[0, inf)", beta_min="[0, inf)")
        if self.schedule == "switch" and self.until_step < 1:
            raise ConfigError(f"kd.until_step={self.until_step}: a switch needs at least 1 step of distillation")
        if self.clamp is not None and not self.clamp > 0:
            raise ConfigError(f"kd.clamp={self.clamp}: must be positive, or null")
        if self.schedule != "switch" and self.until_step:
            raise ConfigError(f"kd.until_step={self.until_step} goes with schedule: switch, not with {self.schedule}")
        if self.form != "joint" and (self.estimator != "k2" or self.mask != "none" or self.skip_eos):
            raise ConfigError(
                f"kd.form={self.form} has neither another estimator than k2, nor a mask, nor skip_eos: set form: joint"
            )
        goes = self.estimator != "full" and self.form == "joint" and self.clamp is None
        if self.gradient is not None and not goes:
            raise ConfigError(
                f"kd.gradient={self.gradient} goes with form: joint, estimator k1, k2 or k3, and without a clamp"
            )
        if self.top_k is not None and (self.estimator != "full" or self.top_k < 1):
            raise ConfigError(f"kd.top_k={self.top_k}: at least 1, and only with estimator: full")
        if not self.tail and self.top_k is None:
            raise ConfigError("kd.tail: false goes with top_k")
        if self.kept_only and self.mask == "none":
            raise ConfigError("kd.kept_only goes with a mask: set kd.mask")
        if self.clamp is not None and (self.estimator != "k2" or self.form == "reward"):
            raise ConfigError(f"kd.clamp={self.clamp} belongs to estimator k2, in the forms joint and advantage")

    def coefficient(self, step: int) -> float:
        """beta at an optimiser step, counted from 0."""
        if self.schedule == "linear":
            return max(self.beta - self.delta * step, min(self.beta, self.beta_min))
        if self.schedule == "switch" and step >= self.until_step:
            return 0.0
        return self.beta

    def policy_share(self, step: int) -> float:
        """Factor on the policy-gradient term: 0 while a switch still distils."""
        return 0.0 if self.schedule == "switch" and step < self.until_step else 1.0


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
    """Rewards of steps, beside that of the answer."""

    scorer: str
    """``checker`` (the tiny world), ``arithmetic``, ``gain`` (what of the row's solution a step adds), a process reward
    model, or ``judge:MODEL``."""
    weight: float = 1.0
    """Of the steps' advantages in the sum with the answer's. They are always divided by their group's deviation."""
    outcome_weight: float = 1.0
    """Of the answer's advantage."""
    form: Literal["to_go", "first_step"] = "to_go"
    """``to_go``: a token has the rewards of its step and of later ones, normalised over all steps of the group
    (DeepSeekMath's process supervision). ``first_step``: the first step, where a mode or a plan is chosen, has an
    advantage of its own for its score, beside the answer's (after KAT-V1, a reconstruction: see
    :func:`~stepkd.losses.segment_group_advantages`)."""
    discount: float = 1.0
    """``to_go``: factor on a reward for every step that it is away, in [0, 1]; 0: a step has its own only."""

    def __post_init__(self) -> None:
        check_bounds("step_credit.", self, weight="[0, inf)", outcome_weight="[0, inf)", discount="[0, 1]")
        if self.form == "first_step" and self.discount != 1:
            raise ConfigError(f"step_credit.discount={self.discount} goes with form: to_go")
