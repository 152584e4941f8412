"""Step scores to one solution score."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepkd.errors import ConfigError, DataError
from stepkd.scorers.reductions import default_reduction, log_product, reduce_scores, reduce_solutions

NAN = math.nan
PROBABILITIES = st.lists(st.floats(0, 1), min_size=1, max_size=20)


def test_closed_forms() -> None:
    scores = [0.5, 0.8, 0.25]
    expected = {"product": 0.1, "min": 0.25, "mean": 1.55 / 3, "last": 0.25}
    for reduction, value in expected.items():
        assert reduce_scores(scores, reduction, meaning="correctness") == pytest.approx(value, rel=1e-14)


def test_defaults_follow_the_meaning() -> None:
    assert [default_reduction(meaning) for meaning in ("correctness", "value", "outcome")] == [
        "product",
        "last",
        "last",
    ]
    assert reduce_scores([0.5, 0.5], meaning="correctness") == pytest.approx(0.25)
    assert reduce_scores([0.5, 0.75], meaning="value") == 0.75


@given(PROBABILITIES)
def test_product_equals_multiplication_and_order_of_sizes(scores: list[float]) -> None:
    product = reduce_scores(scores, "product", meaning="correctness")
    assert product == pytest.approx(math.prod(scores), rel=1e-9, abs=1e-300)
    low = reduce_scores(scores, "min", meaning="correctness")
    mean = reduce_scores(scores, "mean", meaning="correctness")
    assert product is not None
    assert low is not None
    assert mean is not None
    assert product <= low * (1 + 1e-12)
    assert low <= mean * (1 + 1e-12)


def test_product_with_zero_and_long_solutions() -> None:
    assert reduce_scores([0.9, 0.0, 0.9], "product", meaning="correctness") == 0.0
    assert log_product([0.9, 0.0]) == -math.inf
    # 2000 steps underflow as a product but still rank as logarithms.
    assert reduce_scores([0.4] * 2000, "product", meaning="correctness") == 0.0
    assert log_product([0.4] * 2000) == pytest.approx(2000 * math.log(0.4))
    assert log_product([0.41] + [0.4] * 1999) > log_product([0.4] * 2000)


def test_missing_scores() -> None:
    assert reduce_scores([NAN, NAN, 0.7], meaning="outcome") == 0.7
    assert reduce_scores([NAN, 0.7], "product", meaning="outcome") == pytest.approx(0.7)
    assert reduce_scores([0.7, NAN], meaning="outcome") is None
    for reduction in ("product", "min", "mean", "last"):
        assert reduce_scores([0.9, NAN], reduction, meaning="correctness") is None
        assert reduce_scores([NAN, 0.9], reduction, meaning="value") is None


def test_reduce_solutions_counts_the_unscored() -> None:
    reduced = reduce_solutions([[[0.5, 0.5], [0.5, NAN]], [[0.25]]], meaning="correctness")
    assert reduced.values == [[pytest.approx(0.25), None], [pytest.approx(0.25)]]
    assert (reduced.solutions, reduced.unscored) == (3, 1)


def test_bad_input() -> None:
    with pytest.raises(DataError, match="give at least one step"):
        reduce_scores([], meaning="value")
    with pytest.raises(DataError, match=r"step 1 has score 1\.5"):
        reduce_scores([0.5, 1.5], meaning="value")
    with pytest.raises(DataError, match=r"problem 1, solution 0: step 0 has score -0\.1"):
        reduce_solutions([[[0.5]], [[-0.1]]], meaning="value")
    with pytest.raises(DataError, match="step 1 has no score"):
        log_product([0.5, NAN])
    with pytest.raises(ConfigError, match="unknown reduction 'prod'"):
        reduce_scores([0.5], "prod", meaning="value")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown meaning of scores 'right'"):
        default_reduction("right")  # type: ignore[arg-type]
