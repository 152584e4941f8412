"""Statements: what is measured, which side of the bound is claimed, and the verdicts."""

from __future__ import annotations

import math

import pytest

from stepkd.claims.claim_file import Statement, overall
from stepkd.claims.runner import value_array
from stepkd.errors import ConfigError
from stepkd.statistics import Interval


def interval(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, "t")


TWO = {"metric": "m", "better": "a", "worse": "b"}


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.2, "reproduced"),
        (-0.2, -0.01, "not reproduced"),
        (-0.1, 0.1, "inconclusive"),
        (0.0, 0.1, "inconclusive"),  # touches the bound
        (-0.1, 0.0, "inconclusive"),
        (math.nan, math.nan, "inconclusive"),
    ],
)
def test_verdicts_of_a_difference(low: float, high: float, verdict: str) -> None:
    assert Statement(**TWO).verdict(interval(low, high)) == verdict


def test_the_margin_moves_the_bound() -> None:
    assert Statement(**TWO, bound=0.05).verdict(interval(0.01, 0.2)) == "inconclusive"
    assert Statement(**TWO, bound=0.05).verdict(interval(0.01, 0.04)) == "not reproduced"
    assert Statement(**TWO, bound=-0.02).verdict(interval(-0.01, 0.2)) == "reproduced"  # no loss of more than 0.02


def test_thresholds_and_small_ratios() -> None:
    least = Statement("m", arm="a", bound=0.85)
    most = Statement("m", arm="a", direction="lower", bound=0.1)
    small = Statement(**TWO, measure="ratio", direction="lower")
    large = Statement(**TWO, measure="ratio")
    assert least.verdict(interval(0.86, 0.9)) == "reproduced"
    assert least.verdict(interval(0.7, 0.84)) == "not reproduced"
    assert most.verdict(interval(0.0, 0.09)) == "reproduced"
    assert most.verdict(interval(0.11, 0.2)) == "not reproduced"
    assert (small.limit, large.limit) == (1.0, 1.0)
    assert small.verdict(interval(0.5, 0.9)) == "reproduced"
    assert small.verdict(interval(1.1, 1.9)) == "not reproduced"
    assert large.verdict(interval(1.1, 1.9)) == "reproduced"
    assert Statement(**TWO, measure="ratio", direction="lower", bound=0.7).verdict(interval(0.5, 0.9)) == (
        "inconclusive"
    )


def test_what_is_measured() -> None:
    values = {
        arm: {"m": [value_array(x) for x in per_seed]} for arm, per_seed in {"a": (0.2, 0.4), "b": (0.6, 0.6)}.items()
    }
    assert Statement(**TWO).estimate(values).value == pytest.approx(-0.3)
    assert Statement(**TWO, direction="lower").estimate(values).value == pytest.approx(0.3)  # lower is better: a gain
    assert Statement(**TWO, measure="ratio", direction="lower").estimate(values).value == pytest.approx(0.5)
    per_seed = Statement(**TWO, measure="seed_ratio", direction="lower").estimate(values)
    assert per_seed.value == pytest.approx((0.2 / 0.6 * 0.4 / 0.6) ** 0.5)
    assert Statement("m", arm="b", bound=0.5).estimate(values).value == pytest.approx(0.6)
    assert Statement(**TWO).estimate(values).per_seed == pytest.approx((-0.4, -0.2))


def test_text() -> None:
    assert str(Statement(**TWO, bound=0.05)) == "m: a - b > 0.05"
    assert str(Statement(**TWO, direction="lower")) == "m: b - a > 0"
    assert str(Statement(**TWO, measure="ratio", direction="lower")) == "m: a / b < 1"
    assert str(Statement(**TWO, measure="seed_ratio", direction="lower")) == "m: a / b per seed < 1"
    assert str(Statement("m", arm="a", direction="lower", bound=0.1)) == "m of a < 0.1"


def test_the_claim_holds_only_if_all_hold() -> None:
    assert overall(["reproduced", "reproduced"]) == "reproduced"
    assert overall(["reproduced", "inconclusive"]) == "inconclusive"
    assert overall(["inconclusive", "not reproduced", "reproduced"]) == "not reproduced"
    assert overall([]) == "inconclusive"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "m"}, "names better and worse"),
        ({"metric": "m", "better": "a"}, "names better and worse"),
        ({**TWO, "arm": "a", "bound": 1}, "names better and worse"),
        ({**TWO, "worse": "a"}, "are the same arm, 'a'"),
        ({"metric": "m", "arm": "a"}, "has a bound"),
        ({"metric": "m", "arm": "a", "bound": 0, "measure": "ratio"}, "and no measure"),
    ],
)
def test_contradictions(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Statement(**fields)
