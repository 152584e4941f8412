"""The lowest score's place in its solution; swaps of adjacent steps, and how a scorer reacts to them."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from stepkd.errors import DataError
from stepkd.evaluation.diagnostics import argmin_positions, order_swap_test, score_bias, task_swaps
from stepkd.tasks.families import TASKS
from stepkd.tasks.rows import check_row, make_rows

# --- the lowest score's place -----------------------------------------------------------------------------------------


def test_positions_in_closed_form() -> None:
    # Lowest at 1 of 2 (last), at 0 of 4; the third has one step and says nothing.
    result = argmin_positions([[0.9, 0.1], [0.1, 0.5, 0.5, 0.5], [0.3]], bins=2, n_resamples=200)
    assert result["edges"] == [0.0, 0.5, 1.0]
    assert result["observed"] == [1.0, 1.0]
    assert result["expected"] == [1.0, 1.0]
    assert result["share_last"]["value"] == 0.5
    assert result["expected_last"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert result["excess_last"]["value"] == pytest.approx(0.5 - 0.375)
    assert (result["solutions"], result["single_step"]) == (2, 1)
    json.dumps(result)


def test_equal_lowest_scores_share_their_solution() -> None:
    result = argmin_positions([[0.1, 0.1, 0.1, 0.1]] * 3, bins=4, n_resamples=200)
    assert result["observed"] == [0.75] * 4
    assert result["excess_last"]["value"] == 0.0


def test_random_scores_show_no_excess_and_an_orm_does() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, size=600)
    noise = argmin_positions([rng.random(n).tolist() for n in lengths], n_resamples=500)
    assert noise["excess_last"]["low"] < 0 < noise["excess_last"]["high"]
    assert sum(noise["observed"]) == pytest.approx(600)
    assert sum(noise["expected"]) == pytest.approx(600)
    orm = argmin_positions([[*(0.5 + rng.random(n - 1) / 2), 0.4] for n in lengths], n_resamples=500)
    assert orm["share_last"]["value"] == 1.0
    assert orm["share_last"]["low"] < 1.0
    assert orm["excess_last"]["low"] > 0.5


def test_positions_that_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="solution 1 has a step without a score"):
        argmin_positions([[0.1, 0.2], [math.nan, 0.2]])
    with pytest.raises(DataError, match="none of 1 solutions has two steps"):
        argmin_positions([[0.1]])


# --- place and length -------------------------------------------------------------------------------------------------


def test_bias_in_closed_form() -> None:
    # Scores of correct steps fall with their number and do not follow their length.
    scores = [[0.9, 0.6, 0.3], [0.8, 0.5, 0.2], [0.7, 0.4, 0.1]]
    labels = [[True, True, True], [True, True, False], [True, False, None]]
    steps = [["aa", "a", "aa"], ["a", "aa", "a"], ["aa", "a", "a"]]
    found = score_bias(scores, labels, steps, [(-1, 2), (2, 1), (None, 0)], problems="abc", n_resamples=200)
    assert found is not None
    kept = [(0.9, 1, 2), (0.6, 2, 1), (0.3, 3, 2), (0.8, 1, 1), (0.5, 2, 2), (0.7, 1, 2)]
    for key, column in (("position", 1), ("length", 2)):
        expected = stats.spearmanr([each[0] for each in kept], [each[column] for each in kept]).statistic
        assert found[key]["value"] == pytest.approx(expected)
    assert found["position"]["value"] < -0.9
    assert found["lateness"]["value"] == -1.0  # only the second has a true and a predicted error
    places = found["places"]
    assert [each["steps"] for each in places[:4]] == [3, 2, 1, 0]
    assert [each["true"] for each in places[:4]] == [0, 0, 1, 0]
    assert [each["predicted"] for each in places[:4]] == [0, 1, 1, 0], "where the true one is unknown, none counts"
    assert places[0]["score"]["value"] == pytest.approx(0.8)
    assert places[3]["score"] is None
    json.dumps(found)


def test_places_behind_the_last_one_are_counted_there() -> None:
    found = score_bias([[0.5] * 14], [[True] * 14], [["x"] * 14], [(12, 13)], problems="a", n_resamples=50)
    assert found is not None
    assert (found["position"], found["length"]) == (None, None), "all scores are equal"
    assert [each["steps"] for each in found["places"]] == [1] * 9 + [5]
    assert (found["places"][-1]["true"], found["places"][-1]["predicted"]) == (1, 1)
    assert score_bias([[0.5]], [[False]], [["x"]], [(0, 0)], problems="a") is None


# --- swapped steps ----------------------------------------------------------------------------------------------------


FAST: dict[str, Any] = {"n_resamples": 300, "meaning": "correctness"}


@pytest.mark.parametrize("name", sorted({*TASKS} - {"independent"}))
def test_every_line_of_the_tasks_needs_the_one_before(name: str) -> None:
    swaps = 0
    for row in make_rows(name, 20, seed=0):
        for steps, swapped in task_swaps(row):
            swaps += 1
            assert not all(check_row(row, swapped))
            assert sorted(swapped) == sorted(steps)
            assert swapped[-1] == steps[-1]  # the answer line stays
        assert task_swaps(row, dependent=False) == []
    assert swaps >= 20


def test_independent_lines_may_be_swapped() -> None:
    rows = make_rows("independent:terms=3,modulus=97", 20, seed=0)
    assert all(task_swaps(row) == [] for row in rows)
    swaps = [(row, pair) for row in rows for pair in task_swaps(row, dependent=False)]
    assert len(swaps) == 40  # two neighbours of three lines
    assert all(all(check_row(row, swapped)) and swapped != steps for row, (steps, swapped) in swaps)
    owners, same = [row["id"] for row, _ in swaps], {**FAST, "dependent": False}
    exact = order_swap_test([[check_row(row, steps) for steps in pair] for row, pair in swaps], owners, **same)
    assert exact is not None
    assert (exact["change_rate"]["value"], exact["mean_drop"]["value"]) == (0.0, 0.0)
    # Blind to the steps, but not to which line of the prompt comes first.
    first = [[[0.9 if s[0] == row["steps"][0] else 0.5] * 4 for s in pair] for row, pair in swaps]
    moved = order_swap_test(first, owners, **same)
    assert moved is not None
    assert moved["change_rate"]["value"] == 0.5
    risen = order_swap_test([[s, [1.0] * 4] for s in [[0.5] * 4] * 40], owners, **same)
    assert risen is not None
    assert risen["change_rate"]["value"] == 1.0, "a rise is a change, too"


def test_swaps_of_a_chain() -> None:
    row = make_rows("modular:terms=4", 1, seed=0)[0]
    (steps, first), (_, second) = task_swaps(row)  # three lines and the answer
    assert first == [steps[1], steps[0], *steps[2:]]
    assert second == [steps[0], steps[2], steps[1], steps[3]]
    assert task_swaps(make_rows("modular:terms=2", 1, seed=0)[0]) == []
    with pytest.raises(DataError, match="not a problem of the tiny world"):
        task_swaps({"id": "x", "prompt": "1+1"})


def test_rates_closed_form() -> None:
    scores = [
        [[0.9, 0.9], [0.9, 0.1]],  # falls
        [[0.5, 0.5], [0.5, 0.48]],  # falls by less than the tolerance
        [[0.5, 1.0], [1.0, 0.9]],  # rises
        [[0.5, 1.0], [1.0, 0.45]],  # falls by exactly the tolerance: stays
        [[0.9, 0.9], [0.9, math.nan]],  # unscored
    ]
    result = order_swap_test(scores, list("abacd"), **FAST)
    assert result is not None
    assert result["drop_rate"]["value"] == 0.25
    assert result["mean_drop"]["value"] == pytest.approx((0.81 - 0.09 + 0.25 - 0.24 - 0.4 + 0.05) / 4)
    assert (result["swaps"], result["unscored"]) == (4, 1)
    json.dumps(result)
    assert order_swap_test(scores[-1:], ["d"], **FAST) is None


def test_an_exact_checker_passes_and_an_order_blind_scorer_fails() -> None:
    swaps = [(row, pair) for row in make_rows("arithmetic:terms=5", 15, seed=0) for pair in task_swaps(row)]
    owners = [row["id"] for row, _ in swaps]
    checker = [[[float(x) for x in check_row(row, steps)] for steps in pair] for row, pair in swaps]
    exact = order_swap_test(checker, owners, **FAST)
    assert exact is not None
    assert exact["drop_rate"]["value"] == 1.0
    assert exact["drop_rate"]["low"] > 0.7
    blind = [[[0.8 for _ in steps] for steps in pair] for _, pair in swaps]
    result = order_swap_test(blind, owners, **FAST)
    assert result is not None
    assert result["drop_rate"]["value"] == 0.0
