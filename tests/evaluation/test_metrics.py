"""pass@k, maj@k, summaries and comparisons of result rows against closed forms and enumeration."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.metrics import compare_runs, g_pass_at_k, summarise
from stepkd.runs.files import write_json, write_jsonl
from stepkd.search.best_of_n import maj_at_k, pass_at_k
from stepkd.statistics import wilson_interval


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


# --- G-Pass@k -------------------------------------------------------------------------------------------------------


def test_g_pass_at_k_equals_enumeration_of_subsets() -> None:
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            hits = np.array([sum(i < c for i in subset) for subset in itertools.combinations(range(n), k)])
            for tau in (0.0, 0.01, 0.25, 0.5, 0.75, 1.0, *(i / k for i in range(k + 1))):
                exact = np.mean(hits >= math.ceil(round(tau * k, 9)))
                assert float(g_pass_at_k(n, c, k, tau)) == pytest.approx(exact, abs=1e-13)
            shares = [float(g_pass_at_k(n, c, k, i / k)) for i in range(math.ceil(k / 2) + 1, k + 1)]
            assert float(g_pass_at_k(n, c, k, None)) == pytest.approx(2 / k * sum(shares), abs=1e-13)


def test_g_pass_at_k_in_closed_form() -> None:
    n, c = np.array([48, 48, 48, 48]), np.array([0, 48, 30, 20])
    assert g_pass_at_k(n, c, 16, 1.0) == pytest.approx(
        [0, 1, *(math.comb(x, 16) / math.comb(48, 16) for x in (30, 20))]
    )
    assert g_pass_at_k(n, c, 16, 1e-6) == pytest.approx(pass_at_k(n, c, 16), abs=1e-13)
    assert g_pass_at_k(16, np.arange(17), 16, 0.75) == pytest.approx(1.0 * (np.arange(17) >= 12)), "one draw: all"
    assert g_pass_at_k(n[:2], c[:2], 16, None) == pytest.approx([0, 1])
    # Large k: nearly the binomial's tail at the same rate.
    assert float(g_pass_at_k(10_000, 5_000, 4, 0.5)) == pytest.approx(11 / 16, abs=1e-3)


@pytest.mark.parametrize(("n", "c", "k", "tau"), [(4, 2, 5, 0.5), (4, 5, 1, 0.5), (4, 2, 2, 1.5), (4, 2, 2, -0.1)])
def test_g_pass_at_k_refuses_impossible_counts_and_shares(n: int, c: int, k: int, tau: float) -> None:
    with pytest.raises(ConfigError, match=r"pass@|Pass@"):
        g_pass_at_k(n, c, k, tau)


def test_g_pass_is_reported_at_the_largest_k_with_three_times_the_samples() -> None:
    counts = range(0, 25, 6)
    verdicts = {c: ["correct"] * c + ["incorrect"] * (24 - c) for c in counts}
    many = [{"id": str(c), "samples": [sample(verdict, verdict) for verdict in verdicts[c]]} for c in counts]
    metrics = summarise(many, [1, 2, 4, 8, 16], n_resamples=200)["metrics"]
    names = [name for name in metrics if "Pass" in name]
    assert names == ["G-Pass@8_0.5", "G-Pass@8_0.75", "G-Pass@8_1.0", "mG-Pass@8"]
    for name, tau in zip(names, [0.5, 0.75, 1.0, None], strict=True):
        assert metrics[name]["value"] == pytest.approx(np.mean([g_pass_at_k(24, c, 8, tau) for c in counts]))
        assert metrics[name]["low"] < metrics[name]["value"] < metrics[name]["high"]
    assert metrics["avg@24"] == metrics["pass@1"]


# --- majority vote --------------------------------------------------------------------------------------------------


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer; of tied ones the first."""
    return Counter(answer for answer in answers if answer is not None).most_common(1)[0][0]


def test_first_seen_rule_averages_to_even_split_over_orders() -> None:
    answers = ["1", "2", "2", "1", None, "3"]
    wins = [majority_vote(order) == "1" for order in itertools.permutations(answers)]
    correct = [answer == "1" for answer in answers]
    assert sum(wins) / len(wins) == pytest.approx(maj_at_k(answers, correct, len(answers)))
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
    answers, correct = ["a", "b", "b", "a", "c", None], [True, False, False, True, False, False]
    values = set()
    for order in itertools.permutations(range(6)):
        values.add(maj_at_k([answers[i] for i in order], [correct[i] for i in order], 4))
    assert max(values) - min(values) < 1e-14
    assert maj_at_k(["a", "b"], [True, False], 2) == 0.5
    assert maj_at_k([None, None], [True, True], 2) == 0.0
    assert maj_at_k([None, None, "a"], [False, False, True], 2) == pytest.approx(2 / 3)


def test_maj_at_1_is_the_share_of_correct_parsed_samples() -> None:
    assert maj_at_k(["a", "a", "b", None], [True, True, False, False], 1) == pytest.approx(0.5)


def test_maj_at_k_for_many_samples_matches_sampled_draws() -> None:
    rng = np.random.default_rng(0)
    answers = ["a"] * 20 + ["b"] * 19 + ["c"] * 15 + [None] * 10
    correct = [answer == "a" for answer in answers]
    wins = []
    for _ in range(20_000):
        draw = [answers[i] for i in rng.permutation(64)[:9]]
        wins.append(majority_vote(draw) == "a")
    assert maj_at_k(answers, correct, 9) == pytest.approx(np.mean(wins), abs=4 * 0.5 / math.sqrt(20_000))
    # No overflow: 5,000 draws from a 60/40 split elect the larger class for certain.
    assert maj_at_k(["a"] * 3000 + ["b"] * 2000, [True] * 3000 + [False] * 2000, 1) == pytest.approx(0.6, rel=1e-9)


def test_maj_at_k_bad_input() -> None:
    with pytest.raises(ConfigError, match="2 answers but 1 verdicts"):
        maj_at_k(["a", "b"], [True], 1)
    with pytest.raises(ConfigError, match=r"maj@3 needs .* there are 2; draw more samples or lower k"):
        maj_at_k(["a", "b"], [True, False], 3)


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
                sample("incorrect", "2", step_labels=[False]),
                sample("unparsed", None, finish="length", tokens=50, step_labels=[]),
            ],
        },
        {
            "id": "p1",
            "index": 1,
            "samples": [
                sample("incorrect", "3", step_labels=[True, True]),
                sample("timeout", None),
                sample("incorrect", "4"),
                sample("correct", "5"),
            ],
        },
    ]


def test_summarise_by_hand() -> None:
    summary = summarise(rows(), [2, 4], seed=1, n_resamples=200)
    values = {name: entry["value"] for name, entry in summary["metrics"].items()}
    votes = [[s["vote"] for s in row["samples"]] for row in rows()]
    correct = [[s["verdict"] == "correct" for s in row["samples"]] for row in rows()]
    assert values == pytest.approx(
        {
            "pass@1": (2 / 4 + 1 / 4) / 2,
            "pass@2": (5 / 6 + 1 / 2) / 2,
            "maj@2": sum(enumerated_maj(v, r, 2) for v, r in zip(votes, correct, strict=True)) / 2,
            "pass@4": 1.0,
            "maj@4": (1 + 1 / 3) / 2,
            "avg@4": (2 / 4 + 1 / 4) / 2,
            "unparsed_rate": 1 / 8,
            "timeout_rate": 1 / 8,
            "truncated_rate": 1 / 8,
            "truncated_answered_rate": 0.0,
            "mean_tokens": 15.0,
            "step_accuracy": 6 / 8,
            "correct_with_incorrect_step": 1 / 2,
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
        {"id": f"p{i}", "index": i, "samples": [sample("correct" if i < 3 else "incorrect", str(i))]} for i in range(10)
    ]
    summary = summarise(single)
    assert summary["metrics"]["pass@1"] == wilson_interval(3, 10).to_dict()
    assert "step_accuracy" not in summary["metrics"]
    assert "maj@1" not in summary["metrics"]


def test_summarise_one_problem_gives_null_bounds_only_where_undefined() -> None:
    summary = summarise(rows()[:1], n_resamples=50)
    assert summary["metrics"]["mean_tokens"] == {"value": 20.0, "low": None, "high": None, "method": "bootstrap"}
    assert summary["metrics"]["pass@1"] == wilson_interval(0.5, 1).to_dict()


def test_summarise_step_ratio_without_correct_samples_is_null() -> None:
    incorrect = [
        {"id": str(i), "index": i, "samples": [sample("incorrect", "1", step_labels=[True])]} for i in range(3)
    ]
    metrics = summarise(incorrect, n_resamples=50)["metrics"]
    assert metrics["correct_with_incorrect_step"]["value"] is None
    assert metrics["step_accuracy"] == wilson_interval(3, 3).to_dict()


def test_summarise_bad_input() -> None:
    with pytest.raises(DataError, match="no results"):
        summarise([])
    with pytest.raises(DataError, match="'p0' occurs twice"):
        summarise([rows()[0], rows()[0]])
    with pytest.raises(ConfigError, match=r"pass@5 needs .* there are 4"):
        summarise(rows(), [5])
    with pytest.raises(DataError, match="'a' has no id or no samples"):
        summarise([{"id": "a", "index": 0, "samples": []}])


# --- two runs compared ------------------------------------------------------------------------------------------------


def write_run(folder: Path, correct: dict[str, list[bool]], **changes: Any) -> Path:
    """A run folder with the given verdicts per problem id."""
    settings: dict[str, Any] = {
        "kind": "evaluation",
        "model": {"name": "acme/tiny"},
        "seed": 0,
        "device": "cpu",
        "benchmark": {"name": "gsm8k", "data": "d1", "limit": None},
    }
    write_json(folder / "settings.json", settings | changes)
    rows = [
        {
            "id": key,
            "index": i,
            "samples": [
                {"verdict": "correct" if good else "incorrect", "tokens": 1, "finish": "stop"} for good in verdicts
            ],
        }
        for i, (key, verdicts) in enumerate(correct.items())
    ]
    write_jsonl(folder / "results.jsonl", rows)
    return folder


def test_numbers_against_brute_force(tmp_path: Path) -> None:
    a = {"p0": [True, False], "p1": [False, False], "p2": [True, True], "p3": [False, True]}
    b = {"p0": [True, True], "p1": [True, False], "p2": [False, True], "p3": [True, True]}
    result = compare_runs(
        write_run(tmp_path / "a", a),
        write_run(tmp_path / "b", b, model={"name": "acme/new"}),
        n_resamples=20_000,
    )
    gaps = np.array([0.5, 0.5, -0.5, 0.5])
    resampled = sorted(np.mean(draw) for draw in itertools.product(gaps, repeat=4))
    assert result.difference.value == pytest.approx(0.25)
    # All 4^4 resamples: the 2.5% and 97.5% points of their means.
    assert result.difference.low == pytest.approx(np.quantile(resampled, 0.025))
    assert result.difference.high == pytest.approx(np.quantile(resampled, 0.975))
    assert (result.pass1_a.value, result.pass1_b.value) == (0.5, 0.75)
    assert (result.fixed, result.broken) == (("p1", "p3"), ("p2",))
    assert result.mcnemar_p == 1.0  # 2 against 1 of 3
    assert result.mcnemar_mid_p == pytest.approx(1 - 3 / 8)
    assert dict(result.settings) == {"model.name": ("acme/tiny", "acme/new")}
    assert result.warnings == ()


def test_swapping_the_runs_mirrors_the_result(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a = write_run(tmp_path / "a", {f"p{i}": [bool(rng.random() < 0.4)] for i in range(60)})
    b = write_run(tmp_path / "b", {f"p{i}": [bool(rng.random() < 0.7)] for i in range(60)})
    there, back = compare_runs(a, b), compare_runs(b, a)
    assert there.difference.value == -back.difference.value
    assert (there.difference.low, there.difference.high) == pytest.approx((-back.difference.high, -back.difference.low))
    assert (there.fixed, there.broken, there.mcnemar_p) == (back.broken, back.fixed, back.mcnemar_p)
    assert there.pass1_a.method == "wilson"


def test_pairs_by_id_and_warns_of_the_rest(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"x": [True], "y": [False], "only": [True]})
    b = write_run(tmp_path / "b", {"y": [True], "x": [True]}, limit=2)
    result = compare_runs(a, b)
    assert (result.problems, result.fixed, result.broken) == (2, ("y",), ())
    assert result.warnings == ("1 problems only in A and 0 only in B are left out",)
    assert "warning: 1 problems only in A" in str(result)


def test_identical_runs_and_one_problem(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"x": [True], "y": [False]})
    same = compare_runs(a, a)
    assert (same.difference.value, same.difference.low, same.difference.high) == (0.0, 0.0, 0.0)
    assert same.mcnemar_p == 1.0
    single = compare_runs(write_run(tmp_path / "b", {"x": [True]}), write_run(tmp_path / "c", {"x": [False]}))
    assert "-1.000 [no interval]" in str(single)
    assert single.to_dict()["difference"]["low"] is None


def test_text_and_dict(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {f"p{i:02d}": [False] for i in range(14)})
    b = write_run(tmp_path / "b", {f"p{i:02d}": [i > 0] for i in range(14)}, seed=3)
    result = compare_runs(a, b)
    text = str(result)
    assert text.splitlines()[0] == "gsm8k: 14 problems in both runs, 95% intervals"
    assert "first sample: 13 fixed, 0 broken in B, exact McNemar p = 0.000244" in text
    assert "p09, p10, and 3 more" in text
    assert "seed: 0 -> 3" in text
    as_dict = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert len(as_dict["fixed"]) == 13
    assert as_dict["difference"]["value"] == pytest.approx(13 / 14)
    assert as_dict["settings"] == {"seed": [0, 3]}


def test_refusals(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"x": [True]})
    other = write_run(tmp_path / "other", {"x": [True]}, benchmark={"name": "svamp", "data": "d1", "limit": None})
    with pytest.raises(ConfigError, match="different benchmarks: 'gsm8k' and 'svamp'"):
        compare_runs(a, other)
    changed = write_run(tmp_path / "changed", {"x": [True]}, benchmark={"name": "gsm8k", "data": "d2", "limit": None})
    with pytest.raises(ConfigError, match=r"different data \(fingerprints\): 'd1' and 'd2'"):
        compare_runs(a, changed)
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "settings.json").write_text('{"kind": "labelling job"}')
    for pair in ((labels, labels), (a, labels)):
        with pytest.raises(ConfigError, match=r"labels holds no evaluation, but another kind of job \(labelling job\)"):
            compare_runs(*pair)
    with pytest.raises(DataError, match=r"no finished problem in common \(1 and 1\)"):
        compare_runs(a, write_run(tmp_path / "later", {"y": [True]}))
    with pytest.raises(DataError, match="no settings of a job there"):
        compare_runs(a, tmp_path / "nowhere")
    (a / "results.jsonl").unlink()
    with pytest.raises(DataError, match=r"no results there: .*is it finished"):
        compare_runs(a, tmp_path / "later")
    with pytest.raises(DataError, match="'x' has no id or no samples"):
        compare_runs(write_run(tmp_path / "none", {"x": []}), write_run(tmp_path / "d", {"x": [True]}))
