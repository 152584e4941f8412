"""Segmenters that cut where a model was in doubt (low confidence, high entropy, or likely rejection by a teacher), and
their thresholds.

They read the per-token signals of a :class:`~stepkd.steps.text.TokenizedText`, all taken at temperature 1. A cut may
fall inside a word. What a cut may not do is make a step without words: white space, end tokens and other special tokens
go to the step before them, or open the first one, as with the delimiter segmenters.

A threshold is computed once from a pool of responses, kept in a file, and reused. It belongs to the model and the
sampling settings that it was computed from; the file says which, so that labels, training and search cut alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from stepkd.errors import ConfigError, DataError, check_choice
from stepkd.steps.text import TokenizedText

ROUNDING = 1e-3
"""How far rounding may push a log-probability above 0 or an entropy below it (nats); as in the row contracts."""

SIGNALS = {
    "adaptive_step": ("logprobs",),
    "entropy": ("entropies",),
    "reject": ("logprobs", "teacher_logprobs"),
}
"""Which per-token signals of a :class:`~stepkd.steps.text.TokenizedText` each segmenter of this file reads."""


@dataclass(frozen=True)
class AdaptiveStepSegmenter:
    """Cut behind tokens that the model gave little probability to (AdaptiveStep, arXiv 2502.13943).

    A token whose confidence ``exp(logprob)`` is below the threshold ends its step, as in the paper's released samples:
    its decoding scores a prefix that includes the uncertain token. In a run of uncertain tokens every one ends a step.
    """

    name: ClassVar = "adaptive_step"
    threshold: float
    """Confidence below which a token divides, in (0, 1); :func:`fit_threshold` finds it."""

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
    min_tokens: ClassVar = 2
    """Shortest step in tokens; the completion's last step may be shorter."""
    max_tokens: ClassVar = 20
    """Longest step in tokens; only white space and end tokens behind it can make it longer."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ConfigError(f"reject threshold {self.threshold}: must lie between 0 and 1")

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
    if values is None and len(completion):
        raise DataError(
            f"segmenter {segmenter!r} needs the {name} of every token, and this completion has none: sampled ones "
            "carry raw_logprobs, and stepkd.sampling.annotate computes all signals of any text"
        )
    return _checked(values or (), name)


def _checked(values: Sequence[float], name: str, place: str = "") -> tuple[float, ...]:
    """Log-probabilities, which are at most 0, or entropies, which are at least 0; up to rounding."""
    sign, bound = (-1, "least") if name == "entropies" else (1, "most")
    for index, value in enumerate(values):
        if not sign * value <= ROUNDING:
            raise DataError(
                f"{place}the {name} hold {value} at token {index}: must be a number of nats, at {bound} 0; compute "
                "them again with stepkd.sampling.annotate"
            )
    return tuple(values)


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


# ---- thresholds ----------------------------------------------------------------------------------------------------

Signal = Literal["confidence", "entropy"]

_FORMAT = "stepkd segment threshold"
_VERSION = 1
_SEGMENTERS: dict[str, type[AdaptiveStepSegmenter | EntropySegmenter]] = {
    "confidence": AdaptiveStepSegmenter,
    "entropy": EntropySegmenter,
}


@dataclass(frozen=True)
class SegmentThreshold:
    """A threshold and where it came from: what :meth:`to_dict` writes and :meth:`load` reads again.

    ``SegmentThreshold.load(path).segmenter()`` cuts as the job did that fitted it.
    """

    value: float
    """Confidence in (0, 1) below which, or entropy in nats (>= 0) above which, a token divides."""
    quantile: float
    """Share of the pool's tokens that were to divide, in (0, 1)."""
    share: float
    """Share of the pool's tokens that do; below ``quantile`` where tokens tie or the pool is small."""
    num_tokens: int
    """Tokens in the pool, >= 1."""
    num_responses: int
    """Responses in the pool, >= 1."""
    signal: Signal = "confidence"
    """What the threshold is on."""
    model: str | None = None
    """Model that the pool was sampled from."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Sampling settings of the pool, its seed among them."""

    def segmenter(self) -> AdaptiveStepSegmenter | EntropySegmenter:
        """The segmenter that cuts at this threshold.

        Returns:
            An :class:`AdaptiveStepSegmenter` for ``confidence``, an :class:`EntropySegmenter` for ``entropy``.

        Raises:
            ConfigError: a value outside the signal's range.
        """
        return _SEGMENTERS[self.signal](self.value)

    def to_dict(self) -> dict[str, Any]:
        """What a file of it holds, as JSON values (:func:`stepkd.runs.files.write_json` writes it)."""
        return {"format": _FORMAT, "version": _VERSION} | asdict(self)

    @classmethod
    def load(cls, path: str | Path) -> SegmentThreshold:
        """Read a threshold from a file of what :meth:`to_dict` gives, such as a labelling job's ``threshold.json``.

        Raises:
            DataError: no such file, or one that holds no threshold.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
                raise ConfigError(f"no {_FORMAT} of version {_VERSION}")
            if (content.get("side", "close"), content.get("min_tokens", 1)) != ("close", 1):
                raise ConfigError("steps that open at an unsure token, or have a least length, are gone: fit it again")
            threshold: SegmentThreshold = TypeAdapter(cls).validate_python(content)
            threshold.segmenter()  # checks the value's range
            return threshold
        except OSError as error:
            raise DataError(f"cannot read the threshold: {error.strerror or error}", path=path) from error
        except (ConfigError, ValueError, RecursionError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            reason = str(error) if first is None else f"{first['loc'][0]}: {first['msg']}"
            raise DataError(
                f"not a usable threshold file ({reason}); fit it again (stepkd label --steps Fitted, or fit_threshold)",
                path=path,
            ) from error


def fit_threshold(
    pool: Iterable[Sequence[float]],
    quantile: float = 0.02,
    *,
    signal: Signal = "confidence",
    model: str | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> SegmentThreshold:
    """Find the threshold at which a given share of a pool's tokens divide (AdaptiveStep, arXiv 2502.13943: 2%).

    The quantile is exact, over all tokens of all responses together. With the n confidences in increasing order the
    threshold is number ``floor(quantile * n)``, counted from 0, and tokens strictly below it divide. So at most
    ``quantile`` of the tokens do: that many but for less than one token where no two are equal, fewer where tokens tie
    at the threshold. The share reached is recorded. For entropy the order is decreasing and tokens strictly above it
    divide.

    Args:
        pool: for each response its per-token log-probabilities at temperature 1 (signal ``confidence``: a
            completion's ``raw_logprobs``) or entropies (signal ``entropy``), in nats. The paper samples 30 responses
            per question and drops duplicates first.
        quantile: share of tokens that are to divide, in (0, 1).
        signal: what the pool's numbers are and what the threshold is on.
        model, sampling: where the pool came from, kept with the threshold.

    Raises:
        ConfigError: a setting out of range.
        DataError: a pool without tokens, with impossible numbers, or in which no token would divide.
    """
    check_choice("signal", signal, _SEGMENTERS)
    if not 0 < quantile < 1:
        raise ConfigError(f"quantile={quantile}: must lie between 0 and 1 (0.02 for 2% of the tokens)")
    name = "logprobs" if signal == "confidence" else "entropies"
    responses = [_checked(each, name, f"response {number} of the pool: ") for number, each in enumerate(pool)]
    # math.exp, as in the segmenter: NumPy's may differ in the last bit
    values = np.array([math.exp(x) if signal == "confidence" else x for each in responses for x in each])
    if not len(values):
        raise DataError("the pool has no tokens: sample some responses first")
    value, share = _exact_quantile(values, quantile, signal)
    used = sum(map(bool, responses))
    return SegmentThreshold(value, quantile, share, len(values), used, signal, model, dict(sampling or {}))


def _exact_quantile(values: np.ndarray, quantile: float, signal: str) -> tuple[float, float]:
    """The threshold, and the share of tokens that it divides."""
    count = len(values)
    # 0.29 * 100 is 28.999... in floating point.
    rank = min(math.floor(quantile * count * (1 + 1e-12)), count - 1)
    sign = 1 if signal == "confidence" else -1
    value = sign * float(np.partition(sign * values, rank)[rank])
    if signal == "confidence":
        value = min(value, math.nextafter(1.0, 0.0))  # where nearly all tokens have a confidence of exactly 1
    divides = int((sign * values < sign * value).sum())
    if rank == 0:
        raise DataError(
            f"the pool has {count} tokens, too few for a quantile of {quantile}: sample at least "
            f"{math.ceil(1 / quantile)} tokens, better a hundred times as many"
        )
    if divides == 0:
        raise DataError(
            f"at the {quantile} quantile of the {signal} many of the {count} tokens tie at {value:.6g}, and no token "
            "would divide: were the responses drawn greedily and their log-probabilities under the sampling "
            "distribution taken? Use raw_logprobs, or another quantile"
        )
    return value, divides / count


def _threshold_segmenter(signal: Signal, argument: str) -> AdaptiveStepSegmenter | EntropySegmenter:
    """Segmenter from the FILE_OR_NUMBER of a recipe."""
    kind = _SEGMENTERS[signal]
    if not Path(argument).is_file():
        return kind(_number(kind.name, argument, ", or a threshold.json of a labelling job, and there is no such file"))
    threshold = SegmentThreshold.load(argument)
    if threshold.signal != signal:
        raise ConfigError(
            f"segmenter '{kind.name}:{argument}': the file holds a threshold on {threshold.signal}; write "
            f"{_SEGMENTERS[threshold.signal].name}:{argument}, or fit one with signal={signal!r}"
        )
    return threshold.segmenter()


def _number(name: str, argument: str, alternative: str = "") -> float:
    try:
        return float(argument)
    except ValueError:
        raise ConfigError(f"segmenter '{name}:{argument}' needs a number as threshold{alternative}") from None


SIGNAL_SEGMENTERS: dict[str, Callable[[str], AdaptiveStepSegmenter | EntropySegmenter | RejectSegmenter]] = {
    "adaptive_step": lambda argument: _threshold_segmenter("confidence", argument),
    "entropy": lambda argument: _threshold_segmenter("entropy", argument),
    "reject": lambda argument: RejectSegmenter(_number("reject", argument or "0.3")),
}
"""Segmenters that read per-token signals, by name; each is made from what stands behind the colon."""
