"""Segmenters that cut where a model was in doubt: low confidence, high entropy, or likely rejection by a teacher.

They read the per-token signals of a :class:`~stepkd.steps.text.TokenizedText`, all taken at temperature 1. A cut may
fall inside a word. What a cut may not do is make a step without words: white space, end tokens and other special tokens
go to the step before them, or open the first one, as with the delimiter segmenters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from stepkd.errors import ConfigError, DataError, check_choice
from stepkd.steps.text import TokenizedText

Side = Literal["close", "open"]
"""Which side of an uncertain token the cut is on: ``close`` ends the step with it, ``open`` begins the next one."""

ROUNDING = 1e-3
"""How far rounding may push a log-probability above 0 or an entropy below it (nats); as in the row contracts."""

_SOURCES = {
    "logprobs": "log-probabilities (logprobs)",
    "entropies": "entropies",
    "teacher_logprobs": "log-probabilities under a teacher (teacher_logprobs)",
}


@dataclass(frozen=True)
class _Threshold:
    """Cuts at every token whose signal is beyond a threshold."""

    threshold: float
    side: Side = "close"
    """``close``: the uncertain token is the last of its step; ``open``: it is the first of the next one."""
    min_tokens: int = 1
    """A step shorter than this joins the one before it (the first one: the one behind it), >= 1."""

    def __post_init__(self) -> None:
        check_choice("side", self.side, ("close", "open"))
        if self.min_tokens < 1:
            raise ConfigError(f"min_tokens={self.min_tokens}: a step has at least one token")

    def _ends(self, completion: TokenizedText, divides: Sequence[bool]) -> list[int]:
        behind = self.side == "close"
        return _ends(completion, [index + behind for index, each in enumerate(divides) if each], self.min_tokens)


@dataclass(frozen=True)
class AdaptiveStepSegmenter(_Threshold):
    """Cut at tokens that the model gave little probability to (AdaptiveStep, arXiv 2502.13943).

    A token whose confidence ``exp(logprob)`` is below the threshold is a division point. Reports of the paper differ on
    whether it ends its segment or begins the next. We infer ``close``: the paper's decoding scores a prefix that
    includes the uncertain token, so the step that is labelled should include it as well. In a run of uncertain tokens
    every one is a division point.
    """

    threshold: float
    """Confidence below which a token divides, in (0, 1); :func:`~stepkd.steps.threshold.fit_threshold` finds it."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ConfigError(
                f"confidence threshold {self.threshold}: must lie between 0 and 1 (a probability, not percent)"
            )
        super().__post_init__()

    def ends(self, completion: TokenizedText) -> list[int]:
        """See :class:`~stepkd.steps.segment.Segmenter`.

        Raises:
            DataError: the completion has no log-probabilities, or impossible ones.
        """
        low = [math.exp(logprob) < self.threshold for logprob in _signal(completion, "logprobs", "adaptive_step")]
        return self._ends(completion, low)


@dataclass(frozen=True)
class EntropySegmenter(_Threshold):
    """Cut where the next-token distribution was spread out.

    The trigger of Cautious Next Token Prediction (arXiv 2507.03038), with one threshold in place of its ramp between
    0.01 and 1.5 nats. That method branches before the uncertain token (``open``); the default is that of
    :class:`AdaptiveStepSegmenter`, so that the two differ in the signal alone.
    """

    threshold: float
    """Entropy in nats above which a token divides, >= 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise ConfigError(f"entropy threshold {self.threshold}: must be a finite number of nats, at least 0")
        super().__post_init__()

    def ends(self, completion: TokenizedText) -> list[int]:
        """See :class:`~stepkd.steps.segment.Segmenter`.

        Raises:
            DataError: the completion has no entropies, or impossible ones.
        """
        high = [entropy > self.threshold for entropy in _signal(completion, "entropies", "entropy")]
        return self._ends(completion, high)


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
        return _ends(completion, cuts, 1)


def _signal(completion: TokenizedText, name: str, segmenter: str) -> tuple[float, ...]:
    """A completion's per-token signal, checked; no tokens need none."""
    values: tuple[float, ...] | None = getattr(completion, name)
    if values is None:
        if not len(completion):
            return ()
        sampled = "sampled rollouts carry them as raw_logprobs; " if name == "logprobs" else ""
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


def _ends(completion: TokenizedText, cuts: Iterable[int], min_tokens: int) -> list[int]:
    """Step ends from increasing cuts: a step without words, or shorter than ``min_tokens``, joins the one before it."""
    ends: list[int] = []
    start = previous = 0
    words = False
    for cut in (*cuts, len(completion)):
        words = words or bool(completion.span_text(previous, cut).strip())
        previous = cut
        if words and cut - start >= min_tokens:
            ends.append(cut)
        elif ends:
            ends[-1] = cut
        else:
            continue  # nothing before it: it opens the first step
        start, words = cut, False
    return ends
