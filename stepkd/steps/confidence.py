"""Segmenters that cut where a model was in doubt: low confidence, high entropy, or likely rejection by a teacher.

They read the per-token signals of a :class:`~stepkd.steps.text.TokenizedText`, all taken at temperature 1. A cut may
fall inside a word. What a cut may not do is make a step without words: white space, end tokens and other special tokens
go to the step before them, or open the first one, as with the delimiter segmenters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from stepkd.errors import ConfigError, DataError
from stepkd.steps.text import TokenizedText

ROUNDING = 1e-3
"""How far rounding may push a log-probability above 0 or an entropy below it (nats); as in the row contracts."""

_SOURCES = {
    "logprobs": "log-probabilities (logprobs)",
    "entropies": "entropies",
    "teacher_logprobs": "log-probabilities under a teacher (teacher_logprobs)",
}


@dataclass(frozen=True)
class AdaptiveStepSegmenter:
    """Cut behind tokens that the model gave little probability to (AdaptiveStep, arXiv 2502.13943).

    A token whose confidence ``exp(logprob)`` is below the threshold ends its step, as in the paper's released samples:
    its decoding scores a prefix that includes the uncertain token. In a run of uncertain tokens every one ends a step.
    """

    name: ClassVar = "adaptive_step"
    example: ClassVar = "0.05"
    threshold: float
    """Confidence below which a token divides, in (0, 1); :func:`~stepkd.steps.threshold.fit_threshold` finds it."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ConfigError(
                f"confidence threshold {self.threshold}: must lie between 0 and 1 (a probability, not percent)"
            )

    def ends(self, completion: TokenizedText) -> list[int]:
        """See :class:`~stepkd.steps.segment.Segmenter`.

        Raises:
            DataError: the completion has no log-probabilities, or impossible ones.
        """
        logprobs = _signal(completion, "logprobs", self.name)
        return _ends(completion, [end for end, each in enumerate(logprobs, 1) if math.exp(each) < self.threshold])


@dataclass(frozen=True)
class EntropySegmenter:
    """Cut behind tokens whose distribution was spread out.

    The trigger of Cautious Next Token Prediction (arXiv 2507.03038), with one threshold in place of its ramp between
    0.01 and 1.5 nats, and behind the uncertain token, so that it differs from :class:`AdaptiveStepSegmenter` in the
    signal alone.
    """

    name: ClassVar = "entropy"
    example: ClassVar = "1.5"
    threshold: float
    """Entropy in nats above which a token divides, >= 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise ConfigError(f"entropy threshold {self.threshold}: must be a finite number of nats, at least 0")

    def ends(self, completion: TokenizedText) -> list[int]:
        """See :class:`~stepkd.steps.segment.Segmenter`.

        Raises:
            DataError: the completion has no entropies, or impossible ones.
        """
        entropies = _signal(completion, "entropies", self.name)
        return _ends(completion, [end for end, each in enumerate(entropies, 1) if each > self.threshold])


@dataclass(frozen=True)
class RejectSegmenter:
    """Cut where a teacher would probably have rejected something by now (the stop rule of SpecDec++, arXiv 2405.19715).

    Speculative sampling accepts a drafted token with probability ``a = min(1, p_teacher / p_student)``. A step ends
    when ``1 - prod a`` over its tokens exceeds ``threshold``. SpecDec++ predicts ``a`` with a head; here it is exact.
    """

    threshold: float = 0.3
    """Probability of a rejection so far at which the step ends, in (0, 1); the paper's repository has 0.3 and 0.7."""
    min_tokens: int = 2
    """Shortest step in tokens, >= 1; the completion's last step may be shorter."""
    max_tokens: int = 20
    """Longest step in tokens, >= ``min_tokens``; only white space and end tokens behind it can make it longer."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ConfigError(f"reject threshold {self.threshold}: must lie between 0 and 1")
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ConfigError(
                f"min_tokens={self.min_tokens} and max_tokens={self.max_tokens}: a step needs at least one token, and "
                "min_tokens must not exceed max_tokens"
            )

    def ends(self, completion: TokenizedText) -> list[int]:
        """See :class:`~stepkd.steps.segment.Segmenter`.

        Raises:
            DataError: the completion lacks the log-probabilities of either model, or has impossible ones.
        """
        student = _signal(completion, "logprobs", "reject")
        teacher = _signal(completion, "teacher_logprobs", "reject")
        cuts: list[int] = []
        start, log_accepted = 0, 0.0
        for end, (own, other) in enumerate(zip(student, teacher, strict=True), start=1):
            if other < own:
                log_accepted += other - own
            length = end - start
            rejected = -math.expm1(log_accepted) > self.threshold
            if length >= self.max_tokens or (rejected and length >= self.min_tokens):
                cuts.append(end)
                start, log_accepted = end, 0.0
        return _ends(completion, cuts)


def _signal(completion: TokenizedText, name: str, segmenter: str) -> tuple[float, ...]:
    """A completion's per-token signal, checked; no tokens need none."""
    values: tuple[float, ...] | None = getattr(completion, name)
    if values is None:
        if not len(completion):
            return ()
        sampled = "sampled completions carry them as raw_logprobs; " if name == "logprobs" else ""
        teacher = " with a teacher" if name == "teacher_logprobs" else ""
        raise DataError(
            f"segmenter {segmenter!r} needs the {_SOURCES[name]} of every token, and this completion has none: "
            f"{sampled}stepkd.sampling.annotate{teacher} computes them for any text"
        )
    sign = -1 if name == "entropies" else 1
    for index, value in enumerate(values):
        if not sign * value <= ROUNDING:
            raise DataError(
                f"the {_SOURCES[name]} hold {value} at token {index}: must be a number, at "
                f"{'least' if sign < 0 else 'most'} 0; compute them again with stepkd.sampling.annotate"
            )
    return values


def _ends(completion: TokenizedText, cuts: Iterable[int]) -> list[int]:
    """Step ends from increasing cuts: a step without words joins the one before it, or opens the first one."""
    ends: list[int] = []
    start = 0
    for cut in (*cuts, len(completion)):
        if completion.span_text(start, cut).strip():
            ends.append(cut)
        elif ends:
            ends[-1] = cut
        start = cut
    return ends
