"""Thresholds for confidence-based segmenters: computed once from a pool of responses, kept in a file, and reused.

A threshold belongs to the model and the sampling settings it was computed from. The file says which, so that labels,
training and search cut alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stepkd.errors import ConfigError, DataError, check_choice
from stepkd.steps.confidence import ROUNDING, AdaptiveStepSegmenter, EntropySegmenter, RejectSegmenter

Signal = Literal["confidence", "entropy"]

_FORMAT = "stepkd segment threshold"
_VERSION = 1
_SEGMENTERS: dict[str, type[AdaptiveStepSegmenter | EntropySegmenter]] = {
    "confidence": AdaptiveStepSegmenter,
    "entropy": EntropySegmenter,
}


@dataclass(frozen=True)
class SegmentThreshold:
    """A threshold and where it came from."""

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
        """The segmenter that cuts at this threshold."""
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
    responses = [_check_response(response, number, signal) for number, response in enumerate(pool)]
    values = np.concatenate([*responses, np.empty(0)])
    if not len(values):
        raise DataError("the pool has no tokens: sample some responses first")
    if signal == "confidence":  # math.exp, as in the segmenter: NumPy's may differ in the last bit
        values = np.array([math.exp(each) for each in values.tolist()])
    value, share = _exact_quantile(values, quantile, signal)
    used = sum(len(response) > 0 for response in responses)
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


def _check_response(response: Sequence[float], number: int, signal: str) -> np.ndarray:
    try:
        numbers = np.asarray(response, dtype="<f8").reshape(len(response))
    except (TypeError, ValueError) as error:
        raise DataError(f"response {number} of the pool must be a list with one number per token: {error}") from error
    sign = 1 if signal == "confidence" else -1
    incorrect = np.flatnonzero(~(sign * numbers <= ROUNDING))
    if len(incorrect):
        kind = "a log-probability (nats, at most 0)" if sign > 0 else "an entropy (nats, at least 0)"
        raise DataError(
            f"response {number} of the pool holds {numbers[incorrect[0]]} at token {incorrect[0]}: not {kind}"
        )
    return numbers


def _threshold_segmenter(signal: Signal, argument: str) -> AdaptiveStepSegmenter | EntropySegmenter:
    """Segmenter from the FILE_OR_NUMBER of a recipe."""
    kind = _SEGMENTERS[signal]
    if not Path(argument).is_file():
        what = "or the threshold.json of a labelling job that fitted one, and there is no such file"
        return kind(_number(kind.name, argument, f"{kind.name}:{kind.example}", what))
    threshold = SegmentThreshold.load(argument)
    if threshold.signal != signal:
        raise ConfigError(
            f"segmenter '{kind.name}:{argument}': the file holds a threshold on {threshold.signal}; write "
            f"{_SEGMENTERS[threshold.signal].name}:{argument}, or fit one with signal={signal!r}"
        )
    return threshold.segmenter()


def _number(name: str, argument: str, example: str, alternative: str = "") -> float:
    try:
        return float(argument)
    except ValueError:
        what = f"segmenter '{name}:{argument}' needs a number as threshold"
        raise ConfigError(f"{what}, such as {example}{alternative and ', ' + alternative}") from None


SIGNAL_SEGMENTERS: dict[str, Callable[[str], AdaptiveStepSegmenter | EntropySegmenter | RejectSegmenter]] = {
    "adaptive_step": lambda argument: _threshold_segmenter("confidence", argument),
    "entropy": lambda argument: _threshold_segmenter("entropy", argument),
    "reject": lambda argument: RejectSegmenter(_number("reject", argument or "0.3", "reject:0.3")),
}
"""Segmenters that read per-token signals, by name; each is made from what stands behind the colon."""
