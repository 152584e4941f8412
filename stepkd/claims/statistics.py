"""Intervals over few seeds with many problems each.

Two sources of chance: the seed (data, weights, sampling) and the problems drawn for it. Two intervals are computed, and
the one that decides reaches from the lower of their low ends to the higher of their high ends:

* Student's t over the per-seed values. It is right for few seeds, where resampling 3 to 5 seeds gives an interval that
  is too narrow (by sqrt((n-1)/n) * 1.96 / t, 0.63 for five seeds). But when the few seeds happen to agree, it shrinks
  to less than the problems alone would allow.
* The two-level bootstrap: seeds with replacement, then problems with replacement within each of them. It keeps the
  problems' share when the seeds agree.

Arms are paired by seed and by problem: both are resampled together. One seed gives no interval.

Axis names: S seeds, P problems, K ratios whose mean is the metric, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepkd.errors import ConfigError
from stepkd.evaluation.intervals import RESAMPLE_ELEMENTS, FloatArray, Interval, check_level, wilson_interval
from stepkd.randomness import generator

RESAMPLES = 4_000
"""Resamples of the two-level bootstrap."""


@dataclass(frozen=True)
class Estimate:
    """A number with its intervals."""

    per_seed: tuple[float, ...]
    """Value of each seed, in the seeds' order; NaN where it is undefined (a ratio without wholes)."""
    seeds: Interval
    """Student's t over seeds (Fieller's for a ratio of means, t over the logarithms for a mean of ratios)."""
    problems: Interval
    """Two-level bootstrap over seeds and problems."""
    decides: Interval
    """The interval that decides: both of them together; NaN when the t interval is undefined."""

    @property
    def value(self) -> float:
        """Mean over seeds; for two arms their ratio of means, or the geometric mean of the seeds' ratios."""
        return self.decides.value


def student_t_quantile(probability: float, df: int) -> float:
    """Quantile of Student's t with a whole number of degrees of freedom.

    The distribution function is the finite sum of Abramowitz & Stegun 26.7.3 and 26.7.4, inverted by bisection.

    Args:
        probability: in [0.5, 1).
        df: degrees of freedom, at least 1.
    """
    assert 0.5 <= probability < 1
    assert df >= 1
    low, high = 0.0, math.pi / 2
    for _ in range(200):
        angle = (low + high) / 2
        if _central_t(angle, df) < 2 * probability - 1:
            low = angle
        else:
            high = angle
    return math.sqrt(df) * math.tan((low + high) / 2)


def _central_t(angle: float, df: int) -> float:
    """P(|T| < sqrt(df) tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(df // 2):
        if k:
            term *= cosine * cosine * (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_interval(values_S: Sequence[float] | FloatArray, level: float = 0.95) -> Interval:
    """Mean over seeds with Student's t interval; NaN bounds for a single seed or an undefined value."""
    check_level(level)
    values = np.asarray(values_S, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2 or math.isnan(mean):
        return Interval(mean, math.nan, math.nan, "t", level)
    half = student_t_quantile((1 + level) / 2, len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, "t", level)


def fieller_interval(
    top_S: Sequence[float] | FloatArray, bottom_S: Sequence[float] | FloatArray, level: float = 0.95
) -> Interval:
    """Ratio of two means over paired seeds, with Fieller's interval (Fieller 1954).

    It holds exactly the ratios r for which Student's t over the seeds' ``top - r * bottom`` does not exclude 0.

    Args:
        top_S, bottom_S: values of the two arms, in the same order of seeds.
        level: confidence level in (0, 1).

    Returns:
        Interval; NaN bounds for a single seed, an undefined value, or a bottom whose own interval reaches 0 (then every
        ratio beyond some value is possible).
    """
    check_level(level)
    top, bottom = np.asarray(top_S, dtype=np.float64), np.asarray(bottom_S, dtype=np.float64)
    mean_top, mean_bottom = float(top.mean()), float(bottom.mean())
    value = mean_top / mean_bottom if mean_bottom else math.nan
    undefined = Interval(value, math.nan, math.nan, "fieller", level)
    if len(top) < 2 or math.isnan(value):
        return undefined
    covariance = np.cov(top, bottom, ddof=1) / len(top)
    t2 = student_t_quantile((1 + level) / 2, len(top) - 1) ** 2
    a = mean_bottom**2 - t2 * covariance[1, 1]
    b = mean_top * mean_bottom - t2 * covariance[0, 1]
    c = mean_top**2 - t2 * covariance[0, 0]
    if a <= 0:
        return undefined
    root = math.sqrt(max(0.0, b * b - a * c))
    return Interval(value, float((b - root) / a), float((b + root) / a), "fieller", level)


def estimate_mean(arrays: Sequence[FloatArray], *, level: float = 0.95, n_resamples: int = RESAMPLES) -> Estimate:
    """A metric of one arm.

    When every problem of every seed has the same share, both intervals have zero width; Wilson's, with one trial per
    problem, decides in their place.

    Args:
        arrays: per seed (P, K, 2), see :func:`stepkd.claims.experiment.value_array`.
        level: confidence level in (0, 1).
        n_resamples: resamples of the bootstrap.
    """
    values_S = np.array([_values(array.sum(axis=0)[None])[0] for array in arrays])
    seeds = t_interval(values_S, level)
    resampled_RS = _resample(arrays, n_resamples)
    problems = _percentiles(float(values_S.mean()), resampled_RS.mean(axis=1), level)
    decides = _together(seeds, problems)
    if decides.low == decides.high and (wilson := _constant_share(arrays, level)) is not None:
        decides = wilson
    return Estimate(_floats(values_S), seeds, problems, decides)


def estimate_difference(
    better: Sequence[FloatArray], worse: Sequence[FloatArray], *, level: float = 0.95, n_resamples: int = RESAMPLES
) -> Estimate:
    """``better - worse``, paired by seed and problem; arguments as in :func:`estimate_mean`, seed by seed.

    When every problem has the same share in either arm (all right against all right), Newcombe's interval decides.
    """
    first_S, second_S, first_RS, second_RS = _pair(better, worse, n_resamples)
    difference_S = first_S - second_S
    seeds = t_interval(difference_S, level)
    problems = _percentiles(seeds.value, (first_RS - second_RS).mean(axis=1), level)
    decides = _together(seeds, problems)
    if decides.low == decides.high:
        first, second = _constant_share(better, level), _constant_share(worse, level)
        if first is not None and second is not None:
            decides = _newcombe(first, second)
    return Estimate(_floats(difference_S), seeds, problems, decides)


def estimate_ratio(
    better: Sequence[FloatArray], worse: Sequence[FloatArray], *, level: float = 0.95, n_resamples: int = RESAMPLES
) -> Estimate:
    """``better / worse``, the ratio of the means over seeds; arguments as in :func:`estimate_difference`."""
    top_S, bottom_S, top_RS, bottom_RS = _pair(better, worse, n_resamples)
    seeds = fieller_interval(top_S, bottom_S, level)
    problems = _percentiles(seeds.value, _divide(top_RS.mean(axis=1), bottom_RS.mean(axis=1)), level)
    return Estimate(_floats(_divide(top_S, bottom_S)), seeds, problems, _together(seeds, problems))


def estimate_seed_ratio(
    better: Sequence[FloatArray], worse: Sequence[FloatArray], *, level: float = 0.95, n_resamples: int = RESAMPLES
) -> Estimate:
    """Geometric mean over seeds of ``better / worse`` in that seed; arguments as in :func:`estimate_difference`.

    Every seed weighs the same however large its shares are, which suits seeds of very different difficulty. Student's t
    is taken over the logarithms; where a seed's share is 0 there is none, and the interval is undefined.
    """
    top_S, bottom_S, top_RS, bottom_RS = _pair(better, worse, n_resamples)
    ratio_S = _divide(top_S, bottom_S)
    value = float(_geometric_mean(ratio_S[None])[0])
    seeds = Interval(value, math.nan, math.nan, "log t", level)
    if (ratio_S > 0).all():
        log = t_interval(np.log(ratio_S), level)
        seeds = Interval(value, math.exp(log.low), math.exp(log.high), "log t", level)
    problems = _percentiles(value, _geometric_mean(_divide(top_RS, bottom_RS)), level)
    return Estimate(_floats(ratio_S), seeds, problems, _together(seeds, problems))


def _geometric_mean(ratios: FloatArray) -> FloatArray:
    """Over the last axis: 0 where a ratio is 0, NaN where one is undefined or negative."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.exp(np.log(ratios).mean(axis=-1)), dtype=np.float64)


def _pair(
    better: Sequence[FloatArray], worse: Sequence[FloatArray], n_resamples: int
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Per-seed values of both arms and their resamples, in which both arms have the same problems."""
    if [len(array) for array in better] != [len(array) for array in worse]:
        raise ConfigError("arms are paired by seed and problem, so both need the same numbers of problems per seed")
    ratios = better[0].shape[1]
    joined = [np.concatenate(pair, axis=1) for pair in zip(better, worse, strict=True)]
    sums_S = np.stack([array.sum(axis=0) for array in joined])
    slots_RSK2 = _resample_sums(joined, n_resamples)
    halves = (slice(None, ratios), slice(ratios, None))
    first_S, second_S = (_values(sums_S[:, half]) for half in halves)
    first_RS, second_RS = (_values(slots_RSK2[:, :, half]) for half in halves)
    return first_S, second_S, first_RS, second_RS


def _values(sums: FloatArray) -> FloatArray:
    """Mean over ratios of part / whole: (..., K, 2) -> (...); NaN where a whole is 0."""
    return np.asarray(_divide(sums[..., 0], sums[..., 1]).mean(axis=-1), dtype=np.float64)


def _divide(top: FloatArray, bottom: FloatArray) -> FloatArray:
    result = np.full(np.shape(top), np.nan)
    np.divide(top, bottom, out=result, where=bottom != 0)
    return result


def _resample(arrays: Sequence[FloatArray], n_resamples: int) -> FloatArray:
    """Values of the resampled seeds, (R, S)."""
    return _values(_resample_sums(arrays, n_resamples))


def _resample_sums(arrays: Sequence[FloatArray], n_resamples: int) -> FloatArray:
    """Seeds with replacement, then problems within each: sums over problems, (R, S, K, 2)."""
    rng = generator(0, "claim bootstrap")
    seeds = len(arrays)
    picked_RS = rng.integers(seeds, size=(n_resamples, seeds))
    sums = np.empty((n_resamples, seeds, *arrays[0].shape[1:]))
    for seed, array in enumerate(arrays):
        places = np.argwhere(picked_RS == seed)
        step = max(1, RESAMPLE_ELEMENTS // array.size)
        for start in range(0, len(places), step):
            rows, columns = places[start : start + step].T
            drawn = rng.integers(len(array), size=(len(rows), len(array)))
            sums[rows, columns] = array[drawn].sum(axis=1)
    return sums


def _percentiles(value: float, resampled_R: FloatArray, level: float) -> Interval:
    """Percentile interval; resamples without a denominator are left out."""
    kept = resampled_R[~np.isnan(resampled_R)]
    if math.isnan(value) or not kept.size:
        return Interval(value, math.nan, math.nan, "bootstrap", level)
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), "bootstrap", level)


def _together(seeds: Interval, problems: Interval) -> Interval:
    """From the lower low end to the higher high end; undefined when the interval over seeds is."""
    method = f"{seeds.method}+bootstrap"
    if math.isnan(seeds.low) or math.isnan(problems.low):
        return Interval(seeds.value, math.nan, math.nan, method, seeds.level)
    return Interval(seeds.value, min(seeds.low, problems.low), max(seeds.high, problems.high), method, seeds.level)


def _constant_share(arrays: Sequence[FloatArray], level: float) -> Interval | None:
    """Wilson's interval, one trial per problem, of a share in [0, 1] that is the same for every problem; else None."""
    joined = np.concatenate(arrays)
    one_number_per_seed = len(joined) == len(arrays)
    if one_number_per_seed or joined.shape[1] != 1:
        return None
    parts, wholes = joined[joined[..., 1] > 0].T
    shares = parts / wholes
    if not shares.size or not 0 <= shares[0] <= 1 or (shares != shares[0]).any():
        return None
    return wilson_interval(float(shares[0]) * shares.size, shares.size, level)


def _newcombe(first: Interval, second: Interval) -> Interval:
    """Difference of two shares from their Wilson intervals (Newcombe 1998, method 10)."""
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Interval(value, low, high, "newcombe", first.level)


def _floats(values: FloatArray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
