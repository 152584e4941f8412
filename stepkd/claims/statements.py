"""Statements of a claim and their verdicts: reproduced, not reproduced, or inconclusive."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from stepkd.errors import ConfigError
from stepkd.statistics import (
    Estimate,
    FloatArray,
    Interval,
    estimate_difference,
    estimate_mean,
    estimate_ratio,
    estimate_seed_ratio,
)

Verdict: TypeAlias = Literal["reproduced", "not reproduced", "inconclusive"]
Direction: TypeAlias = Literal["higher", "lower"]
Measure: TypeAlias = Literal["difference", "ratio", "seed_ratio"]
SeedValues: TypeAlias = Mapping[str, Mapping[str, Sequence[FloatArray]]]
"""arm -> metric -> one (P, K, 2) array per seed, in the seeds' order."""


def value_array(values: float | Sequence[Any]) -> FloatArray:
    """Values of a metric in one seed as (problems, ratios, 2): mean over ratios of sum[..., 0] / sum[..., 1].

    Args:
        values: one number for the whole seed; or one entry per problem, which is a number (the metric is their mean), a
            pair ``[part, whole]`` (the sum of parts over the sum of wholes), or a list of such pairs (the mean of those
            ratios, for example a balanced accuracy).

    Raises:
        ValueError: none of these, or not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("holds a value that is not a finite number")
    if array.ndim == 0:
        array = array.reshape(1)
    if array.size == 0 or array.ndim > 3 or (array.ndim > 1 and array.shape[-1] != 2):
        raise ValueError(f"has shape {array.shape}: give numbers, [part, whole] pairs, or lists of such pairs")
    if array.ndim == 1:
        array = np.stack([array, np.ones_like(array)], axis=-1)
    if array.ndim == 2:
        array = array[:, None, :]
    if (array[..., 1] < 0).any():
        raise ValueError("holds a pair whose whole is negative")
    return np.asarray(array, dtype=np.float64)


@dataclass(frozen=True)
class Statement:
    """One statement about a metric: of two arms (``better`` and ``worse``), or of one ``arm`` against a number.

    What must lie beyond the bound: for a difference the gain in the claimed direction (``better - worse`` if higher is
    better, ``worse - better`` if lower is); for a ratio ``better / worse``; for one arm its mean.
    """

    metric: str
    """Name of a metric of the claim."""
    better: str | None = None
    """Arm that the claim holds to be better."""
    worse: str | None = None
    """Arm that it is compared with."""
    arm: str | None = None
    """The one arm of a threshold statement."""
    direction: Direction = "higher"
    """Which values of the metric are better; only between two arms."""
    measure: Measure = "difference"
    """``difference``, ``ratio`` or ``seed_ratio``; only between two arms."""
    at_least: float | None = None
    """The measured quantity must be above this. Default between two arms: 0 (difference), 1 (ratio, higher)."""
    at_most: float | None = None
    """It must be below this; ratios in direction lower (default 1) and thresholds only."""
    variants: tuple[str, ...] = ()
    """Variants that it is about; empty: all."""
    paper: str = ""
    """The paper's number for it, shown beside the result."""

    def __post_init__(self) -> None:
        one, two = self.arm is not None, self.better is not None or self.worse is not None
        if one == two or (two and (self.better is None or self.worse is None)):
            raise ConfigError("a statement names better and worse (two arms), or arm (one arm and a threshold)")
        if two and self.better == self.worse:
            raise ConfigError(f"better and worse are the same arm, {self.better!r}")
        if one and (self.at_least is None) == (self.at_most is None):
            raise ConfigError(f"a statement about one arm ({self.arm!r}) needs at_least or at_most, and not both")
        if one and (self.direction != "higher" or self.measure != "difference"):
            raise ConfigError(
                f"direction and measure are for two arms; for one ({self.arm!r}) give at_least or at_most alone"
            )
        lower_ratio = self.is_ratio and self.direction == "lower"
        if two and self.at_most is not None and not lower_ratio:
            raise ConfigError("at_most between two arms is for a ratio in direction lower; give at_least")
        if lower_ratio and self.at_least is not None:
            raise ConfigError(
                "a ratio in direction lower is claimed to be small: give at_most (default 1), not at_least"
            )

    @property
    def is_ratio(self) -> bool:
        """Whether it is about ``better / worse``."""
        return self.measure != "difference"

    @property
    def bound(self) -> float:
        """The number to be beyond."""
        for given in (self.at_least, self.at_most):
            if given is not None:
                return float(given)
        return 1.0 if self.is_ratio else 0.0

    @property
    def below(self) -> bool:
        """Whether the quantity must lie below the bound."""
        return self.at_most is not None or (self.is_ratio and self.direction == "lower")

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms that it names."""
        return tuple(name for name in (self.better, self.worse, self.arm) if name is not None)

    def estimate(self, values: SeedValues) -> Estimate:
        """The quantity, from the values of every seed."""
        if self.arm is not None:
            return estimate_mean(values[self.arm][self.metric])
        assert self.better is not None
        assert self.worse is not None
        better, worse = (values[name][self.metric] for name in (self.better, self.worse))
        if self.is_ratio:
            return (estimate_ratio if self.measure == "ratio" else estimate_seed_ratio)(better, worse)
        return estimate_difference(better, worse) if self.direction == "higher" else estimate_difference(worse, better)

    def verdict(self, interval: Interval) -> Verdict:
        """Reproduced if the whole interval lies beyond the bound, not reproduced if all of it lies before it."""
        low, high = (-interval.high, -interval.low) if self.below else (interval.low, interval.high)
        bound = -self.bound if self.below else self.bound
        if math.isnan(low) or math.isnan(high):
            return "inconclusive"
        if low > bound:
            return "reproduced"
        return "not reproduced" if high < bound else "inconclusive"

    def __str__(self) -> str:
        sign = "<" if self.below else ">"
        if self.arm is not None:
            quantity = f"{self.metric} of {self.arm}"
        elif self.is_ratio:
            quantity = f"{self.metric}: {self.better} / {self.worse}"
            quantity += " per seed" if self.measure == "seed_ratio" else ""
        elif self.direction == "higher":
            quantity = f"{self.metric}: {self.better} - {self.worse}"
        else:
            quantity = f"{self.metric}: {self.worse} - {self.better}"
        return f"{quantity} {sign} {self.bound:g}"

    def to_dict(self) -> dict[str, Any]:
        """What it says, as JSON values, without the paper's number."""
        kept = {"metric": self.metric, "measure": self.measure, "bound": self.bound, "below": self.below}
        named = {"arm": self.arm} if self.arm is not None else {"better": self.better, "worse": self.worse}
        if self.arm is None:
            kept["direction"] = self.direction
        else:
            del kept["measure"]
        return kept | named


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Verdict of a claim: reproduced only if every statement is; not reproduced as soon as one is not."""
    if "not reproduced" in verdicts:
        return "not reproduced"
    return "reproduced" if verdicts and set(verdicts) == {"reproduced"} else "inconclusive"
