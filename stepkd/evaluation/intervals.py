"""Intervals and paired tests for per-problem results.

Problems are the unit of resampling everywhere: the samples of one problem are not independent of each other.
An undefined bound (one problem says nothing about the spread between problems) is NaN in Python and null in JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stepkd.errors import ConfigError

FloatArray: TypeAlias = NDArray[np.float64]
Statistic: TypeAlias = Callable[[FloatArray], FloatArray]

RESAMPLE_ELEMENTS = 1 << 20
"""Most resampled numbers held at once by the bootstrap (8 MiB); does not change what is drawn."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    value: float
    """Point estimate."""
    low: float
    """Lower bound; NaN when undefined."""
    high: float
    """Upper bound; NaN when undefined."""
    method: str
    """``wilson`` or ``bootstrap``."""
    level: float = 0.95
    """Confidence level, in (0, 1)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON: NaN becomes None."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {key: (None if math.isnan(x) else float(x)) for key, x in numbers.items()} | {"method": self.method}

    def __str__(self) -> str:
        return self.text(".3f")

    def text(self, number: str) -> str:
        """``value [low, high]`` with a format such as ``.3f``; ``[no interval]`` when it is undefined."""
        if math.isnan(self.low):
            return f"{self.value:{number}} [no interval]"
        return f"{self.value:{number}} [{self.low:{number}}, {self.high:{number}}]"


def plain_dict(result: Any) -> dict[str, Any]:
    """The fields of a result (a dataclass) as JSON takes them, its intervals as :meth:`Interval.to_dict` gives them."""
    return {each.name: _plain(getattr(result, each.name)) for each in fields(result)}


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return plain_dict(value) if is_dataclass(value) else value


def check_level(level: float) -> None:
    """Raises ConfigError unless ``level`` is in (0, 1)."""
    if not 0.0 < level < 1.0:
        raise ConfigError(f"confidence level {level!r} must lie between 0 and 1, for example 0.95")


def wilson_interval(successes: float, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927).

    Args:
        successes: number of successes in [0, n]; a fraction is allowed.
        n: number of trials, at least 1.
        level: confidence level in (0, 1).

    Returns:
        Interval within [0, 1].

    Raises:
        ConfigError: no trials, successes outside [0, n], or a bad level.
    """
    check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise ConfigError(f"a proportion needs n >= 1 and 0 <= successes <= n, got successes={successes}, n={n}")
    z2 = NormalDist().inv_cdf((1.0 + level) / 2.0) ** 2
    p = successes / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At the ends the formula gives exactly 0 and 1; rounding must not.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(p, low, high, "wilson", level)


def mean_statistic(resampled: FloatArray) -> FloatArray:
    """Mean over problems: (resamples, problems) -> (resamples,)."""
    return np.asarray(resampled.mean(axis=1), dtype=np.float64)


def ratio_of_sums(resampled: FloatArray) -> FloatArray:
    """Sum of column 0 over sum of column 1: (resamples, problems, 2) -> (resamples,); NaN where the latter is 0."""
    sums = resampled.sum(axis=1)
    ratio = np.full(sums.shape[0], np.nan)
    np.divide(sums[:, 0], sums[:, 1], out=ratio, where=sums[:, 1] != 0)
    return ratio


def cluster_bootstrap(
    per_problem: ArrayLike,
    statistic: Statistic = mean_statistic,
    *,
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap that resamples whole problems (Efron & Tibshirani 1993, ch. 13).

    Args:
        per_problem: (problems,) or (problems, columns) finite numbers, one row per problem.
        statistic: maps (resamples, problems[, columns]) to (resamples,); the mean, or :func:`ratio_of_sums`.
        n_resamples: number of resamples, at least 1.
        level: confidence level in (0, 1).
        seed: seed of the resampling; equal seeds and problem counts draw the same problems.

    Returns:
        Interval; bounds are NaN for a single problem. Resamples where the statistic is NaN (a ratio without
        denominator) are left out.

    Raises:
        ConfigError: no problems, a non-finite value, or settings out of range.
    """
    check_level(level)
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
        return Interval(estimate, math.nan, math.nan, "bootstrap", level)
    rng = np.random.default_rng(seed)
    chunk = max(1, RESAMPLE_ELEMENTS // values.size)
    drawn = np.concatenate(
        [
            statistic(values[rng.integers(problems, size=(min(chunk, n_resamples - start), problems))])
            for start in range(0, n_resamples, chunk)
        ]
    )
    drawn = drawn[~np.isnan(drawn)]
    if drawn.size == 0:
        return Interval(estimate, math.nan, math.nan, "bootstrap", level)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), "bootstrap", level)


def mean_interval(per_problem: ArrayLike, *, n_resamples: int = 10_000, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean of per-problem rates with the interval that fits them.

    Wilson when every value is 0 or 1 (one outcome per problem). Otherwise the cluster bootstrap, except when all
    values are equal: there it would have zero width, so Wilson with one trial per problem, which is wider, is given.

    Args:
        per_problem: (problems,) rates in [0, 1].
        n_resamples, level, seed: as in :func:`cluster_bootstrap`.

    Raises:
        ConfigError: no problems, or a value outside [0, 1].
    """
    values = np.asarray(per_problem, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ConfigError(f"a mean over problems needs one rate per problem and at least one, got shape {values.shape}")
    if not ((values >= 0) & (values <= 1)).all():
        raise ConfigError("per-problem rates must lie in [0, 1]; use cluster_bootstrap for other quantities")
    binary = ((values == 0) | (values == 1)).all()
    if binary or (values == values[0]).all():
        return wilson_interval(min(float(values.sum()), float(values.size)), values.size, level)
    return cluster_bootstrap(values, n_resamples=n_resamples, level=level, seed=seed)


def ratio_interval(
    top: ArrayLike, bottom: ArrayLike, *, n_resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Share ``sum(top) / sum(bottom)`` of counts, with an interval that resamples both parts together by problem.

    When every problem with a denominator has the same share, the bootstrap would have zero width: Wilson with one
    trial per such problem, which is wider, is given.

    Args:
        top: (problems,) counts, 0 <= top <= bottom.
        bottom: (problems,) counts.
        n_resamples, level, seed: as in :func:`cluster_bootstrap`.

    Returns:
        Interval; all NaN when no problem has a denominator.

    Raises:
        ConfigError: no problems, or counts out of range.
    """
    pairs = np.stack([np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)], axis=-1)
    if not ((pairs[..., 0] >= 0) & (pairs[..., 0] <= pairs[..., 1])).all():
        raise ConfigError("a share needs 0 <= top <= bottom for every problem")
    counted = pairs[pairs[..., 1] > 0]
    shares = counted[:, 0] / counted[:, 1]
    if shares.size and (shares == shares[0]).all():
        return wilson_interval(float(shares[0]) * shares.size, shares.size, level)
    return cluster_bootstrap(pairs, ratio_of_sums, n_resamples=n_resamples, level=level, seed=seed)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, n_resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of ``b - a`` over problems, with an interval that resamples the pairs.

    Args:
        a, b: (problems,) values of the two runs, in the same problem order.
        n_resamples, level, seed: as in :func:`cluster_bootstrap`.

    Returns:
        Interval of the difference; zero width when every problem differs by the same amount.

    Raises:
        ConfigError: different lengths, or no problems.
    """
    if len(a) != len(b):
        raise ConfigError(f"paired values must have equal length, got {len(a)} and {len(b)}")
    difference = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    return cluster_bootstrap(difference, n_resamples=n_resamples, level=level, seed=seed)


def mcnemar_exact(b: int, c: int, *, mid_p: bool = False) -> float:
    """Two-sided exact McNemar test on the discordant pairs.

    Args:
        b: pairs where only the first run is right.
        c: pairs where only the second run is right.
        mid_p: give the less conservative mid-p value (Fagerland, Lydersen & Laake 2013).

    Returns:
        p value in (0, 1]; 1.0 when there is no discordant pair.

    Raises:
        ConfigError: a negative count.
    """
    if b < 0 or c < 0:
        raise ConfigError(f"discordant pair counts must not be negative, got b={b}, c={c}")
    n, least = b + c, min(b, c)
    if n == 0:
        return 1.0
    # Integers until the last division: exact for any number of problems.
    term, tail = 1, 1
    for i in range(1, least + 1):
        term = term * (n - i + 1) // i
        tail += term
    doubled = min(2 * tail, 2**n)
    if mid_p:
        # Half the weight of outcomes as likely as the observed one; at b == c there is only one such outcome.
        return (2 * doubled - (term if b == c else 2 * term)) / 2 ** (n + 1)
    return doubled / 2**n
