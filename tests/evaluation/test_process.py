"""ProcessBench F1 against brute force; thresholds against a search over all of them; baselines against closed forms."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from stepkd.errors import DataError
from stepkd.evaluation.first_error import (
    f1_difference,
    predicted_first_error,
    processbench_f1,
    random_baseline,
    tune_threshold,
)
from stepkd.evaluation.prm_score import harmonic_mean
from stepkd.evaluation.process import summarise_process

FAST: dict[str, Any] = {"n_resamples": 500}
NAN = math.nan


def brute_f1(predictions: list[int], labels: list[int]) -> Fraction | None:
    """F1 with exact fractions, row by row; None where a kind of row is absent."""
    rights: dict[bool, list[int]] = {True: [], False: []}
    for prediction, label in zip(predictions, labels, strict=True):
        rights[label >= 0].append(1 if prediction == label else 0)
    if not rights[True] or not rights[False]:
        return None
    a, b = (Fraction(sum(row), len(row)) for row in rights.values())
    if a == 0 and b == 0:
        return Fraction(0)
    return 2 * a * b / (a + b)


def test_solutions_of_one_problem_are_resampled_together() -> None:
    """Four equal solutions of each problem tell no more than one of each."""
    labels, found = [0, 1, -1, -1, 2, -1], [0, 0, -1, 1, 2, -1]
    one, four = processbench_f1(found, labels, **FAST), (found * 4, labels * 4)
    same = processbench_f1(*four, problems=list(range(6)) * 4, **FAST)
    assert same.f1 == one.f1
    assert same.n_error == 12
    apart = processbench_f1(*four, **FAST)
    assert same.acc_error
    assert apart.acc_error
    assert same.f1
    assert apart.f1
    assert same.f1.value == pytest.approx(apart.f1.value)
    for each, wrong in ((same.f1, apart.f1), (same.acc_error, apart.acc_error)):
        assert each.high - each.low > 1.3 * (wrong.high - wrong.low)
    once, wide = (
        f1_difference(found, [-1] * 6, labels, **FAST),
        f1_difference(found * 4, [-1] * 24, labels * 4, problems=list(range(6)) * 4, **FAST),
    )
    assert once["f1"] == wide["f1"]
    never = processbench_f1([-1] * 24, labels * 4, problems=list(range(6)) * 4, **FAST)
    assert never.f1 is not None
    assert never.f1.high > never.f1.value == 0.0, "no resample says anything: the bounds of the accuracies do"
    with pytest.raises(DataError, match="5 problems for 6 labels"):
        processbench_f1(found, labels, problems=list(range(5)))


def test_sixty_and_ninety_give_seventy_two() -> None:
    assert harmonic_mean(60, 90) == 72.0
    labels = [2] * 10 + [-1] * 10
    result = processbench_f1([2] * 6 + [1] * 4 + [-1] * 9 + [0], labels, **FAST)
    assert result.f1 is not None
    assert result.f1.value == pytest.approx(0.72)
    assert (result.n_error, result.n_correct) == (10, 10)
    assert result.f1.low < 0.72 < result.f1.high


def test_equals_brute_force_on_200_random_sets() -> None:
    rng = np.random.default_rng(1)
    kinds = {"undefined": 0, "zero": 0, "other": 0}
    for trial in range(200):
        n = int(rng.integers(1, 12))
        # Every fourth set predicts only what cannot be correct, so that 0/0 occurs often.
        labels = rng.integers(-1, 3, size=n).tolist()
        predictions = [label + 1 for label in labels] if trial % 4 == 0 else rng.integers(-1, 3, size=n).tolist()
        expected, result = brute_f1(predictions, labels), processbench_f1(predictions, labels, n_resamples=20)
        if expected is None:
            kinds["undefined"] += 1
            assert result.f1 is None
            assert (result.acc_error is None) == (result.n_error == 0)
            assert (result.acc_correct is None) == (result.n_correct == 0)
        else:
            kinds["zero" if expected == 0 else "other"] += 1
            assert result.f1 is not None
            assert result.f1.value == pytest.approx(float(expected), abs=1e-15)
            assert result.f1.low <= result.f1.value <= result.f1.high
    assert min(kinds.values()) >= 20, kinds


def test_interval_without_spread_is_not_a_point() -> None:
    perfect = processbench_f1([0, 1, -1, -1], [0, 1, -1, -1], **FAST).f1
    assert perfect is not None
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert 0.2 < perfect.low < 0.5  # Wilson of 2 of 2 is [0.34, 1]
    never = processbench_f1([-1] * 4, [0, 1, -1, -1], **FAST).f1
    assert never is not None
    assert (never.value, never.low) == (0.0, 0.0)
    assert never.high > 0.3


def test_an_f1_of_bounds_of_two_kinds_is_named_after_the_bootstrap() -> None:
    """Each error of a problem of its own and missed (Wilson); correct solutions several to a problem (bootstrap)."""
    labels, predictions = [0, 1, 2, -1, -1, -1, -1], [1, 2, 3, -1, -1, -1, 0]
    found = processbench_f1(predictions, labels, problems=["a", "b", "c", "d", "d", "e", "e"])
    assert found.f1
    assert found.acc_error
    assert found.acc_correct
    assert (found.acc_error.method, found.acc_correct.method, found.f1.method) == ("wilson", "bootstrap", "bootstrap")
    assert found.f1.low == 0 < found.f1.high < 1
    alone = processbench_f1(predictions, labels)
    assert alone.f1 is not None
    assert alone.f1.method == "wilson"


def test_result_as_json_values() -> None:
    assert processbench_f1([-1], [-1]).to_dict() == {
        "acc_error": None,
        "acc_correct": {"value": 1.0, "low": pytest.approx(0.2065, abs=1e-3), "high": 1.0, "method": "wilson"},
        "f1": None,
        "n_error": 0,
        "n_correct": 1,
    }


def test_bootstrap_interval_has_the_spread_of_the_sampling_distribution() -> None:
    # 300 + 300 rows at accuracies 0.6 and 0.8: the delta method gives the standard error of F1.
    labels = [0] * 300 + [-1] * 300
    predictions = [0] * 180 + [1] * 120 + [-1] * 240 + [0] * 60
    f1 = processbench_f1(predictions, labels, n_resamples=4000).f1
    assert f1 is not None
    a, b = 0.6, 0.8
    slopes = (2 * b * b / (a + b) ** 2, 2 * a * a / (a + b) ** 2)
    error = math.sqrt(slopes[0] ** 2 * a * (1 - a) / 300 + slopes[1] ** 2 * b * (1 - b) / 300)
    assert f1.high - f1.low == pytest.approx(2 * 1.96 * error, rel=0.1)


# --- differences and means ------------------------------------------------------------------------------------------


def test_difference_is_paired() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(-1, 2, size=200).tolist()
    a = [label if rng.random() < 0.5 else 3 for label in labels]
    same = f1_difference(a, a, labels, **FAST)
    assert [(each.value, each.low, each.high) for each in same.values()] == [(0.0, 0.0, 0.0)] * 3
    b = [label if prediction == label or rng.random() < 0.2 else 3 for prediction, label in zip(a, labels, strict=True)]
    found = f1_difference(a, b, labels, **FAST)
    gap = found["f1"]
    for name, kind in (("acc_error", False), ("acc_correct", True)):
        hits = [[p == y for p, y in zip(each, labels, strict=True) if (y == -1) is kind] for each in (a, b)]
        assert found[name].value == pytest.approx(np.mean(hits[1]) - np.mean(hits[0]))
    expected = brute_f1(b, labels) - brute_f1(a, labels)  # type: ignore[operator]
    assert gap.value == pytest.approx(float(expected))
    assert gap.low > 0  # b is never worse: far narrower than two separate intervals
    back = f1_difference(b, a, labels, **FAST)
    reverse = back["f1"]
    assert (reverse.value, reverse.low, reverse.high) == pytest.approx((-gap.value, -gap.high, -gap.low))
    (part,) = f1_difference([0], [1], [0], **FAST).items()
    assert (part[0], part[1].value) == ("acc_error", -1.0), "without a correct solution there is no F1"


# --- first error and threshold --------------------------------------------------------------------------------------


def test_first_error_is_the_first_step_strictly_below() -> None:
    assert predicted_first_error([0.9, 0.4, 0.1]) == 1
    assert predicted_first_error([0.9, 0.5]) == -1
    assert predicted_first_error([0.9, 0.5], 0.51) == 1
    for scores in ([0.1, NAN], []):  # also when an earlier step decides: half a solution is no solution
        with pytest.raises(DataError, match="a first error cannot be told"):
            predicted_first_error(scores)


def random_split(rng: np.random.Generator) -> tuple[list[list[float]], list[int]]:
    scores: list[list[float]] = []
    labels = [-1, 0]
    labels += [int(label) for label in rng.integers(-1, 2, size=rng.integers(0, 10))]
    for label in labels:
        steps = int(rng.integers(max(label + 1, 1), 5))
        scores.append([float(x) for x in rng.choice([0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.95, 1.0], size=steps)])
    return scores, labels


def test_tuned_threshold_is_the_best_of_all() -> None:
    rng = np.random.default_rng(3)
    fine = np.unique(np.concatenate([np.linspace(0, 1, 401), [1.0 + 1e-9]]))
    for _ in range(60):
        scores, labels = random_split(rng)
        threshold = tune_threshold(scores, labels)
        everywhere = [brute_f1([predicted_first_error(row, t) for row in scores], labels) for t in fine if t <= 1]
        best = max(float(f1) for f1 in everywhere if f1 is not None)
        there = brute_f1([predicted_first_error(row, threshold) for row in scores], labels)
        assert there is not None
        assert float(there) == pytest.approx(best)


def test_ties_go_towards_one_half() -> None:
    # Every threshold in (0.1, 0.9] is perfect.
    assert tune_threshold([[0.9, 0.1], [0.9]], [1, -1]) == 0.5
    # Perfect in (0.6, 0.9]: the mid-point; and in (0.1, 0.3].
    assert tune_threshold([[0.9, 0.6], [0.9]], [1, -1]) == pytest.approx(0.75)
    assert tune_threshold([[0.9, 0.1], [0.3]], [1, -1]) == pytest.approx(0.2)


def test_neighbouring_floats_are_told_apart() -> None:
    low = 0.7
    high = float(np.nextafter(low, 1))
    assert low < tune_threshold([[low], [high]], [0, -1]) <= high


def test_tuning_refuses_what_it_cannot_tune_on() -> None:
    with pytest.raises(DataError, match="undefined on 0 solutions with an error and 1 without"):
        tune_threshold([[0.5]], [-1])
    with pytest.raises(DataError, match="a step has no score"):
        tune_threshold([[0.5], [NAN]], [-1, 0])


# --- baselines ------------------------------------------------------------------------------------------------------


def test_calling_every_solution_correct_scores_nothing() -> None:
    result = processbench_f1([-1] * 3, [0, 3, -1], **FAST)
    assert result.acc_error is not None
    assert result.acc_correct is not None
    assert result.f1 is not None
    assert (result.acc_error.value, result.acc_correct.value, result.f1.value) == (0.0, 1.0, 0.0)


def test_random_baseline_against_uniform_scores() -> None:
    labels, steps, threshold = [0, 2, -1, -1, 1], [2, 3, 1, 3, 4], 0.3
    baseline = random_baseline(labels, steps, threshold)
    assert baseline["acc_error"] == pytest.approx((0.3 + 0.7**2 * 0.3 + 0.7 * 0.3) / 3)
    assert baseline["acc_correct"] == pytest.approx((0.7 + 0.7**3) / 2)
    rng = np.random.default_rng(4)
    drawn = [[predicted_first_error(rng.random(n).tolist(), threshold) for n in steps * 400] for _ in range(5)]
    f1 = [float(brute_f1(predictions, labels * 400) or 0) for predictions in drawn]
    assert baseline["f1"] == pytest.approx(np.mean(f1), abs=0.02)  # standard error 0.006


@pytest.mark.parametrize(("predictions", "labels"), [([0], [0, 1]), ([0], [-2]), ([-2], [0])])
def test_bad_rows(predictions: list[int], labels: list[int]) -> None:
    with pytest.raises(DataError, match=f"{len(predictions)} predictions for {len(labels)} labels"):
        processbench_f1(predictions, labels)


def test_no_rows_give_no_numbers() -> None:
    assert processbench_f1([], []).to_dict() == {
        "acc_error": None, "acc_correct": None, "f1": None, "n_error": 0, "n_correct": 0
    }  # fmt: skip


# --- critics --------------------------------------------------------------------------------------------------------


def test_what_a_critic_does_not_answer_is_a_miss_in_every_f1() -> None:
    """Two of ten solutions are answered, correctly; of a step whose verdict is not needed none is missed."""
    nothing = {"critiques": [], "without_verdict": 1, "generated_tokens": 0, "prefill_tokens": 0}
    shared = {"set": "gsm8k", "completions": ["a", "b"], "score_facts": nothing}
    kinds = [(-1, [1.0, 1.0], -1), (0, [0.0, None], 0), *[(-1, [1.0, None], None)] * 4, *[(1, [None, 0.0], None)] * 4]
    rows = [
        shared | {"id": str(i), "prompt": str(i), "scores": scores, "prediction": named}
        | {"first_error": first, "labels": [True, True] if first < 0 else [first > 0, False]}
        for i, (first, scores, named) in enumerate(kinds)
    ]  # fmt: skip
    summary = summarise_process(rows)
    section = summary["sets"]["gsm8k"]
    for found in (section["fixed"], section["predicted"], summary["mean"]):
        assert [found[name]["value"] for name in ("acc_error", "acc_correct")] == [0.2, 0.2]
        assert found["f1"]["value"] == pytest.approx(0.2)
    assert (section["solutions"], section["unscored_solutions"]) == (1, 9)
    assert section["baselines"]["random"]["f1"] > 0
    named = [row | {"prediction": -1} for row in rows]
    assert summarise_process(named)["mean"]["acc_correct"]["value"] == 1.0, "its own predictions, not the threshold's"
    plain = [{key: row[key] for key in row if key != "score_facts"} for row in rows]
    assert summarise_process(plain)["sets"]["gsm8k"]["fixed"]["n_correct"] == 1, "another scorer's are left out"
