"""Intervals and paired tests: shares and means over problems, and metrics over few seeds with many problems each.

Problems are the unit of resampling everywhere: the samples of one problem are not independent of each other.
An undefined bound (one problem says nothing about the spread between problems) is NaN in Python and null in JSON.

Over seeds there are two sources of chance: the seed (data, weights, sampling) and the problems drawn for it. Two
intervals are computed, and the one that decides reaches from the lower of their low ends to the higher of their high
ends:

* Student's t over the per-seed values. It is correct for few seeds, where resampling 3 to 5 seeds gives an interval
  that is too narrow (by sqrt((n-1)/n) * 1.96 / t, 0.63 for five seeds). But when the few seeds happen to agree, it
  shrinks to less than the problems alone would allow.
* The two-level bootstrap: seeds with replacement, then problems with replacement within each of them. It keeps the
  problems' share when the seeds agree.

Arms are paired by seed and by problem: both are resampled together. One seed gives no interval.

Axis names: S seeds, P problems, K ratios whose mean is the metric, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any, TypeAlias, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepkd.errors import ConfigError

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]
Statistic: TypeAlias = Callable[[FloatArray], FloatArray]

RESAMPLE_ELEMENTS = 1 << 20
"""Most resampled numbers held at once by the bootstrap (8 MiB); does not change what is drawn."""
LEVEL = 0.95
"""Confidence level of every interval."""
RESAMPLES = 4_000
"""Resamples of the two-level bootstrap."""
_TWO_LEVEL_KEY = 0xA7E3343419947C6471CC11BFFD4DCEF1
"""Key of what the two-level bootstrap draws: a claim's rows give the same numbers again."""


class Resampling(TypedDict, total=False):
    """Settings of an interval, passed on as keywords; each has the default that :func:`cluster_bootstrap` gives it."""

    n_resamples: int
    """Number of resamples, at least 1."""
    seed: int
    """Seed of the resampling; equal seeds and problem counts draw the same problems."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% confidence interval, in the unit of the estimate (shares lie in [0, 1], not in percent).

    ``str()`` of it is ``0.930 [0.886, 0.958]``; without bounds, which are NaN then, ``0.930 [no interval]``.
    """

    value: float
    """Point estimate."""
    low: float
    """Lower bound; NaN when undefined."""
    high: float
    """Upper bound; NaN when undefined."""
    method: str
    """How it was computed: ``wilson``, ``bootstrap``, ``t``, ``fieller``, ``log t``, ``newcombe``, ``mover``, or two of
    them."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON.

        Returns:
            ``value``, ``low`` and ``high`` as numbers, None in place of NaN, and ``method``.
        """
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {key: (None if math.isnan(x) else float(x)) for key, x in numbers.items()} | {"method": self.method}

    def __str__(self) -> str:
        return self.text(".3f")

    def text(self, number: str) -> str:
        """The interval as text.

        Args:
            number: format of the numbers, such as ``.3f``, or ``+.3f`` for a difference.

        Returns:
            ``value [low, high]``; ``value [no interval]`` when it is undefined.
        """
        if math.isnan(self.low):
            return f"{self.value:{number}} [no interval]"
        return f"{self.value:{number}} [{self.low:{number}}, {self.high:{number}}]"


class Result:
    """Base of results: dataclasses of numbers, intervals, and other results."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON: the fields, intervals as :meth:`Interval.to_dict` gives them."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if isinstance(value, Interval | Result):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def shown(
    figure: Mapping[str, Any] | float | None, number: str = ".3f", *, scale: float = 1.0, gap: str | None = " "
) -> str:
    """A number as text, with its interval behind the gap where it has one: ``0.930 (0.886 to 0.958)``.

    Args:
        figure: a number, or :meth:`Interval.to_dict`; without a value it is a dash.
        number: format of the numbers.
        scale: factor on them.
        gap: what stands before the interval; None leaves it out, as where its bounds are equal.

    Returns:
        The text; the number alone where a bound is missing.
    """
    interval = figure if isinstance(figure, Mapping) else {"value": figure, "low": None, "high": None}
    if interval["value"] is None:
        return "-"
    value = f"{scale * interval['value']:{number}}"
    if gap is None or interval["low"] is None or interval["high"] is None or interval["low"] == interval["high"]:
        return value
    return f"{value}{gap}({scale * interval['low']:{number}} to {scale * interval['high']:{number}})"


def percent(figure: Mapping[str, Any] | float | None, gap: str | None = " ") -> str:
    """A share in percent with one decimal: ``93.0 (88.6 to 95.8)``, without a percent sign.

    Args:
        figure: a share in [0, 1], or :meth:`Interval.to_dict` of one; without a value it is a dash.
        gap: what stands before the interval; None leaves it out.
    """
    return shown(figure, ".1f", scale=100.0, gap=gap)


# --- shares and means over problems -----------------------------------------------------------------------------------


def wilson_interval(successes: float, n: int) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927).

    It equals ``scipy.stats.binomtest(successes, n).proportion_ci(0.95, "wilson")``, which refuses fractions.

    Args:
        successes: number of successes in [0, n]; a fraction is allowed.
        n: number of trials, at least 1.

    Returns:
        Interval within [0, 1].

    Raises:
        ConfigError: no trials, or successes outside [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise ConfigError(f"a proportion needs n >= 1 and 0 <= successes <= n, got successes={successes}, n={n}")
    z2 = NormalDist().inv_cdf((1.0 + LEVEL) / 2.0) ** 2
    p = successes / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At the ends the formula gives exactly 0 and 1; rounding must not.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(p, low, high, "wilson")


def ratio_of_sums(resampled: FloatArray) -> FloatArray:
    """Sum of column 0 over sum of column 1, as a statistic of :func:`cluster_bootstrap`.

    Args:
        resampled: (resamples, problems, 2) numbers: parts and wholes of each problem.

    Returns:
        (resamples,) ratios; NaN where the sum of column 1 is 0.
    """
    top, bottom = resampled.sum(axis=1).T
    return _divide(top, bottom)


def balanced_accuracy(resampled: FloatArray) -> FloatArray:
    """The mean of two shares, as a statistic of :func:`cluster_bootstrap`.

    Args:
        resampled: (resamples, problems, 4) counts of each problem: hits among correct steps, correct steps, hits among
            incorrect steps, incorrect steps.

    Returns:
        (resamples,) means of both hit rates, in [0, 1]; NaN where there are no correct or no incorrect steps.
    """
    hits, correct, hits_too, incorrect = resampled.sum(axis=1).T
    return (_divide(hits, correct) + _divide(hits_too, incorrect)) / 2


def cluster_bootstrap(
    per_problem: ArrayLike,
    statistic: Statistic = lambda resampled: resampled.mean(axis=1),
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap that resamples whole problems (Efron & Tibshirani 1993, ch. 13).

    ``scipy.stats.bootstrap`` draws the same and is as fast, but its bounds are NaN as soon as one resample has no
    denominator, and it takes rows of several columns only by way of their indices.

    Args:
        per_problem: (problems,) or (problems, columns) finite numbers, one row per problem.
        statistic: maps (resamples, problems[, columns]) to (resamples,); the mean, or :func:`ratio_of_sums`.
        n_resamples, seed: see :class:`Resampling`.

    Returns:
        Interval; bounds are NaN for a single problem. Resamples where the statistic is NaN (a ratio without
        denominator) are left out.

    Raises:
        ConfigError: no problems, a non-finite value, or settings out of range.
    """
    if n_resamples < 1:
        raise ConfigError(f"n_resamples={n_resamples} must be at least 1")
    values = np.asarray(per_problem, dtype=np.float64)
    if values.ndim not in (1, 2) or values.shape[0] == 0:
        raise ConfigError(f"the bootstrap needs one row per problem and at least one, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ConfigError("the bootstrap needs finite values; leave problems without a value out")
    problems = values.shape[0]
    estimate = float(statistic(values[None])[0])
    if problems == 1 or math.isnan(estimate):
        return Interval(estimate, math.nan, math.nan, "bootstrap")
    rng = np.random.default_rng(seed)
    chunk = max(1, RESAMPLE_ELEMENTS // values.size)
    drawn = [
        statistic(values[rng.integers(problems, size=(min(chunk, n_resamples - start), problems))])
        for start in range(0, n_resamples, chunk)
    ]
    return _percentiles(estimate, np.concatenate(drawn))


def _percentiles(value: float, drawn_R: FloatArray) -> Interval:
    """Percentile interval; resamples without a denominator are left out."""
    kept = drawn_R[~np.isnan(drawn_R)]
    low, high = math.nan, math.nan
    if kept.size and not math.isnan(value):
        low, high = map(float, np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Interval(value, low, high, "bootstrap")


def proper_width(interval: Interval) -> Interval:
    """The interval, without bounds when every resample gave the same value: that is no certainty.

    Args:
        interval: from :func:`cluster_bootstrap`, or any other.

    Returns:
        The interval itself where ``low < high``; else one with the same value and method, and NaN bounds.
    """
    if interval.low < interval.high:
        return interval
    return Interval(interval.value, math.nan, math.nan, interval.method)


def mean_interval(per_problem: ArrayLike, **settings: Unpack[Resampling]) -> Interval:
    """Mean of per-problem rates with the interval that fits them.

    Wilson when every value is 0 or 1 (one outcome per problem). Otherwise the cluster bootstrap, except when all
    values are equal: there it would have zero width, so Wilson with one trial per problem, which is wider, is given.

    Args:
        per_problem: (problems,) rates in [0, 1].
        **settings: see :class:`Resampling`.

    Returns:
        Interval within [0, 1].

    Raises:
        ConfigError: no problems, or a value outside [0, 1].
    """
    values = np.asarray(per_problem, dtype=np.float64)
    if np.isin(values, (0, 1)).all():
        return wilson_interval(float(values.sum()), values.size)
    return ratio_interval(values, np.ones_like(values), **settings)


def ratio_interval(top: ArrayLike, bottom: ArrayLike, **settings: Unpack[Resampling]) -> Interval:
    """Share ``sum(top) / sum(bottom)`` of counts, with an interval that resamples both parts together by problem.

    When every problem with a denominator has the same share, the bootstrap would have zero width: Wilson with one
    trial per such problem, which is wider, is given.

    Args:
        top: (problems,) counts, 0 <= top <= bottom.
        bottom: (problems,) counts.
        **settings: see :class:`Resampling`.

    Returns:
        Interval; all NaN when no problem has a denominator.

    Raises:
        ConfigError: no problems, or counts out of range.
    """
    pairs = np.stack([np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)], axis=-1)
    if not ((pairs[..., 0] >= 0) & (pairs[..., 0] <= pairs[..., 1])).all():
        raise ConfigError("shares lie in [0, 1]: every problem needs 0 <= top <= bottom")
    if (same := _one_share(pairs)) is not None:
        return wilson_interval(*same)
    return cluster_bootstrap(pairs, ratio_of_sums, **settings)


def _one_share(pairs: FloatArray) -> tuple[float, int] | None:
    """Successes and trials, one trial per (part, whole) with a whole, if all of these are the same share; else None."""
    parts, wholes = pairs[pairs[:, 1] > 0].T
    shares = parts / wholes
    return (float(shares[0]) * shares.size, shares.size) if shares.size and (shares == shares[0]).all() else None


def cluster_sums(columns: ArrayLike, problems: Sequence[Hashable] | IntArray) -> FloatArray:
    """Sum rows by problem, for a statistic whose unit is the problem.

    Args:
        columns: (rows, columns) numbers.
        problems: (rows,) ids of the problem that each row belongs to; at least one.

    Returns:
        (problems, columns) sums, problems in the order in which their ids first occur.
    """
    values, owners = np.asarray(columns, dtype=np.float64), numbered(problems)
    sums = np.zeros((int(owners.max()) + 1, values.shape[1]))
    np.add.at(sums, owners, values)
    return sums


def numbered(problems: Sequence[Hashable] | IntArray) -> IntArray:
    """Ids of problems as numbers from 0, in the order in which the ids first occur.

    Args:
        problems: (rows,) ids; equal ids get equal numbers.

    Returns:
        (rows,) int64 numbers; ``["b", "a", "b"]`` gives 0, 1, 0.
    """
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(owner, len(number)) for owner in problems], dtype=np.int64)


# --- paired tests -----------------------------------------------------------------------------------------------------


def mcnemar_exact(b: int, c: int, *, mid_p: bool = False) -> float:
    """Two-sided exact McNemar test on the discordant pairs.

    Args:
        b: pairs where only the first run is correct.
        c: pairs where only the second run is correct.
        mid_p: give the less conservative mid-p value (Fagerland, Lydersen & Laake 2013).

    Returns:
        p value in (0, 1]; 1.0 when there is no discordant pair.
    """
    from scipy import stats

    if b + c == 0:
        return 1.0
    p = float(stats.binomtest(b, b + c).pvalue)
    # Half the weight of outcomes as likely as the observed one; at b == c there is only one such outcome.
    return p - float(stats.binom.pmf(b, b + c, 0.5)) * (0.5 if b == c else 1.0) if mid_p else p


# --- few seeds with many problems each --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A number over several seeds with its intervals; ``decides`` is the one that a verdict reads."""

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
        """Mean over seeds; for two arms their difference, their ratio of means, or the geometric mean of the seeds'
        ratios."""
        return self.decides.value


def t_interval(values_S: Sequence[float] | FloatArray) -> Interval:
    """Mean over seeds with Student's t interval (n - 1 degrees of freedom).

    Args:
        values_S: value of every seed, at least one.

    Returns:
        Interval; NaN bounds for a single seed or an undefined value.
    """
    values = np.asarray(values_S, dtype=np.float64)
    mean, half = float(values.mean()), math.nan
    if len(values) > 1 and not math.isnan(mean):
        half = _t_quantile(len(values)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, "t")


def _t_quantile(seeds: int) -> float:
    """Half the width of the interval that holds 95% of Student's t, in standard errors."""
    from scipy import stats

    return float(stats.t.ppf((1 + LEVEL) / 2, seeds - 1))


def fieller_interval(top_S: Sequence[float] | FloatArray, bottom_S: Sequence[float] | FloatArray) -> Interval:
    """Ratio of two means over paired seeds, with Fieller's interval (Fieller 1954).

    It holds exactly the ratios r for which Student's t over the seeds' ``top - r * bottom`` does not exclude 0.

    Args:
        top_S, bottom_S: values of the two arms, in the same order of seeds.

    Returns:
        Interval; NaN bounds for a single seed, an undefined value, or a bottom whose own interval reaches 0 (then every
        ratio beyond some value is possible).
    """
    top, bottom = np.asarray(top_S, dtype=np.float64), np.asarray(bottom_S, dtype=np.float64)
    mean_top, mean_bottom = float(top.mean()), float(bottom.mean())
    value = mean_top / mean_bottom if mean_bottom else math.nan
    undefined = Interval(value, math.nan, math.nan, "fieller")
    if len(top) < 2 or math.isnan(value):
        return undefined
    t2 = _t_quantile(len(top)) ** 2
    covariance = np.cov(top, bottom, ddof=1) / len(top)
    a = mean_bottom**2 - t2 * covariance[1, 1]
    b = mean_top * mean_bottom - t2 * covariance[0, 1]
    c = mean_top**2 - t2 * covariance[0, 0]
    if a <= 0:
        return undefined
    root = math.sqrt(max(0.0, b * b - a * c))
    return Interval(value, float((b - root) / a), float((b + root) / a), "fieller")


def estimate_mean(arrays: Sequence[FloatArray], *, n_resamples: int = RESAMPLES) -> Estimate:
    """A metric of one arm, with 95% intervals.

    When every problem of every seed has the same share, both intervals have zero width; Wilson's, with one trial per
    problem, decides in their place.

    Args:
        arrays: per seed (P, K, 2), see :func:`stepkd.claims.runner.value_array`.
        n_resamples: resamples of the bootstrap.

    Returns:
        The metric of every seed, Student's t interval over seeds, the two-level bootstrap, and what decides: from the
        lower of their low ends to the higher of their high ends.
    """
    values_S, values_RS = map(_values, _sums_and_resamples(arrays, n_resamples))
    return _estimate(values_S, t_interval(values_S), values_RS.mean(axis=1), _constant_share(arrays))


def estimate_difference(
    better: Sequence[FloatArray], worse: Sequence[FloatArray], *, n_resamples: int = RESAMPLES
) -> Estimate:
    """``better - worse``, paired by seed and problem.

    When every problem has the same share in either arm (all correct against all correct), Newcombe's interval decides.

    Args:
        better, worse: the two arms, per seed (P, K, 2) as in :func:`estimate_mean`; the same seeds and problems in
            both.
        n_resamples: resamples of the bootstrap, in which both arms have the same problems.

    Returns:
        The difference of every seed with its intervals, as in :func:`estimate_mean`.

    Raises:
        ConfigError: arms with different numbers of problems in a seed.
    """
    first_S, second_S, first_RS, second_RS = _pair(better, worse, n_resamples)
    first, second = _constant_share(better), _constant_share(worse)
    certain = _newcombe(first, second) if first and second else None
    difference_S = first_S - second_S
    return _estimate(difference_S, t_interval(difference_S), (first_RS - second_RS).mean(axis=1), certain)


def estimate_ratio(
    better: Sequence[FloatArray], worse: Sequence[FloatArray], *, n_resamples: int = RESAMPLES
) -> Estimate:
    """``better / worse``, the ratio of the means over seeds, with Fieller's interval in place of Student's t.

    Args:
        better, worse, n_resamples: as in :func:`estimate_difference`.

    Returns:
        The ratio in every seed (NaN where ``worse`` is 0) with its intervals, as in :func:`estimate_mean`.

    Raises:
        ConfigError: arms with different numbers of problems in a seed.
    """
    top_S, bottom_S, top_RS, bottom_RS = _pair(better, worse, n_resamples)
    resampled_R = _divide(top_RS.mean(axis=1), bottom_RS.mean(axis=1))
    return _estimate(_divide(top_S, bottom_S), fieller_interval(top_S, bottom_S), resampled_R)


def estimate_seed_ratio(
    better: Sequence[FloatArray], worse: Sequence[FloatArray], *, n_resamples: int = RESAMPLES
) -> Estimate:
    """Geometric mean over seeds of ``better / worse`` in that seed.

    Every seed weighs the same however large its shares are, which suits seeds of very different difficulty. Student's t
    is taken over the logarithms; where a seed's share is 0 there is none, and the interval is undefined.

    Args:
        better, worse, n_resamples: as in :func:`estimate_difference`.

    Returns:
        The ratio in every seed with its intervals, as in :func:`estimate_mean`.

    Raises:
        ConfigError: arms with different numbers of problems in a seed.
    """
    top_S, bottom_S, top_RS, bottom_RS = _pair(better, worse, n_resamples)
    ratio_S = _divide(top_S, bottom_S)
    value, low, high = float(_geometric_mean(ratio_S)), math.nan, math.nan
    if (ratio_S > 0).all():
        log = t_interval(np.log(ratio_S))
        low, high = math.exp(log.low), math.exp(log.high)
    return _estimate(
        ratio_S, Interval(value, low, high, "log t"), np.asarray(_geometric_mean(_divide(top_RS, bottom_RS)))
    )


def _estimate(
    per_seed_S: FloatArray, seeds: Interval, drawn_R: FloatArray, certain: Interval | None = None
) -> Estimate:
    """Both intervals together; ``certain`` decides where they have zero width."""
    problems = _percentiles(seeds.value, drawn_R)
    low, high = min(seeds.low, problems.low), max(seeds.high, problems.high)
    if math.isnan(seeds.low) or math.isnan(problems.low):
        low = high = math.nan
    decides = Interval(seeds.value, low, high, f"{seeds.method}+bootstrap")
    return Estimate(tuple(map(float, per_seed_S)), seeds, problems, certain if certain and low == high else decides)


def _geometric_mean(ratios: FloatArray) -> Any:
    """Over the last axis: 0 where a ratio is 0, NaN where one is undefined or negative."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.exp(np.log(ratios).mean(axis=-1))


def _pair(better: Sequence[FloatArray], worse: Sequence[FloatArray], n_resamples: int) -> list[FloatArray]:
    """Per-seed values of both arms (S,) and their resamples (R, S), in which both arms have the same problems."""
    if [len(array) for array in better] != [len(array) for array in worse]:
        raise ConfigError("arms are paired by seed and problem, so both need the same numbers of problems per seed")
    joined = [np.concatenate(pair, axis=1) for pair in zip(better, worse, strict=True)]
    ratios = better[0].shape[1]
    halves = (slice(None, ratios), slice(ratios, None))
    return [_values(sums[..., half, :]) for sums in _sums_and_resamples(joined, n_resamples) for half in halves]


def _values(sums: FloatArray) -> FloatArray:
    """Mean over ratios of part / whole: (..., K, 2) -> (...); NaN where a whole is 0."""
    return np.asarray(_divide(sums[..., 0], sums[..., 1]).mean(axis=-1), dtype=np.float64)


def _divide(top: FloatArray, bottom: FloatArray) -> FloatArray:
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom != 0)


def _sums_and_resamples(arrays: Sequence[FloatArray], n_resamples: int) -> tuple[FloatArray, FloatArray]:
    """Sums over problems, (S, K, 2), and resampled ones, (R, S, K, 2): seeds, then problems within each."""
    rng = np.random.Generator(np.random.Philox(key=_TWO_LEVEL_KEY))
    seeds = len(arrays)
    picked_RS = rng.integers(seeds, size=(n_resamples, seeds))
    drawn = np.empty((n_resamples, seeds, *arrays[0].shape[1:]))
    for seed, array in enumerate(arrays):
        places = np.argwhere(picked_RS == seed)
        step = max(1, RESAMPLE_ELEMENTS // array.size)
        for start in range(0, len(places), step):
            rows, columns = places[start : start + step].T
            chosen = rng.integers(len(array), size=(len(rows), len(array)))
            drawn[rows, columns] = array[chosen].sum(axis=1)
    return np.stack([array.sum(axis=0) for array in arrays]), drawn


def _constant_share(arrays: Sequence[FloatArray]) -> Interval | None:
    """Wilson's interval, one trial per problem, of a share in [0, 1] that is the same for every problem; else None."""
    joined = np.concatenate(arrays)
    one_number_per_seed = len(joined) == len(arrays)
    if one_number_per_seed or joined.shape[1] != 1 or (same := _one_share(joined[:, 0])) is None:
        return None
    return wilson_interval(*same) if 0 <= same[0] <= same[1] else None


def _newcombe(first: Interval, second: Interval) -> Interval:
    """Difference of two shares from their Wilson intervals (Newcombe 1998, method 10)."""
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Interval(value, low, high, "newcombe")
