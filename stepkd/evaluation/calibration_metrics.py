"""Do probabilities mean what they say? ECE, reliability bins, Brier score and skill, over-confidence.

For step scores, outcome scores and a model's own P(True). On imbalanced labels the Brier skill tells a scorer that
is no better than its base rate (standard definitions; core-methods 5, card KalshiBench, arXiv 2512.16030). Intervals
resample problems.

torchmetrics' ``binary_calibration_error`` agrees on the value where no probability lies on the edge of a bin. It was
tried and is not used: it puts 0.3 below the edge 3/10 (an error of 0.525 in place of 0.175 on four scores), has no bins
of equal mass, and gives one number, not the sums per problem that an interval needs.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Unpack, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepkd.errors import ConfigError, DataError, check_choice
from stepkd.scorers.calibration import checked_labels
from stepkd.statistics import (
    FloatArray,
    Interval,
    Resampling,
    cluster_bootstrap,
    cluster_sums,
    plain_dict,
    proper_width,
    ratio_interval,
    ratio_of_sums,
)

Binning = Literal["width", "mass"]
"""Bins of equal width on [0, 1], or of about equal count (equal probabilities stay together)."""
COIN_BRIER = 0.25
"""Brier score of answering 0.5 always."""


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin of the reliability diagram."""

    low: float
    """Lower edge, included."""
    high: float
    """Upper edge, excluded; included in the last bin."""
    count: int
    """Probabilities in the bin."""
    confidence: float | None
    """Their mean; None when the bin is empty."""
    accuracy: float | None
    """Share of positive labels among them; None when the bin is empty."""


@dataclass(frozen=True)
class CalibrationReport:
    """Calibration of probabilities against 0/1 labels."""

    ece: Interval
    """Expected calibration error, sum over bins of count/n * |accuracy - confidence|; biased upward in small samples,
    and its interval with it."""
    brier: Interval
    """Mean of (p - y)^2; 0 is perfect."""
    brier_base_rate: float
    """Brier score of answering the base rate always: ybar (1 - ybar)."""
    skill_base_rate: Interval | None
    """1 - brier / brier_base_rate: above 0 only if better than the base rate of these very labels."""
    skill_coin: Interval
    """1 - brier / 0.25: against answering 0.5 always."""
    base_rate: float
    """Share of positive labels."""
    over_confidence: Mapping[float, Interval | None]
    """c -> share of negative labels among probabilities >= c."""
    bins: tuple[ReliabilityBin, ...]
    """The reliability diagram."""
    binning: Binning
    """How the bins were made."""
    n: int
    """Probabilities."""
    problems: int
    """Problems they come from."""
    undefined: Mapping[str, str]
    """Name of a value that is None -> why."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON."""
        result = plain_dict(self) | {"brier_coin": COIN_BRIER}
        result["over_confidence"] = {f"{c:g}": rate for c, rate in result["over_confidence"].items()}
        return result


def reliability_bins(
    probabilities: ArrayLike, labels: ArrayLike, *, bins: int = 10, binning: Binning = "width"
) -> tuple[ReliabilityBin, ...]:
    """Bins of the reliability diagram.

    Args:
        probabilities: (n,) numbers in [0, 1].
        labels: (n,) 0 or 1.
        bins: number of bins, at least 1; with ``mass`` there are fewer when many probabilities are equal.
        binning: ``width`` or ``mass``.

    Raises:
        DataError: no data, different lengths, a missing or impossible probability, another label.
        ConfigError: no bins, or an unknown binning.
    """
    p, y = checked_labels(probabilities, labels)
    edges, place = _place(p, bins, binning)
    result = []
    for index, (low, high) in enumerate(pairwise(edges)):
        inside = place == index
        count = int(inside.sum())
        confidence, accuracy = (float(p[inside].mean()), float(y[inside].mean())) if count else (None, None)
        result.append(ReliabilityBin(float(low), float(high), count, confidence, accuracy))
    return tuple(result)


def calibration_report(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    problems: Sequence[Hashable] | NDArray[np.int64] | None = None,
    bins: int = 10,
    binning: Binning = "width",
    confident: Sequence[float] = (0.8, 0.9),
    **settings: Unpack[Resampling],
) -> CalibrationReport:
    """All calibration metrics of a set, with intervals.

    Args:
        probabilities: (n,) numbers in [0, 1], none missing.
        labels: (n,) 0 or 1 (bool).
        problems: (n,) id of the problem each comes from; None when each comes from another one.
        bins, binning: as in :func:`reliability_bins`; the bins stay fixed under resampling.
        confident: the values c of the over-confidence rate, each in [0, 1].
        **settings: see :class:`~stepkd.statistics.Resampling`.

    Returns:
        The report; bounds are NaN where every resample gives the same value.

    Raises:
        DataError: as in :func:`reliability_bins`, or another number of problem ids.
        ConfigError: settings out of range.
    """
    p, y = checked_labels(probabilities, labels)
    owners = range(p.size) if problems is None else problems
    if len(owners) != p.size:
        raise DataError(f"{len(owners)} problem ids for {p.size} probabilities: give one for each")
    for c in confident:
        if not 0.0 <= c <= 1.0:
            raise ConfigError(f"confidence {c!r} of the over-confidence rate must lie in [0, 1]")
    edges, place = _place(p, bins, binning)
    gaps = np.zeros((p.size, edges.size))
    gaps[np.arange(p.size), place] = y - p
    gaps[:, -1] = 1.0  # the last column counts
    squares = cluster_sums(np.stack([(p - y) ** 2, np.ones_like(p), y], axis=1), owners)
    brier = proper_width(cluster_bootstrap(squares[:, :2], ratio_of_sums, **settings))
    coin = 1 - brier.value / COIN_BRIER, 1 - brier.high / COIN_BRIER, 1 - brier.low / COIN_BRIER
    base_rate = float(y.mean())
    undefined, skill = {}, None
    if 0.0 < base_rate < 1.0:
        skill = proper_width(cluster_bootstrap(squares, _skill, **settings))
    else:
        undefined["skill_base_rate"] = f"all {y.size} labels are {int(base_rate)}: the base rate makes no error"
    over: dict[float, Interval | None] = {}
    for c in confident:
        sure = p >= c
        over[c] = None
        if sure.any():
            sums = cluster_sums(np.stack([sure & (y == 0), sure], axis=1), owners)
            over[c] = ratio_interval(sums[:, 0], sums[:, 1], **settings)
        else:
            undefined[f"over_confidence at {c:g}"] = f"no probability is {c:g} or more"
    return CalibrationReport(
        ece=proper_width(cluster_bootstrap(cluster_sums(gaps, owners), _ece, **settings)),
        brier=brier,
        brier_base_rate=base_rate * (1 - base_rate),
        skill_base_rate=skill,
        skill_coin=Interval(*coin, brier.method, brier.level),
        base_rate=base_rate,
        over_confidence=over,
        bins=reliability_bins(p, y, bins=bins, binning=binning),
        binning=binning,
        n=int(p.size),
        problems=len(squares),
        undefined=undefined,
    )


def _ece(resampled: FloatArray) -> FloatArray:
    """Columns: per bin the sum of label - probability, last the count."""
    sums = resampled.sum(axis=1)
    return np.asarray(np.abs(sums[:, :-1]).sum(axis=1) / sums[:, -1], dtype=np.float64)


def _skill(resampled: FloatArray) -> FloatArray:
    """Columns: sum of squares, count, sum of labels; NaN where a resample has labels of one kind only."""
    sums = resampled.sum(axis=1)
    rate = sums[:, 2] / sums[:, 1]
    # Counts are compared, not the rate: a mean of equal labels is exact only by luck of the division.
    mixed = (sums[:, 2] > 0) & (sums[:, 2] < sums[:, 1])
    reference = np.where(mixed, rate * (1 - rate), np.nan)
    return np.asarray(1.0 - sums[:, 0] / sums[:, 1] / reference, dtype=np.float64)


def _place(p: FloatArray, bins: int, binning: Binning) -> tuple[FloatArray, NDArray[np.int64]]:
    """Edges of the bins, and the bin of every probability."""
    check_choice("binning", binning, get_args(Binning))
    if bins < 1:
        raise ConfigError(f"bins={bins} must be at least 1")
    if binning == "width":
        inner = np.arange(1, bins) / bins  # not linspace: 3/10 is the float a score of 0.3 is
    else:
        starts = [part[0] for part in np.array_split(np.sort(p), min(bins, p.size))[1:]]
        # A bin may not begin at the lowest value: nothing would be left for the one before it.
        inner = np.unique([start for start in starts if start > p.min()])
    place = np.searchsorted(inner, p, side="right")
    return np.concatenate([[0.0], inner, [1.0]]), place.astype(np.int64)
