"""The lowest score's place in its solution."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from stepkd.errors import DataError
from stepkd.evaluation.argmin_positions import argmin_positions


def test_closed_form() -> None:
    # Lowest at 1 of 2 (last), at 0 of 4; the third has one step and says nothing.
    result = argmin_positions([[0.9, 0.1], [0.1, 0.5, 0.5, 0.5], [0.3]], bins=2, n_resamples=200)
    assert result.edges == (0.0, 0.5, 1.0)
    assert result.observed == (1.0, 1.0)
    assert result.expected == (1.0, 1.0)
    assert result.share_last.value == 0.5
    assert result.expected_last == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert result.excess_last.value == pytest.approx(0.5 - 0.375)
    assert (result.solutions, result.single_step) == (2, 1)
    json.dumps(result.to_dict())


def test_equal_lowest_scores_share_their_solution() -> None:
    result = argmin_positions([[0.1, 0.1, 0.1, 0.1]] * 3, bins=4, n_resamples=200)
    assert result.observed == (0.75,) * 4
    assert result.excess_last.value == 0.0


def test_random_scores_show_no_excess_and_an_orm_does() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, size=600)
    noise = argmin_positions([rng.random(n).tolist() for n in lengths], n_resamples=500)
    assert noise.excess_last.low < 0 < noise.excess_last.high
    assert sum(noise.observed) == pytest.approx(600)
    assert sum(noise.expected) == pytest.approx(600)
    orm = argmin_positions([[*(0.5 + rng.random(n - 1) / 2), 0.4] for n in lengths], n_resamples=500)
    assert orm.share_last.value == 1.0
    assert orm.share_last.low < 1.0
    assert orm.excess_last.low > 0.5


def test_bad_input() -> None:
    with pytest.raises(DataError, match="solution 1, step 0 has no score"):
        argmin_positions([[0.1, 0.2], [math.nan, 0.2]])
    with pytest.raises(DataError, match="none of 1 solutions has two steps"):
        argmin_positions([[0.1]])
    with pytest.raises(DataError, match="one id each"):
        argmin_positions([[0.1, 0.2]], problems=[])
