"""Settings of distillation: divergences, a class for each; how cross-entropy joins them; whose completions are used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from stepkd.errors import ConfigError, check_bounds
from stepkd.sampling.engine import SamplingConfig
from stepkd.teachers.config import Needs


class DivergenceConfig(ABC):
    """How far a student is from its teacher at a position; its function is in
    :data:`~stepkd.modules.gkd.DIVERGENCES`."""

    temperature: float
    tempers: ClassVar[bool] = True
    """Whether the temperature divides the logits of both sides; otherwise it is the function's own."""
    whole: ClassVar[bool] = False
    """Whether it reads the teacher's whole distribution, no buckets of it, and which token stands at a position."""

    @property
    def logits_temperature(self) -> float:
        """What divides both sides' logits before the divergence sees them, > 0."""
        return self.temperature if self.tempers else 1.0

    def needs(self) -> Needs:
        """What it asks of a teacher, for :meth:`~stepkd.teachers.config.TeacherConfig.require` to check before anything
        is loaded."""
        whole: Needs = {"whole": f"divergence {type(self).__name__} reads the whole distribution"}
        tempered: Needs = {"tempered": "divergence.temperature divides the logits of both sides"}
        return (whole if self.whole else {}) | (tempered if self.logits_temperature != 1 else {})


@dataclass(frozen=True, kw_only=True)
class _Tempered(DivergenceConfig):
    temperature: float = 1.0
    """Divides the logits of both sides, > 0; apart from the temperature of sampling. 1 leaves them."""

    bounds: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        check_bounds("divergence.", self, temperature="(0, inf)", **self.bounds)


@dataclass(frozen=True, kw_only=True)
class JSD(_Tempered):
    """GKD's generalised Jensen-Shannon divergence (arXiv 2306.13649), between the KLs of both directions."""

    beta: float = 0.5
    """In [0, 1]: towards 0 it acts like the forward KL, towards 1 like the reverse KL; 0.5 is symmetric."""
    scaled: bool = False
    """Divide by beta (1 - beta), so that the scale does not depend on beta; off as in the paper."""
    bounds = {"beta": "[0, 1]"}  # noqa: RUF012


@dataclass(frozen=True, kw_only=True)
class ForwardKL(_Tempered):
    """KL(teacher || student), which covers the teacher's modes."""


@dataclass(frozen=True, kw_only=True)
class ReverseKL(_Tempered):
    """KL(student || teacher), which seeks one of the teacher's modes."""


@dataclass(frozen=True, kw_only=True)
class SkewForwardKL(_Tempered):
    """KL(teacher || skew teacher + (1 - skew) student) (DistiLLM, arXiv 2402.03898): bounded by -log(skew)."""

    skew: float = 0.1
    """Share of the teacher in the mixture, in [0, 1]; 0 is the plain KL, the paper has 0.1."""
    bounds = {"skew": "[0, 1]"}  # noqa: RUF012


@dataclass(frozen=True, kw_only=True)
class SkewReverseKL(_Tempered):
    """KL(student || skew student + (1 - skew) teacher) (DistiLLM, arXiv 2402.03898): bounded by -log(skew)."""

    skew: float = 0.1
    """Share of the student in the mixture, in [0, 1]; 0 is the plain KL, the paper has 0.1."""
    bounds = {"skew": "[0, 1]"}  # noqa: RUF012


@dataclass(frozen=True, kw_only=True)
class BalancedKL(_Tempered):
    """Forward plus reverse KL, one of them raised by which side is surer (after BD-KD, arXiv 2212.12965)."""

    delta: float = 2.0
    """Weight of the raised term, >= 1; 1 is the plain sum."""
    bounds = {"delta": "[1, inf)"}  # noqa: RUF012


@dataclass(frozen=True, kw_only=True)
class NKD(_Tempered):
    """Normalised distillation (arXiv 2303.13005): the target's term, and the shape of the other tokens, whose logits
    alone the temperature divides. The paper has the cross-entropy beside it: ``cross_entropy: {class_path: Beside}``.
    """

    gamma: float = 1.5
    """Weight of the term of the other tokens, >= 0; the paper has 1.5."""
    bounds = {"gamma": "[0, inf)"}  # noqa: RUF012
    tempers = False
    whole = True


class CrossEntropyConfig(ABC):
    """How the cross-entropy of the same tokens joins the divergence: :class:`Beside` it or :class:`Mixed` with it."""

    @abstractmethod
    def term_weights(self, step: int | None, total: int | None) -> tuple[float, float]:
        """Weights of divergence and cross-entropy.

        Args:
            step: optimiser steps taken; None: in validation.
            total: optimiser steps of the run; None: it has no planned end.

        Raises:
            ConfigError: neither the settings nor the run have an end.
        """


@dataclass(frozen=True)
class Beside(CrossEntropyConfig):
    """Added to the divergence, which keeps its weight of 1."""

    weight: float = 1.0
    """Weight of the cross-entropy, > 0; NKD's paper has 1."""

    def __post_init__(self) -> None:
        check_bounds("cross_entropy.", self, weight="(0, inf)")

    def term_weights(self, step: int | None, total: int | None) -> tuple[float, float]:
        """See :meth:`CrossEntropyConfig.term_weights`."""
        return 1.0, self.weight


@dataclass(frozen=True)
class Mixed(CrossEntropyConfig):
    """Weights a and 1 - a of divergence and cross-entropy, a rising linearly over optimiser steps.

    With the forward KL that is a cross-entropy with the soft target ``(1 - a) onehot + a teacher`` (PS-KD, arXiv
    2006.12000, whose a rises once per epoch, from 0 to 0.8).
    """

    start: float = 0.0
    """The share a of the divergence at the first step, in [0, 1]."""
    end: float = 0.8
    """The share a of the divergence at the last step, in [0, 1]; validation uses it throughout."""
    steps: int | None = None
    """Optimiser steps that the rise takes, >= 1; null: the whole run."""

    def __post_init__(self) -> None:
        check_bounds("cross_entropy.", self, start="[0, 1]", end="[0, 1]", steps="[1, inf)")

    def term_weights(self, step: int | None, total: int | None) -> tuple[float, float]:
        """See :meth:`CrossEntropyConfig.term_weights`."""
        if step is None:
            return self.end, 1.0 - self.end
        steps = self.steps or total
        if steps is None:
            raise ConfigError(
                "cross_entropy.steps is null and the run has no planned end: set cross_entropy.steps or "
                "trainer.max_steps"
            )
        share = self.start + (self.end - self.start) * min(step / max(steps - 1, 1), 1.0)
        return share, 1.0 - share


@dataclass(frozen=True, kw_only=True)
class LearnedTemperature:
    """A temperature that divides the teacher's logits alone and is learnt beside the student, so that the teacher is no
    sharper than the student can follow (after PESF-KD, arXiv 2205.15308: a reconstruction, see
    :func:`stepkd.losses.temperature_slope`). By gradient descent on its logarithm; the student does not see it. All
    tokens weigh the same in it, whatever ``focus`` and ``average`` say, and logits are those that
    ``divergence.temperature`` has divided."""

    lr: float = 0.1
    """Learning rate of its logarithm, > 0, constant; it starts at 0, the teacher as it is."""

    def __post_init__(self) -> None:
        check_bounds("soften.", self, lr="(0, inf)")


@dataclass(frozen=True)
class SourceConfig:
    """Whose completions a batch is distilled on. One source serves a whole global batch (GKD, algorithm 1)."""

    lmbda: float = 0.5
    """Probability that a batch is sampled from the student, in [0, 1] (the paper's lambda); 1 is purely on-policy, 0
    never samples from it."""
    teacher: float = 0.0
    """Of the other batches, the share that is sampled from the teacher (sequence-level KD), in [0, 1]; the rest are the
    data's own completions."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=256))
    """How completions are drawn; top_p and top_k would change the distribution that the student learns on. Its seed is
    the run's."""
    segmenter: str = "newline"
    """How sampled completions are cut into steps, for the focus."""

    def __post_init__(self) -> None:
        check_bounds("source.", self, lmbda="[0, 1]", teacher="[0, 1]")
        if self.sampling.temperature == 0:
            raise ConfigError("source.sampling.temperature=0.0: must be positive; greedy samples are no samples")

    @property
    def samples(self) -> bool:
        """Whether any batch is sampled."""
        return self.lmbda > 0 or self.teacher > 0

    def needs(self) -> Needs:
        """What it asks of a teacher."""
        student = f"source.lmbda={self.lmbda} samples from the student"
        teacher = f"source.teacher={self.teacher} samples from the teacher"
        writes: Needs = {"fresh": teacher, "writes": teacher}
        return ({"fresh": student} if self.lmbda else {}) | (writes if self.teacher else {})
