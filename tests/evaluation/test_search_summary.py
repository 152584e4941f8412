"""What a search's rows say: differences at equal tokens and bins of difficulty, in closed form; and the table of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from stepkd.claims.runner import value_array
from stepkd.errors import DataError
from stepkd.evaluation.best_of_n import ProblemSamples, bon_curve
from stepkd.evaluation.search_summary import (
    BINS,
    at_budget,
    budget_of,
    difficulty_bin,
    search_columns,
    summarise_search,
)
from stepkd.statistics import estimate_mean

FAST = {"n_resamples": 50}


def row(index: int, method: str, samples: Sequence[Mapping[str, Any]], generated: int, **more: Any) -> dict[str, Any]:
    costs = {"tokens": {"generated": generated, "scored": 4}, "scorer_calls": 1, "unscored": 0, "trace": []}
    return {"id": str(index), "index": index, "method": method, "samples": list(samples), **costs, **more}


def sample(correct: bool, score: float | None = None, finish: str = "stop") -> dict[str, Any]:
    scores = dict.fromkeys(("product", "min", "mean", "last"), score)
    verdict, vote = ("correct", "1") if correct else ("incorrect", "2")
    return {"verdict": verdict, "vote": vote, "finish": finish, "tokens": 10, "scores": scores}


def rows(generated: int = 15) -> list[dict[str, Any]]:
    """Two problems with two samples of 10 tokens each: one correct with the higher score, and none correct."""
    good, bad = sample(True, 0.9), sample(False, 0.2)
    return [
        row(0, "pool", [good, bad], 20),
        row(1, "pool", [bad, bad], 20),
        row(0, "greedy", [bad], 10),
        row(1, "greedy", [bad], 10),
        row(1, "beam", [sample(False, finish="length")], generated, unscored=2),
        row(0, "beam", [good], generated),
        row(0, "difficulty", [good, bad, bad], 30),
        row(1, "difficulty", [bad, bad, bad], 30),
    ]


def with_drafts(all_rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of which those of the beam have drafted, too."""
    return [each | {"drafted": 6, "passes": 3, "no_room": 1} if each["method"] == "beam" else each for each in all_rows]


def summarised(all_rows: Sequence[dict[str, Any]], **options: Any) -> dict[str, Any]:
    return summarise_search(all_rows, ["greedy", "beam"], [1, 2], **{"reduction": "product", **FAST, **options})


def test_what_a_method_spends_beside_its_tokens_is_in_the_summary() -> None:
    told = summarised(with_drafts(rows()))["methods"]
    assert [told["beam"][name]["value"] for name in ("drafted", "passes")] == [6, 3]
    assert told["beam"]["no_room"] == 2
    assert ("drafted" in told["greedy"], told["greedy"]["no_room"]) == (False, 0)


def test_best_of_n_at_a_budget_lies_on_the_line_between_whole_numbers_of_samples() -> None:
    summary = summarised(rows(generated=15))
    beam = summary["methods"]["beam"]
    assert beam["budget"] == {"samples": 1.5, "used": 1.5, "clamped": False}
    # Problem 0: by score 1/2 at k=1 and 1 at k=2, so 3/4; by majority 1/2 at both. Problem 1: 0.
    assert beam["minus_best_of_n"]["max"]["value"] == pytest.approx((1 - 0.75) / 2)
    assert beam["minus_best_of_n"]["majority"]["value"] == pytest.approx((1 - 0.5) / 2)
    assert beam["minus_best_of_n"]["weighted"]["value"] == pytest.approx((1 - 0.75) / 2)
    assert beam["minus_greedy"]["value"] == 0.5
    assert summary["methods"]["greedy"]["minus_greedy"] is None
    assert list(summarised(rows(), reduction=None)["methods"]["beam"]["minus_best_of_n"]) == ["majority"]


def test_columns_are_the_summary_problem_by_problem() -> None:
    columns = search_columns(rows(generated=15)[::-1], ["greedy", "beam"], reduction="product")
    assert (columns["beam"], columns["beam.tokens"]) == ([1.0, 0.0], [15.0, 15.0])
    assert (columns["beam.scored_tokens"], columns["beam.scorer_calls"]) == ([4.0, 4.0], [1.0, 1.0])
    summary = summarised(rows(generated=15))["methods"]["beam"]["minus_best_of_n"]
    for vote, minus in summary.items():
        assert sum(columns[f"beam.over_{vote}"]) / 2 == pytest.approx(minus["value"])
    assert columns["beam.over_max"] == pytest.approx([1 - 0.75, 0])
    assert "greedy.over_max" not in search_columns(rows(), ["greedy"])


def test_a_gain_over_a_pool_that_is_too_small_is_undefined_in_a_claim() -> None:
    columns = search_columns(rows(generated=21), ["greedy", "beam"])
    assert columns["beam.over_majority"] == [[0.0, 0.0]] * 2
    assert columns["greedy.over_majority"] == pytest.approx([-0.5, 0.0]), (
        "one sample of each problem is compared with one"
    )
    assert math.isnan(estimate_mean([value_array(columns["beam.over_majority"])] * 2).decides.low)


def test_a_budget_beyond_the_pool_is_compared_with_all_of_it_and_says_so() -> None:
    beam = summarised(rows(generated=47))["methods"]["beam"]
    assert beam["budget"] == {"samples": 4.7, "used": 2.0, "clamped": True}
    assert beam["minus_best_of_n"]["max"]["value"] == 0.0
    small = budget_of(np.array([3.0, 4.0]), np.array([80.0, 80.0]), 8)
    assert (small["used"], small["clamped"]) == (1.0, True)
    with pytest.raises(DataError, match="the samples of all problems are empty"):
        budget_of(np.zeros(2), np.zeros(2), 8)


@pytest.mark.parametrize("size", [3, 5, 6, 7, 12])
def test_a_method_that_draws_the_whole_pool_has_its_size_as_budget_without_rounding(size: int) -> None:
    for pool in np.random.default_rng(size).integers(1, 400, (200, 4)).astype(float):
        assert budget_of(pool, pool, size) == {"samples": size, "used": size, "clamped": False}


def test_a_difference_that_all_problems_share_has_no_interval() -> None:
    all_rows = [row(i, name, [sample(name == "beam")] * (2 if name == "pool" else 1), 10)
                for i in range(10) for name in ("pool", "greedy", "beam")]  # fmt: skip
    summary = summarised(all_rows)
    for minus in (summary["methods"]["beam"]["minus_greedy"], *summary["methods"]["beam"]["minus_best_of_n"].values()):
        assert (minus["value"], minus["low"], minus["high"]) == (1.0, None, None)
    fall = summary["pool"]["peaks"]["majority"]["fall"]
    assert (fall["value"], fall["low"], fall["high"]) == (0.0, None, None)


@pytest.mark.parametrize(("samples", "value"), [(1.0, 0.2), (1.25, 0.3), (2.0, 0.6), (3.5, 0.7), (4.0, 0.8)])
def test_interpolation_is_linear_and_exact_at_whole_numbers(samples: float, value: float) -> None:
    curve = np.array([[0.2, 0.6, 0.6, 0.8]])
    ks = sorted({math.floor(samples), math.ceil(samples)})
    assert at_budget(curve[:, [k - 1 for k in ks]], samples) == pytest.approx([value])


def test_counts_costs_and_accuracy_by_tokens() -> None:
    summary = summarised(rows())
    beam = summary["methods"]["beam"]
    assert (beam["accuracy"]["value"], beam["accuracy"]["method"]) == (0.5, "wilson")
    assert beam["accuracy_per_1000_tokens"]["value"] == pytest.approx(1000 * 1 / 30)
    assert [beam[cost]["value"] for cost in ("generated_tokens", "scored_tokens", "scorer_calls")] == [15, 4, 1]
    assert [beam[count] for count in ("cut_off", "unparsed", "unscored")] == [1, 0, 2]
    assert summary["pool"]["generated_tokens"]["value"] == 10
    curves = {name: [each["value"] for each in curve] for name, curve in summary["pool"]["curves"].items()}
    assert {name: [round(value, 9) for value in curve] for name, curve in curves.items()} == {
        "pass": [0.25, 0.5],
        "majority": [0.25, 0.25],
        **{name: [0.25, 0.5] for each in ("product", "min", "mean", "last") for name in (each, f"{each}_vote")},
    }


def test_problems_are_binned_by_the_pass_rate_of_samples_that_no_method_used() -> None:
    rates = [0, 1 / 8, 1 / 3, 3 / 8, 2 / 3, 5 / 7, 7 / 8, 1]
    assert [difficulty_bin(rate) for rate in rates] == [0, 1, 1, 2, 2, 3, 3, 4]
    summary = summarised(rows())
    assert summary["difficulty"]["bins"] == dict(zip(BINS, (1, 1, 0, 0, 0), strict=True))
    assert summary["difficulty"]["pass_rate"]["value"] == pytest.approx(1 / 6)
    told = summary["methods"]["beam"]["by_difficulty"]
    assert [each and each["value"] for each in told.values()] == [0.0, 1.0, None, None, None]
    without = summarised([each for each in rows() if each["method"] != "difficulty"])
    assert (without["difficulty"], without["methods"]["beam"]["by_difficulty"]) == (None, {})


def test_the_order_of_rows_does_not_matter_and_missing_ones_are_refused() -> None:
    assert summarised(rows()[::-1]) == summarised(rows())
    with pytest.raises(DataError, match="'beam' are not of the problems of the pool"):
        summarised([each for each in rows() if (each["method"], each["index"]) != ("beam", 1)])


def test_a_curve_that_falls_has_its_peak_and_the_fall_behind_it() -> None:
    """Three correct samples of four, and the incorrect one has the highest score: 3/4, 1/2, 1/4, 0."""
    problems = [ProblemSamples(str(i), [True, True, True, False], ["1", "1", "1", "2"]) for i in range(3)]
    result = bon_curve(problems, [1, 2, 4], {"judge": [[0.1, 0.2, 0.3, 0.9]] * 3}, **FAST)
    assert [interval.value for interval in result.curves["judge"]] == pytest.approx([0.75, 0.5, 0.0])
    assert (result.peaks["judge"].k, result.peaks["judge"].fall.value) == (1, pytest.approx(0.75))
    assert (result.peaks["majority"].k, result.peaks["majority"].fall.value) == (4, 0.0)
    assert result.to_dict()["peaks"]["judge"]["k"] == 1


def test_the_table_shows_every_method_and_what_a_reader_must_know(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from stepkd.cli.search import notes, print_summary

    summary = {"model": "m", "benchmark": "task", **summarised(with_drafts(rows(generated=47)))}
    print_summary(Console(width=80), summary)
    text = capsys.readouterr().out
    words = ("m on task: 2 problems", "greedy", "beam", "- weighted *", "0 to 1/3", "(9.5 to 90.5)", "+50.0", "(at 2)")
    for word in (*words, "(no interval)", "10.64"):
        assert word in text
    assert "1/3 to 2/3" not in text, "bins without problems are left out"
    long = summary | {
        "methods": {"a_name_of_many_words_" * 2 + name: each for name, each in summary["methods"].items()}
    }
    print_summary(Console(width=80), long)
    assert "(9.5 to 90.5)" in capsys.readouterr().out, "a long name is folded"
    assert notes(summary) == [
        "beam draws as many tokens as 4.7 samples, and is compared with best-of-2, which draws fewer: "
        "--samples 5 would reach its budget",
        "beam: 1 of 2 answers were cut off: see --sampling.max_new_tokens, --max_step_tokens",
        "beam: 2 solutions had no score, and ranked last",
        "beam: 2 prompts about drafts left no room for an answer",
        "beam: 6 tokens of the small model per problem, which are in no table, and 3 forward passes of the policy",
    ]
    cheap = notes(summarised(rows(generated=5)))
    assert cheap[-1] == "compared with one sample, which draws more tokens than they do: beam"
