"""Solutions of every kind of row, the filters, and which are shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from left import evaluation_rows, scored_rows, search_rows

from stepkd.report.folders import find_folders
from stepkd.report.solutions import (
    FILTERS,
    Solution,
    merged,
    pick,
    rollout_rows,
    rounds,
    sampled_rows,
    searched_rows,
    solution,
    tags_of,
    visible,
)


def made(**more: Any) -> Solution:
    """A solution of two steps, labelled and scored correct."""
    row = {"id": "p/0", "problem_id": "p", "prompt": "x", "steps": ["a", "b"], "correct": True, "model": "m"}
    found = solution("run", row | {"step_labels": [True, True], "step_scores": [0.9, 0.9]})
    assert found is not None
    return replace(found, **more)


FITTING: dict[str, dict[str, Any]] = {
    "correct_with_incorrect_step": {"labels": (False, True)},
    "disagrees": {"scores": (0.4, 0.9)},
    "incorrect": {"correct": False, "labels": (True, None)},
    "clean": {"correct": False},
    "cut-off": {"cut_off": True},
}


@pytest.mark.parametrize("name", FITTING)
def test_a_filter_passes_what_it_names_and_not_a_plain_correct_solution(name: str) -> None:
    holds = FILTERS[name][1]
    assert holds(made(**FITTING[name]))
    assert not holds(made())


def test_what_filters_leave_out() -> None:
    assert not FILTERS["correct_with_incorrect_step"][1](made(correct=None, labels=(False, True)))  # not graded
    assert not FILTERS["incorrect"][1](made(correct=None))
    assert not FILTERS["clean"][1](made(correct=False, labels=(True, None)))  # not settled
    assert not FILTERS["clean"][1](made(correct=False, labels=()))


def test_scores_and_labels_disagree_up_to_the_first_incorrect_step_only() -> None:
    assert made(labels=(False, True, True), scores=(0.9, 0.1, 0.1)).disagrees == [0]
    assert made(labels=(True, False, True), scores=(0.9, 0.1, 0.1)).disagrees == []
    assert made(labels=(None, True), scores=(0.1, None)).disagrees == []
    assert made(labels=(True, True), scores=(0.1, 0.2), scored_by="continuations").disagrees == []  # the labels' source


def test_the_longest_are_a_twentieth_by_tokens_and_none_where_all_are_alike() -> None:
    solutions = [made(tokens=tokens) for tokens in range(40)]
    assert [i for i, own in enumerate(tags_of(solutions)) if "longest" in own] == [38, 39]
    assert not any("longest" in own for own in tags_of([made(tokens=5)] * 9))
    assert made(tokens=None).length == 2


def test_every_sample_of_an_evaluation_is_a_solution_with_its_verdict_and_labels() -> None:
    found = [solution("e", row) for row in sampled_rows(evaluation_rows("fl"))]
    assert [each and (each.problem, each.sample, each.correct, each.cut_off) for each in found] == [
        ("p0", "0", True, False),
        ("p0", "1", True, False),
        ("p1", "0", False, True),
        ("p1", "1", True, False),
    ]
    assert found[0] is not None
    assert found[0].steps == ("step of 0\n", "#### 3")
    assert found[0].labels == (False, True)
    assert found[0].answer == found[0].found == "3"


def test_a_completion_without_text_is_one_empty_step_and_a_row_without_a_text_column_is_none() -> None:
    found = solution("e", {"id": "a", "completion": ""})
    assert found is not None
    assert found.steps == ("",)
    assert solution("e", {"id": "a", "scores": [0.5]}) is None


def test_labels_and_scores_of_another_division_into_steps_are_left_out() -> None:
    found = solution("e", {"id": "a", "completion": "one\ntwo", "step_labels": [True], "step_scores": [0.5, 0.25]})
    assert found is not None
    assert found.labels == ()
    assert found.scores == (0.5, 0.25)


def test_ratings_and_soft_labels_are_read_by_the_one_rule() -> None:
    ratings = solution("e", {"id": "a", "completions": ["x", "y", "z"], "labels": [1, 0, -1]})
    soft = solution("e", {"id": "a", "completions": ["x", "y"], "labels": [0.5, 0.25]})
    assert ratings is not None
    assert soft is not None
    assert ratings.labels == (True, True, False)
    assert soft.labels == (True, False)


def test_rollouts_have_their_step_credit_and_optimiser_step() -> None:
    sample = {"id": "r", "prompt": "x", "answer": "1", "steps": ["a"], "step_scores": [0.5], "reward": 1.0}
    sample |= {"correct": True, "cut_off": True, "tokens": 3}
    (row,) = rollout_rows([{"step": 7, "samples": [sample]}])
    found = solution("run", row)
    assert found is not None
    assert (found.problem, found.sample, found.step) == ("r", "step 7, 0", 7)
    assert (found.scored_by, found.scores, found.values) == ("step credit", (0.5,), {"reward": 1.0})
    assert found.cut_off


def test_a_round_tells_candidates_and_facts_of_any_event() -> None:
    particles = {"event": "resample_all", "step": 2, "steps": ["a\n", "b"], "weights": [0.25, 1e-9], "kept": [0, 0]}
    (first, second, third) = rounds(
        [particles | {"ess": 1.5, "note": None}, "no event", {"steps": ["x"]}, {"event": "stop", "why": "x" * 100}]
    )
    assert first["head"] == "step 3, resample all, kept 1 of 2, ess 1.5"
    assert first["candidates"] == [("a", None, 2, "weights 0.25"), ("b", None, 0, "weights 1e-09")]
    assert (second["head"], second["told"], second["candidates"]) == ("decision", False, [("x", None, 0, "")])
    assert third["head"] == f"stop, why {'x' * 80}…"
    assert rounds(None) == rounds({"event": "stop"}) == ()


def test_rounds_of_odd_rows_are_shown_as_far_as_they_go() -> None:
    odd = {
        "event": 3,
        "step": "x",
        "steps": [None, 4],
        "scores": ["high", float("nan")],
        "kept": "all",
        "x": {"a": [1]},
    }
    (found,) = rounds([odd])
    assert found["head"] == '3, kept 0 of 2, x {"a": [1]}'
    assert found["candidates"] == [("solution 1", None, 0, ""), ("4", None, 0, "")]
    (found,) = rounds([{"event": "e", "steps": ["a", "b"], "scores": [0.5], "chances": [1, 2, 3], "kept": 1}])
    assert found["head"] == "e, kept 1 of 2, scores [0.5], chances [1, 2, 3]"
    assert found["candidates"] == [("a", None, 0, ""), ("b", None, 1, "")]


def test_answers_of_a_search_that_are_a_shared_sample_have_its_step_scores() -> None:
    found = [row for row in searched_rows(search_rows(2)) if row["problem_id"] == "s1"]
    assert [row["method"] for row in found] == ["greedy", "self_consistency@4", "best_of_n@4", "beam@4x2"]
    assert [row.get("step_scores") for row in found] == [None, [0.25, None], [0.9, None], None]
    assert [row["correct"] for row in found] == [False, True, True, True]
    assert found[2]["steps"] == ["pool 2\n", "#### 3"]


def test_a_chat_prompt_is_its_last_message() -> None:
    found = solution("e", scored_rows()[0])
    assert found is not None
    assert found.prompt == "2+3"


def test_control_characters_are_written_out_and_other_text_stays() -> None:
    assert visible("a\u202eb\x1b[31m\ud800") == "a⟨U+202E⟩b⟨U+001B⟩[31m⟨U+D800⟩"
    plain = "tab\there\nnext é 数 👩‍🔬 ≥"  # the joiner in an emoji is no control of direction
    assert visible(plain) == plain


def test_a_labelled_solution_that_was_scored_later_is_shown_once_with_its_scores(labels: Path, scores: Path) -> None:
    folders = find_folders([labels, scores])
    found = merged(each for folder in folders for each in folder.solutions)
    assert [folder.kind for folder in folders] == ["labelling job", "scoring job"]
    assert len(found) == 8
    assert {each.run for each in found} == {"scores"}


def test_scores_stay_where_a_later_job_labels_the_same_solution_again() -> None:
    first, second = made(), made(run="truth", labels=(False, True), scores=(), scored_by="")
    (found,) = merged([first, second])
    assert (found.run, found.labels, found.scores) == ("truth", (False, True), (0.9, 0.9))


def test_equal_samples_of_an_evaluation_all_stay(evaluation: Callable[..., Path]) -> None:
    (folder,) = find_folders([evaluation("a", "cc")])
    assert len(merged(folder.solutions)) == 4


def test_whole_problems_are_shown_some_for_every_filter_and_run_first() -> None:
    plain = [made(problem=f"p{i}", sample=str(j)) for i in range(50) for j in range(4)]
    solutions = [*plain, *(replace(each, run="other") for each in plain)]
    solutions[4 * 30] = replace(solutions[4 * 30], labels=(False, True))
    chosen = [solutions[i] for i in pick(solutions, tags_of(solutions), 40)]
    assert len(chosen) == 40
    problems = {each.problem for each in chosen}
    assert {"p0", "p30"} <= problems
    assert all(sum(each.problem == name for each in chosen) == 8 for name in problems)
    assert pick(solutions, tags_of(solutions), 0) == []
    assert pick(plain[:8], tags_of(plain[:8]), 500) == list(range(8))


def test_names_of_rewards_are_visible() -> None:
    found = solution("run", {"id": "a", "completion": "x", "rewards": {"a\u202eb": 1.0, "c": 0.5}})
    assert found is not None
    assert found.values == {"a⟨U+202E⟩b": 1.0, "c": 0.5}


def test_the_longest_are_found_among_tokens_and_characters_apart() -> None:
    solutions = [made(tokens=9) for _ in range(39)] + [made(tokens=10)]
    solutions += [made(tokens=None, steps=("x" * 500,)) for _ in range(40)]
    assert [i for i, own in enumerate(tags_of(solutions)) if "longest" in own] == [39]


def test_of_two_jobs_on_one_solution_neither_labels_nor_scores_of_a_model_are_lost() -> None:
    scored, continued = made(labels=()), made(scores=(0.25, 0.5), scored_by="continuations")
    (found,) = merged([scored, continued])
    assert (found.labels, found.scores, found.scored_by) == ((True, True), (0.9, 0.9), "scorer")
    (found,) = merged([continued, scored])
    assert (found.labels, found.scores, found.scored_by) == ((True, True), (0.9, 0.9), "scorer")
