"""pass@k, maj@k, intervals and paired tests against closed forms and enumeration."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.errors import ConfigError, DataError
from stepkd.evaluation import intervals
from stepkd.evaluation.intervals import (
    cluster_bootstrap,
    mcnemar_exact,
    mean_interval,
    paired_bootstrap,
    ratio_interval,
    ratio_of_sums,
    wilson_interval,
)
from stepkd.evaluation.metrics import maj_at_k, pass_at_k, summarise


def enumerated_maj(answers: list[str | None], correct: list[bool], k: int) -> float:
    """maj@k by visiting every subset, with exact fractions."""
    total, subsets = Fraction(0), 0
    for subset in itertools.combinations(range(len(answers)), k):
        subsets += 1
        votes = [answers[i] for i in subset if answers[i] is not None]
        if not votes:
            continue
        top = max(votes.count(key) for key in votes)
        tied = {key for key in votes if votes.count(key) == top}
        for key in tied:
            members = [correct[i] for i, answer in enumerate(answers) if answer == key]
            total += Fraction(sum(members), len(members) * len(tied))
    return float(total / subsets)


# --- pass@k ---------------------------------------------------------------------------------------------------------


def test_pass_at_k_equals_enumeration_of_subsets() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                hits = [any(i < c for i in subset) for subset in itertools.combinations(range(n), k)]
                assert float(pass_at_k(n, c, k)) == pytest.approx(sum(hits) / len(hits), abs=1e-14)


def test_pass_at_k_is_vectorised_and_exact_at_the_ends() -> None:
    values = pass_at_k(np.array([10, 10, 4]), np.array([0, 10, 2]), 2)
    assert values[0] == 0.0
    assert values[1] == 1.0
    assert values[2] == pytest.approx(1 - 1 / 6)
    assert float(pass_at_k(10_000, 1, 100)) == pytest.approx(0.01)  # no overflow: chance that the one is drawn


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), (0, 0, 1), (4, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ConfigError, match=r"pass@k|draw more samples or lower k"):
        pass_at_k(n, c, k)


# --- majority vote --------------------------------------------------------------------------------------------------


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer; of tied ones the first."""
    return Counter(answer for answer in answers if answer is not None).most_common(1)[0][0]


def test_first_seen_rule_averages_to_even_split_over_orders() -> None:
    answers = ["1", "2", "2", "1", None, "3"]
    wins = [majority_vote(order) == "1" for order in itertools.permutations(answers)]
    right = [answer == "1" for answer in answers]
    assert sum(wins) / len(wins) == pytest.approx(maj_at_k(answers, right, len(answers)))
    assert sum(wins) / len(wins) == pytest.approx(0.5)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d", None]), st.booleans()), min_size=1, max_size=8),
    st.data(),
)
def test_maj_at_k_equals_enumeration_of_subsets(samples: list[tuple[str | None, bool]], data: st.DataObject) -> None:
    answers = [answer for answer, _ in samples]
    correct = [good for _, good in samples]
    k = data.draw(st.integers(1, len(samples)))
    assert maj_at_k(answers, correct, k) == pytest.approx(enumerated_maj(answers, correct, k), abs=1e-12)


def test_maj_at_k_does_not_depend_on_order_and_handles_ties() -> None:
    answers, right = ["a", "b", "b", "a", "c", None], [True, False, False, True, False, False]
    values = set()
    for order in itertools.permutations(range(6)):
        values.add(maj_at_k([answers[i] for i in order], [right[i] for i in order], 4))
    assert max(values) - min(values) < 1e-14
    assert maj_at_k(["a", "b"], [True, False], 2) == 0.5
    assert maj_at_k([None, None], [True, True], 2) == 0.0
    assert maj_at_k([None, None, "a"], [False, False, True], 2) == pytest.approx(2 / 3)


def test_maj_at_1_is_the_share_of_right_parsed_samples() -> None:
    assert maj_at_k(["a", "a", "b", None], [True, True, False, False], 1) == pytest.approx(0.5)


def test_maj_at_k_for_many_samples_matches_sampled_draws() -> None:
    rng = np.random.default_rng(0)
    answers = ["a"] * 20 + ["b"] * 19 + ["c"] * 15 + [None] * 10
    right = [answer == "a" for answer in answers]
    wins = []
    for _ in range(20_000):
        draw = [answers[i] for i in rng.permutation(64)[:9]]
        wins.append(majority_vote(draw) == "a")
    assert maj_at_k(answers, right, 9) == pytest.approx(np.mean(wins), abs=4 * 0.5 / math.sqrt(20_000))
    # No overflow: 5,000 draws from a 60/40 split elect the larger class for certain.
    assert maj_at_k(["a"] * 3000 + ["b"] * 2000, [True] * 3000 + [False] * 2000, 1) == pytest.approx(0.6, rel=1e-9)


def test_maj_at_k_bad_input() -> None:
    with pytest.raises(ConfigError, match="2 answers but 1 verdicts"):
        maj_at_k(["a", "b"], [True], 1)
    with pytest.raises(ConfigError, match=r"maj@3 needs .* there are 2; draw more samples or lower k"):
        maj_at_k(["a", "b"], [True, False], 3)


# --- intervals ------------------------------------------------------------------------------------------------------


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
    z = 2.5758293035489004  # 99%
    interval = wilson_interval(7, 30, level=0.99)
    for bound in (interval.low, interval.high):
        assert abs(7 / 30 - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / 30), rel=1e-9)


def test_wilson_is_symmetric_and_refuses_bad_input() -> None:
    few, many = wilson_interval(3, 10), wilson_interval(7, 10)
    assert few.low == pytest.approx(1 - many.high)
    assert wilson_interval(10, 10).high == 1.0
    with pytest.raises(ConfigError, match="successes=0, n=0"):
        wilson_interval(0, 0)
    with pytest.raises(ConfigError, match=r"level 95 must lie between 0 and 1"):
        wilson_interval(1, 2, level=95)


def test_bootstrap_equals_exact_distribution_of_two_problems() -> None:
    # Resampled means of {0, 1}: 0 (1/4), 1/2 (1/2), 1 (1/4). Their 10% and 90% points are 0 and 1, 30% and 70% are 1/2.
    wide = cluster_bootstrap([0.0, 1.0], level=0.8)
    narrow = cluster_bootstrap([0.0, 1.0], level=0.4)
    assert (wide.value, wide.low, wide.high) == (0.5, 0.0, 1.0)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_bootstrap_width_near_normal_theory_and_free_of_order_effects_of_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(1).normal(size=400)
    whole = cluster_bootstrap(values, seed=3)
    standard_error = values.std() / math.sqrt(values.size)
    assert whole.high - whole.low == pytest.approx(2 * 1.96 * standard_error, rel=0.05)
    monkeypatch.setattr(intervals, "RESAMPLE_ELEMENTS", 4_001)
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
    with pytest.raises(ConfigError, match="at least one"):
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


def test_mcnemar_large_counts_and_bad_input() -> None:
    # Normal approximation with continuity correction, far inside its range.
    z = (abs(5200 - 5000) - 1) / math.sqrt(10_200)
    assert mcnemar_exact(5200, 5000) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-2)
    assert mcnemar_exact(10, 3) == mcnemar_exact(3, 10)
    with pytest.raises(ConfigError, match="b=-1"):
        mcnemar_exact(-1, 2)


def test_paired_bootstrap_uses_pairs() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(200)
    b = a + 0.1 + 0.01 * rng.random(200)
    paired = paired_bootstrap(list(a), list(b))
    assert paired.value == pytest.approx(float(np.mean(b - a)))
    assert paired.high - paired.low < 0.002  # the shared spread of the problems cancels
    mirrored = paired_bootstrap(list(b), list(a))
    assert (mirrored.low, mirrored.high) == pytest.approx((-paired.high, -paired.low), abs=2e-4)
    with pytest.raises(ConfigError, match="got 2 and 1"):
        paired_bootstrap([1.0, 2.0], [1.0])


# --- summarise ------------------------------------------------------------------------------------------------------


def sample(verdict: str, vote: str | None, **changes: Any) -> dict[str, Any]:
    base = {"completion": "x", "extracted": vote, "verdict": verdict, "tokens": 10, "finish": "stop", "vote": vote}
    return base | {"logprob": -1.0, "step_labels": None} | changes


def rows() -> list[dict[str, Any]]:
    return [
        {
            "id": "p0",
            "index": 0,
            "samples": [
                sample("correct", "1", step_labels=[True, False, True]),
                sample("correct", "1", step_labels=[True, True]),
                sample("wrong", "2", step_labels=[False]),
                sample("unparsed", None, finish="length", tokens=50, step_labels=[]),
            ],
        },
        {
            "id": "p1",
            "index": 1,
            "samples": [
                sample("wrong", "3", step_labels=[True, True]),
                sample("timeout", None),
                sample("wrong", "4"),
                sample("correct", "5"),
            ],
        },
    ]


def test_summarise_by_hand() -> None:
    summary = summarise(rows(), [2, 4], seed=1, n_resamples=200)
    values = {name: entry["value"] for name, entry in summary["metrics"].items()}
    votes = [[s["vote"] for s in row["samples"]] for row in rows()]
    right = [[s["verdict"] == "correct" for s in row["samples"]] for row in rows()]
    assert values == pytest.approx(
        {
            "pass@1": (2 / 4 + 1 / 4) / 2,
            "pass@2": (5 / 6 + 1 / 2) / 2,
            "maj@2": sum(enumerated_maj(v, r, 2) for v, r in zip(votes, right, strict=True)) / 2,
            "pass@4": 1.0,
            "maj@4": (1 + 1 / 3) / 2,
            "unparsed_rate": 1 / 8,
            "timeout_rate": 1 / 8,
            "truncated_rate": 1 / 8,
            "truncated_answered_rate": 0.0,
            "mean_tokens": 15.0,
            "step_accuracy": 6 / 8,
            "correct_with_wrong_step": 1 / 2,
        }
    )
    assert (summary["problems"], summary["samples"], summary["total_tokens"]) == (2, 8, 120)
    assert summary["metrics"]["pass@4"]["method"] == "wilson"
    assert summary["metrics"]["pass@1"]["method"] == "bootstrap"
    json.dumps(summary, allow_nan=False)


def test_summarise_does_not_depend_on_row_or_sample_order() -> None:
    many = [{**rows()[i % 2], "id": f"q{i}", "samples": rows()[i % 2]["samples"][i // 3 :]} for i in range(6)]
    plain = summarise(many, [1, 3], n_resamples=100)
    shuffled = [{**row, "samples": row["samples"][::-1]} for row in many[3:] + many[:3]]
    again = summarise(shuffled, [3], n_resamples=100)
    for name, entry in plain["metrics"].items():
        assert again["metrics"][name] == pytest.approx(entry, abs=1e-12)


def test_summarise_single_samples_use_wilson_and_report_no_step_metrics() -> None:
    single = [
        {"id": f"p{i}", "index": i, "samples": [sample("correct" if i < 3 else "wrong", str(i))]} for i in range(10)
    ]
    summary = summarise(single)
    assert summary["metrics"]["pass@1"] == wilson_interval(3, 10).to_dict()
    assert "step_accuracy" not in summary["metrics"]
    assert "maj@1" not in summary["metrics"]


def test_summarise_one_problem_gives_null_bounds_only_where_undefined() -> None:
    summary = summarise(rows()[:1], n_resamples=50)
    assert summary["metrics"]["mean_tokens"] == {"value": 20.0, "low": None, "high": None, "method": "bootstrap"}
    assert summary["metrics"]["pass@1"] == wilson_interval(0.5, 1).to_dict()


def test_summarise_step_ratio_without_right_samples_is_null() -> None:
    wrong = [{"id": str(i), "index": i, "samples": [sample("wrong", "1", step_labels=[True])]} for i in range(3)]
    metrics = summarise(wrong, n_resamples=50)["metrics"]
    assert metrics["correct_with_wrong_step"]["value"] is None
    assert metrics["step_accuracy"] == wilson_interval(3, 3).to_dict()


def test_summarise_bad_input() -> None:
    with pytest.raises(DataError, match="no results"):
        summarise([])
    with pytest.raises(DataError, match="'p0' occurs twice"):
        summarise([rows()[0], rows()[0]])
    with pytest.raises(ConfigError, match=r"pass@5 needs .* there are 4 \(problem 'p0'\)"):
        summarise(rows(), [5])
    with pytest.raises(DataError, match="'maybe' is not one of"):
        summarise([{"id": "a", "index": 0, "samples": [sample("maybe", None)]}])
    with pytest.raises(DataError, match="'eos' is not one of"):
        summarise([{"id": "a", "index": 0, "samples": [sample("wrong", None, finish="eos")]}])
    with pytest.raises(DataError, match="token count None"):
        summarise([{"id": "a", "index": 0, "samples": [sample("wrong", None, tokens=None)]}])
    with pytest.raises(DataError, match="'a' has no id or no samples"):
        summarise([{"id": "a", "index": 0, "samples": []}])
