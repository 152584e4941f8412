"""Intervals over few seeds: closed forms, brute force, coverage on simulated seeds, edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stepkd.claims.experiment import value_array
from stepkd.claims.statistics import (
    estimate_difference,
    estimate_mean,
    estimate_ratio,
    estimate_seed_ratio,
    fieller_interval,
    student_t_quantile,
    t_interval,
)
from stepkd.errors import ConfigError


@pytest.mark.parametrize(
    ("df", "quantile"),  # Student's own table, two-sided 95%
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (10, 2.2281), (30, 2.0423)],
)
def test_quantiles_of_the_table(df: int, quantile: float) -> None:
    assert student_t_quantile(0.975, df) == pytest.approx(quantile, abs=1e-4)


def test_quantiles_of_closed_forms() -> None:
    assert student_t_quantile(0.5, 3) == pytest.approx(0.0, abs=1e-12)
    assert student_t_quantile(0.9, 1) == pytest.approx(math.tan(math.pi * 0.4), rel=1e-10)
    alpha = 4 * 0.9 * 0.1
    assert student_t_quantile(0.9, 2) == pytest.approx(2 * 0.4 * math.sqrt(2 / alpha), rel=1e-10)
    assert student_t_quantile(0.975, 4000) == pytest.approx(1.9600, abs=1e-3)


def test_the_t_interval_by_hand() -> None:
    interval = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764 * math.sqrt(2.5) / math.sqrt(5)
    assert interval.value == 3
    assert interval.low == pytest.approx(3 - half, abs=1e-4)
    assert interval.high == pytest.approx(3 + half, abs=1e-4)
    assert interval.method == "t"


def test_fieller_holds_the_ratios_that_the_t_test_does_not_exclude() -> None:
    rng = np.random.default_rng(0)
    bottom = rng.normal(1.0, 0.1, 6)
    top = 0.5 * bottom + rng.normal(0, 0.05, 6)
    interval = fieller_interval(top, bottom)
    assert interval.value == pytest.approx(top.mean() / bottom.mean())
    for ratio in np.linspace(0.2, 0.9, 141):
        test = t_interval(top - ratio * bottom)
        assert (interval.low <= ratio <= interval.high) == (test.low <= 0 <= test.high), ratio


def test_fieller_is_undefined_where_the_bottom_may_be_zero() -> None:
    interval = fieller_interval([1.0, 1.1, 0.9], [0.1, -0.1, 0.2])
    assert math.isnan(interval.low)
    assert not math.isnan(interval.value)
    assert math.isnan(fieller_interval([1.0, 2.0], [1.0, -1.0]).value)
    assert math.isnan(fieller_interval([1.0], [2.0]).low)


def test_values_are_means_ratios_and_means_of_ratios() -> None:
    mean = [value_array([1, 0, 1, 1])]
    ratio = [value_array([[1, 2], [0, 0], [2, 2], [0, 1]])]
    balanced = [value_array([[[1, 1], [0, 2]], [[0, 1], [1, 1]], [[1, 2], [0, 0]], [[1, 1], [1, 1]]])]
    assert estimate_mean(mean, n_resamples=10).per_seed == (0.75,)
    assert estimate_mean(ratio, n_resamples=10).per_seed == (0.6,)
    assert estimate_mean(balanced, n_resamples=10).per_seed == pytest.approx(((3 / 5 + 2 / 4) / 2,))
    assert estimate_mean([value_array(0.3)], n_resamples=10).per_seed == (0.3,)


def test_the_bootstrap_is_two_level_and_paired() -> None:
    """Against a plain double loop that draws seeds, and then the same problems for both arms."""
    rng = np.random.default_rng(1)
    shared = [rng.random(size) for size in (20, 30, 25)]
    worse = [values + 0.1 * rng.random(len(values)) for values in shared]
    better = [values + 0.2 + 0.1 * seed + 0.1 * rng.random(len(values)) for seed, values in enumerate(shared)]
    found = estimate_difference(
        [value_array(v) for v in better], [value_array(v) for v in worse], n_resamples=4000
    ).problems
    draws = []
    for _ in range(4000):
        differences = []
        for seed in rng.integers(3, size=3):
            chosen = rng.integers(len(better[seed]), size=len(better[seed]))
            differences.append(better[seed][chosen].mean() - worse[seed][chosen].mean())
        draws.append(np.mean(differences))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)
    assert found.high - found.low < 0.3  # unpaired problems alone would give far more than the seeds' 0.1 steps
    assert found.value == pytest.approx(np.mean([b.mean() - w.mean() for b, w in zip(better, worse, strict=True)]))


def test_pairs_cancel_what_both_arms_share() -> None:
    rng = np.random.default_rng(2)
    arrays = [value_array(rng.random(40)) for _ in range(4)]
    shifted = [value_array(array[:, 0, 0] + 0.25) for array in arrays]
    estimate = estimate_difference(shifted, arrays)
    assert estimate.decides.low == pytest.approx(0.25)
    assert estimate.decides.high == pytest.approx(0.25)


def test_coverage_of_simulated_seeds() -> None:
    """True gain 0.1; seeds vary by 0.05, problems by a coin each: 5 seeds of 40 problems."""
    rng = np.random.default_rng(3)
    trials, covered = 300, {"seeds": 0, "problems": 0, "decides": 0}
    for _ in range(trials):
        gains = 0.1 + rng.normal(0, 0.05, 5)
        worse = [value_array((rng.random(40) < 0.5).astype(float)) for _ in range(5)]
        better = [value_array((rng.random(40) < 0.5 + gain).astype(float)) for gain in gains]
        estimate = estimate_difference(better, worse, n_resamples=300)
        for name in covered:
            interval = getattr(estimate, name)
            covered[name] += interval.low <= 0.1 <= interval.high
    assert 0.92 <= covered["seeds"] / trials <= 0.98
    assert covered["decides"] >= max(covered["seeds"], covered["problems"])
    assert covered["decides"] / trials >= 0.95


def test_resampling_few_seeds_alone_is_too_narrow_and_t_is_not() -> None:
    """Seeds differ and their problems do not: what the README says of the bootstrap over five seeds."""
    rng = np.random.default_rng(4)
    trials, covered = 400, {"seeds": 0, "problems": 0}
    for _ in range(trials):
        arrays = [value_array(rng.normal(0, 1)) for _ in range(5)]
        estimate = estimate_mean(arrays, n_resamples=300)
        for name in covered:
            interval = getattr(estimate, name)
            covered[name] += interval.low <= 0 <= interval.high
    assert covered["problems"] / trials < 0.88
    assert 0.92 <= covered["seeds"] / trials <= 0.98


def test_seeds_that_happen_to_agree_leave_the_problems_interval() -> None:
    arrays = [value_array([1, 0, 1, 0]), value_array([0, 1, 0, 1]), value_array([1, 1, 0, 0])]
    estimate = estimate_mean(arrays)
    assert estimate.seeds.low == estimate.seeds.high == 0.5
    assert estimate.decides.low == estimate.problems.low < 0.4
    assert estimate.decides.method == "t+bootstrap"


def test_perfect_everywhere_is_not_certain() -> None:
    estimate = estimate_mean([value_array([1] * 10)] * 3)
    assert estimate.decides.method == "wilson"
    assert 0.85 < estimate.decides.low < 0.9  # 30 of 30
    shares = estimate_mean([value_array([[2, 2], [0, 0], [1, 1]])] * 2)
    assert shares.decides.method == "wilson"
    assert shares.decides.low == pytest.approx(0.510, abs=1e-3)  # 4 problems that count
    budgets = estimate_mean([value_array(512.0)] * 3)
    assert budgets.decides.low == budgets.decides.high == 512


def test_all_against_all_is_not_certain_either() -> None:
    perfect, none = [value_array([1] * 10)] * 3, [value_array([0] * 10)] * 3
    same = estimate_difference(perfect, perfect).decides
    assert same.method == "newcombe"
    assert same.low == pytest.approx(-0.1135, abs=1e-4)  # 1 - Wilson's low end of 30 of 30
    assert same.high == pytest.approx(0.1135, abs=1e-4)
    apart = estimate_difference(perfect, none).decides
    assert apart.low == pytest.approx(1 - math.hypot(0.1135, 0.1135), abs=1e-4)
    assert apart.high == 1
    varied = [value_array([1, 0, 1, 0.5])] * 3  # the arms agree problem by problem: that is known, not chance
    exact = estimate_difference(varied, varied).decides
    assert exact.low == exact.high == 0


def test_one_seed_has_no_interval() -> None:
    estimate = estimate_mean([value_array([1, 0, 1, 1])])
    assert math.isnan(estimate.decides.low)
    assert not math.isnan(estimate.problems.low)
    assert estimate.value == 0.75


def test_an_undefined_seed_leaves_all_undefined() -> None:
    nothing_right = value_array([[0, 0], [0, 0]])
    some_right = value_array([[1, 2], [1, 1]])
    estimate = estimate_difference([some_right, nothing_right], [some_right, some_right])
    assert math.isnan(estimate.value)
    assert math.isnan(estimate.decides.low)
    assert math.isnan(estimate.problems.low)
    assert estimate.per_seed[0] == 0


def test_a_ratio_of_arms() -> None:
    rng = np.random.default_rng(5)
    worse = [value_array(0.4 + 0.02 * rng.random(50)) for _ in range(5)]
    better = [value_array(0.5 * array[:, 0, 0] + 0.01 * rng.random(50)) for array in worse]
    estimate = estimate_ratio(better, worse)
    assert estimate.value == pytest.approx(0.512, abs=2e-3)
    assert estimate.decides.low <= estimate.seeds.low < estimate.value < estimate.seeds.high <= estimate.decides.high
    assert estimate.decides.high < 0.53


def test_the_geometric_mean_of_the_seeds_ratios() -> None:
    """Shares that differ tenfold between seeds: their ratios agree, which the ratio of means cannot see."""
    rng = np.random.default_rng(6)
    bottoms, ratios = (0.05, 0.1, 0.2, 0.3, 0.5), (0.45, 0.5, 0.55, 0.5, 0.6)
    worse = [value_array(bottom * (0.9 + 0.2 * rng.random(50))) for bottom in bottoms]
    better = [value_array(ratio * array[:, 0, 0]) for ratio, array in zip(ratios, worse, strict=True)]
    estimate = estimate_seed_ratio(better, worse)
    assert estimate.per_seed == pytest.approx(ratios)
    assert estimate.value == pytest.approx(float(np.exp(np.log(ratios).mean())))
    log = t_interval(np.log(ratios))
    assert (estimate.seeds.low, estimate.seeds.high) == pytest.approx((math.exp(log.low), math.exp(log.high)))
    assert estimate.decides.low <= estimate.problems.low < estimate.value < estimate.problems.high < 0.62
    assert estimate_ratio(better, worse).value > estimate.value  # the hardest seed weighs most there


def test_a_seed_ratio_with_an_empty_share_is_undefined() -> None:
    some, none = value_array([0.5, 0.2]), value_array([0.0, 0.0])
    zero = estimate_seed_ratio([some, none], [some, some])
    assert zero.value == 0
    assert math.isnan(zero.decides.low)
    assert math.isnan(estimate_seed_ratio([some, some], [some, none]).value)


def test_the_same_rows_give_the_same_numbers_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from stepkd.claims import statistics

    arrays = [value_array(np.random.default_rng(seed).random(30)) for seed in range(4)]
    whole = estimate_mean(arrays)
    assert estimate_mean(arrays) == whole
    monkeypatch.setattr(statistics, "RESAMPLE_ELEMENTS", 1000)
    assert estimate_mean(arrays) == whole


def test_arms_with_other_numbers_of_problems_cannot_be_paired() -> None:
    with pytest.raises(ConfigError, match="paired by seed and problem"):
        estimate_difference([value_array([1, 0])], [value_array([1])])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, math.nan], "not a finite number"),
        ([], "has shape"),
        ([[1, 2, 3]], "has shape"),
        ([[1, -2]], "whole is negative"),
    ],
)
def test_bad_values(values: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        value_array(values)
