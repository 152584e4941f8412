"""Settings of distillation: which divergence, whose samples, which positions count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
from stepkd.rollout import SamplingSpec
from stepkd.rollout.vllm import VLLMSpec

Kind = Literal[
    "jsd", "forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "balanced_kl", "total_variation", "nkd"
]
Divergence = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Log-probabilities of student and teacher (C, W) and targets (C,), to (C,)."""


@dataclass(frozen=True)
class DivergenceSpec:
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
class MixSpec:
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
class SourceSpec:
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
    max_rows: int = 64
    """Completions decoded at once, >= 1."""
    segmenter: str = "newline"
    """How sampled completions are cut into steps."""
    vllm: VLLMSpec | None = None
    """Sample the student with vLLM; null: with this process's own decoding."""
    reuse: int = 1
    """Optimiser steps on every batch, >= 1; above 1 the student has moved on from its samples."""

    def __post_init__(self) -> None:
        check_bounds("source.", self, student="[0, 1]", teacher="[0, 1]")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"source.temperature={self.temperature}: must be positive; greedy samples are no samples")
        check_bounds("source.", self, max_new_tokens="[1, inf)", max_rows="[1, inf)", reuse="[1, inf)")

    def sampling(self, seed: int) -> SamplingSpec:
        """The same settings as a sampler wants them. No nucleus and no top-k: they would change the distribution."""
        return SamplingSpec(temperature=self.temperature, max_new_tokens=self.max_new_tokens, seed=seed)
