"""Intervals and paired tests against closed forms, brute force and simulated coverage."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from stepkd import statistics
from stepkd.claims.runner import value_array
from stepkd.errors import ConfigError
from stepkd.statistics import (
    cluster_bootstrap,
    estimate_difference,
    estimate_mean,
    estimate_ratio,
    estimate_seed_ratio,
    fieller_interval,
    mcnemar_exact,
    mean_interval,
    percent,
    ratio_interval,
    ratio_of_sums,
    shown,
    t_interval,
    wilson_interval,
)

# --- intervals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figure", "number", "text"),
    [
        (None, ".3f", "-"),
        (0.5, ".1%", "50.0%"),
        ({"value": None, "low": None, "high": None}, ".3f", "-"),
        ({"value": 0.5, "low": None, "high": None}, ".3f", "0.500"),
        ({"value": 0.5, "low": 0.25, "high": 0.75}, ".1%", "50.0% (25.0% to 75.0%)"),
        ({"value": 12.0, "low": 12.0, "high": 12.0}, ".1f", "12.0"),
    ],
)
def test_a_number_is_shown_with_its_interval_where_it_has_one(figure: object, number: str, text: str) -> None:
    assert shown(figure, number) == text  # type: ignore[arg-type]
    assert percent({"value": 0.5, "low": 0.25, "high": 0.75}, "\n") == "50.0\n(25.0 to 75.0)"


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, table I, method 3 (Wilson score without continuity correction), to four decimals.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_known_values(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson_interval(successes, n)
    assert interval.value == successes / n
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


def test_wilson_bounds_solve_the_score_equation() -> None:
    z = 1.959963984540054  # 95%
    interval = wilson_interval(7, 30)
    for bound in (interval.low, interval.high):
        assert abs(7 / 30 - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / 30), rel=1e-9)


def test_wilson_is_symmetric_and_refuses_bad_input() -> None:
    few, many = wilson_interval(3, 10), wilson_interval(7, 10)
    assert few.low == pytest.approx(1 - many.high)
    assert wilson_interval(10, 10).high == 1.0
    with pytest.raises(ConfigError, match="successes=0, n=0"):
        wilson_interval(0, 0)


def test_bootstrap_equals_exact_distribution_of_two_problems() -> None:
    # Resampled means of {0, 1}: 0 (1/4), 1/2 (1/2), 1 (1/4). Their 2.5% and 97.5% points are 0 and 1.
    interval = cluster_bootstrap([0.0, 1.0])
    assert (interval.value, interval.low, interval.high) == (0.5, 0.0, 1.0)


def test_bootstrap_width_near_normal_theory_and_free_of_order_effects_of_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(1).normal(size=400)
    whole = cluster_bootstrap(values, seed=3)
    standard_error = values.std() / math.sqrt(values.size)
    assert whole.high - whole.low == pytest.approx(2 * 1.96 * standard_error, rel=0.05)
    monkeypatch.setattr(statistics, "RESAMPLE_ELEMENTS", 4_001)
    assert cluster_bootstrap(values, seed=3) == whole
    assert cluster_bootstrap(values, seed=4) != whole


def test_bootstrap_by_problem_covers_the_truth() -> None:
    """Samples of one problem share a hidden success rate; the interval covers the mean rate about 95% of the time."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        rates = rng.beta(0.5, 0.5, size=60)  # true mean 1/2, strong clustering
        shares = rng.binomial(8, rates) / 8
        interval = cluster_bootstrap(shares, n_resamples=400, seed=trial)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.90 <= covered / 300 <= 0.98
    # Treating the 480 samples as independent is what the cluster bootstrap guards against: much too narrow.
    naive = wilson_interval(240, 480)
    assert interval.high - interval.low > 1.5 * (naive.high - naive.low)


def test_ratio_bootstrap_resamples_both_parts_together() -> None:
    # Every problem has the same ratio, so the ratio of sums never moves although both parts do.
    pairs = np.array([[1, 2], [5, 10], [50, 100]])
    interval = cluster_bootstrap(pairs, ratio_of_sums, n_resamples=500)
    assert (interval.value, interval.low, interval.high) == (0.5, 0.5, 0.5)
    # Without a denominator: undefined, and null in JSON; resamples without one are left out.
    empty = cluster_bootstrap([[0, 0], [0, 0]], ratio_of_sums)
    assert empty.to_dict() == {"value": None, "low": None, "high": None, "method": "bootstrap"}
    sparse = cluster_bootstrap([[1, 1], [0, 0]], ratio_of_sums)
    assert (sparse.value, sparse.low, sparse.high) == (1.0, 1.0, 1.0)


def test_ratio_interval_falls_back_to_wilson_where_the_bootstrap_sees_no_spread() -> None:
    mixed = ratio_interval([1, 0, 4], [2, 3, 4], n_resamples=300)
    assert mixed == cluster_bootstrap([[1, 2], [0, 3], [4, 4]], ratio_of_sums, n_resamples=300)
    assert mixed.value == pytest.approx(5 / 9)
    assert ratio_interval([0, 0, 0, 0], [3, 1, 2, 0]) == wilson_interval(0, 3)  # three problems have a denominator
    assert ratio_interval([1, 2], [2, 4]) == wilson_interval(1, 2)
    assert math.isnan(ratio_interval([0, 0], [0, 0]).value)
    with pytest.raises(ConfigError, match="0 <= top <= bottom"):
        ratio_interval([2, 1], [1, 1])
    with pytest.raises(ConfigError, match="at least one"):
        ratio_interval([], [])


def test_bootstrap_degenerate_and_bad_input() -> None:
    one = cluster_bootstrap([3.0])
    assert one.value == 3.0
    assert math.isnan(one.low)
    assert str(one) == "3.000 [no interval]"
    with pytest.raises(ConfigError, match="at least one"):
        cluster_bootstrap([])
    with pytest.raises(ConfigError, match="finite"):
        cluster_bootstrap([1.0, math.nan])
    with pytest.raises(ConfigError, match="n_resamples=0"):
        cluster_bootstrap([1.0, 2.0], n_resamples=0)


def test_mean_interval_chooses_the_method() -> None:
    assert mean_interval([0, 1, 1, 0]) == wilson_interval(2, 4)
    assert mean_interval([0.5, 0.25, 1.0]).method == "bootstrap"
    same = mean_interval([0.25] * 8)  # the bootstrap would have zero width
    assert same == wilson_interval(2, 8)
    assert same.high > same.low
    with pytest.raises(ConfigError, match=r"lie in \[0, 1\]"):
        mean_interval([2.0, 3.0])
    with pytest.raises(ConfigError, match="n >= 1"):
        mean_interval([])


# --- paired tests ---------------------------------------------------------------------------------------------------


def test_mcnemar_equals_the_binomial_sum() -> None:
    for b, c in itertools.product(range(9), repeat=2):
        n = b + c
        mass = [Fraction(math.comb(n, i), 2**n) for i in range(n + 1)]
        extreme = sum((m for i, m in enumerate(mass) if abs(2 * i - n) >= abs(b - c)), Fraction(0))
        equal = sum((m for i, m in enumerate(mass) if abs(2 * i - n) == abs(b - c)), Fraction(0))
        assert mcnemar_exact(b, c) == pytest.approx(float(extreme), rel=1e-14)
        if n:
            assert mcnemar_exact(b, c, mid_p=True) == pytest.approx(float(extreme - equal / 2), rel=1e-14)
    assert mcnemar_exact(0, 0) == mcnemar_exact(0, 0, mid_p=True) == 1.0


def test_mcnemar_large_counts() -> None:
    # Normal approximation with continuity correction, far inside its range.
    z = (abs(5200 - 5000) - 1) / math.sqrt(10_200)
    assert mcnemar_exact(5200, 5000) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-2)
    assert mcnemar_exact(10, 3) == mcnemar_exact(3, 10)


# --- few seeds with many problems each ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("df", "quantile"),  # Student's own table, two-sided 95%
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (10, 2.2281), (30, 2.0423)],
)
def test_the_t_interval_has_the_width_of_the_table(df: int, quantile: float) -> None:
    values = np.random.default_rng(df).normal(size=df + 1)
    interval = t_interval(values)
    error = values.std(ddof=1) / math.sqrt(df + 1)
    assert interval.high - interval.value == pytest.approx(quantile * error, rel=1e-4)
    assert interval.low + interval.high == pytest.approx(2 * values.mean())


def test_the_t_interval_of_two_seeds_is_that_of_a_cauchy_variable() -> None:
    interval = t_interval([0.0, 2.0])
    assert interval.high - 1 == pytest.approx(math.tan(math.pi * 0.475), rel=1e-10)


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


@pytest.mark.slow
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
    nothing_correct = value_array([[0, 0], [0, 0]])
    some_correct = value_array([[1, 2], [1, 1]])
    estimate = estimate_difference([some_correct, nothing_correct], [some_correct, some_correct])
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
