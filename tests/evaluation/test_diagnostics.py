"""The lowest score's place in its solution; swaps of adjacent steps, and how a scorer reacts to them."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.diagnostics import Swap, argmin_positions, order_swap_test, swap_adjacent, task_swaps
from stepkd.tasks.families import TASKS
from stepkd.tasks.rows import check_row, make_rows

# --- the lowest score's place -----------------------------------------------------------------------------------------


def test_positions_in_closed_form() -> None:
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


def test_positions_that_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="solution 1, step 0 has no score"):
        argmin_positions([[0.1, 0.2], [math.nan, 0.2]])
    with pytest.raises(DataError, match="none of 1 solutions has two steps"):
        argmin_positions([[0.1]])
    with pytest.raises(DataError, match="one id each"):
        argmin_positions([[0.1, 0.2]], problems=[])


# --- swapped steps ----------------------------------------------------------------------------------------------------


FAST: dict[str, Any] = {"n_resamples": 300, "meaning": "correctness"}


def test_swap_keeps_separators_in_place() -> None:
    assert swap_adjacent(["a\n", "b\n", "c"], 1) == ["a\n", "c\n", "b"]
    assert swap_adjacent(["a\n", "b\n", "c"], 0) == ["b\n", "a\n", "c"]
    assert swap_adjacent(swap_adjacent(["a \n\n", "b"], 0), 0) == ["a \n\n", "b"]
    with pytest.raises(ConfigError, match="no two adjacent steps at position 1 of 2"):
        swap_adjacent(["a", "b"], 1)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_line_of_the_tasks_needs_the_one_before(name: str) -> None:
    swaps = 0
    for row in make_rows(name, 20, seed=0):
        for swap in task_swaps(row):
            swaps += 1
            assert swap.dependent
            assert not all(check_row(row, swap.swapped))
            assert sorted(swap.swapped) == sorted(swap.steps)
            assert swap.swapped[-1] == swap.steps[-1]  # the answer line stays
            assert list(swap.solutions().solutions) == [swap.steps, swap.swapped]
    assert swaps >= 20


def test_swaps_of_a_chain() -> None:
    row = make_rows("modular:terms=4", 1, seed=0)[0]
    swaps = task_swaps(row)
    assert [swap.position for swap in swaps] == [0, 1]  # three lines and the answer
    assert swaps[0].steps[:2] == swaps[0].swapped[1::-1]
    assert task_swaps(make_rows("modular:terms=2", 1, seed=0)[0]) == []
    with pytest.raises(DataError, match="missing"):
        task_swaps({"id": "x", "prompt": "1+1"})


def pair(dependent: bool, problem: str = "a") -> Swap:
    return Swap({"id": problem}, ("1", "2"), ("2", "1"), 0, dependent)


def test_rates_closed_form() -> None:
    swaps = [pair(True, "a"), pair(True, "b"), pair(False, "a"), pair(False, "b"), pair(False, "c")]
    scores = [
        [[0.9, 0.9], [0.9, 0.1]],  # falls
        [[0.5, 0.5], [0.5, 0.48]],  # falls by less than the tolerance
        [[0.8, 1.0], [1.0, 0.8]],  # stays
        [[0.5, 1.0], [1.0, 0.9]],  # rises
        [[0.5, 1.0], [1.0, 0.45]],  # falls by exactly the tolerance: stays
    ]
    result = order_swap_test(swaps, scores, **FAST)
    assert result.dependent_drop_rate is not None
    assert result.independent_stay_rate is not None
    assert result.dependent_mean_drop is not None
    assert result.independent_mean_drop is not None
    assert result.dependent_drop_rate.value == 0.5
    assert result.independent_stay_rate.value == pytest.approx(2 / 3)
    assert result.dependent_mean_drop.value == pytest.approx((0.81 - 0.09 + 0.25 - 0.24) / 2)
    assert result.independent_mean_drop.value == pytest.approx((0 - 0.4 + 0.05) / 3)
    assert (result.dependent, result.independent, result.unscored) == (2, 3, 0)
    json.dumps(result.to_dict())


def test_an_exact_checker_passes_and_an_order_blind_scorer_fails() -> None:
    rows = make_rows("arithmetic:terms=5", 15, seed=0)
    swaps = [swap for row in rows for swap in task_swaps(row)]
    checker = [[[float(x) for x in check_row(s.row, steps)] for steps in s.solutions().solutions] for s in swaps]
    exact = order_swap_test(swaps, checker, **FAST)
    assert exact.dependent_drop_rate is not None
    assert exact.dependent_drop_rate.value == 1.0
    assert exact.dependent_drop_rate.low > 0.7
    assert exact.independent_stay_rate is None
    blind = [[[len(step) / 20 for step in steps] for steps in s.solutions().solutions] for s in swaps]
    result = order_swap_test(swaps, blind, reduction="mean", **FAST)
    assert result.dependent_drop_rate is not None
    assert result.dependent_drop_rate.value == 0.0


def test_unscored_pairs_are_counted() -> None:
    scores = [[[0.9, 0.9], [0.9, math.nan]], [[0.9, 0.9], [0.1, 0.1]]]
    result = order_swap_test([pair(True), pair(True)], scores, **FAST)
    assert (result.unscored, result.dependent) == (1, 1)
    with pytest.raises(DataError, match="none of 1 swaps has a score"):
        order_swap_test([pair(True)], scores[:1], **FAST)


def test_swaps_that_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="1 scored pairs for 2 swaps"):
        order_swap_test([pair(True)] * 2, [[[0.1, 0.1], [0.1, 0.1]]], **FAST)
    with pytest.raises(DataError, match=r"swap 0 has \[2, 1\] step scores"):
        order_swap_test([pair(True)], [[[0.1, 0.1], [0.1]]], **FAST)
    with pytest.raises(ConfigError, match="tolerance=2"):
        order_swap_test([pair(True)], [[[0.1, 0.1], [0.1, 0.1]]], tolerance=2, **FAST)
