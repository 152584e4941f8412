"""Figures and comparisons: the numbers of the functions that commands print."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from left import begin, evaluation_rows, scored_rows, search_rows

from stepkd.evaluation.best_of_n import best_of_n_from_files
from stepkd.evaluation.diagnostics import argmin_positions
from stepkd.evaluation.metrics import compare_runs
from stepkd.evaluation.search_summary import summarise_search
from stepkd.evaluation.step_metrics import calibration_report, labelled_steps
from stepkd.report.content import content
from stepkd.report.folders import find_folders
from stepkd.runs.files import write_jsonl


def of(*paths: Path) -> dict[str, Any]:
    return content(find_folders(paths))


def test_evaluations_of_one_benchmark_are_paired_as_compare_pairs_them(evaluation: Callable[..., Path]) -> None:
    a, b = evaluation("runs/a", "fiil", minute=1), evaluation("runs/b", "cccl", minute=2)
    evaluation("runs/other", data="other", minute=3)
    greedy = evaluation("runs/greedy", temperature=0.0, minute=4)
    benchmarks = of(a.parent)["benchmarks"]
    assert sorted(sorted(each["models"]) for each in benchmarks) == [["a", "b", "greedy"], ["other"]]
    (same,) = (each for each in benchmarks if "a" in each["models"])
    assert [(pair["b"], pair["a"]) for pair in same["pairs"]] == [("b", "a")]  # of equal sampling
    expected = compare_runs(a, b)
    assert same["pairs"][0]["pass@1"] == expected.difference.to_dict()
    assert same["pairs"][0]["test"].mcnemar_p == expected.mcnemar_p
    assert same["pairs"][0]["correct_with_incorrect_step"]["value"] == pytest.approx(-1 / 5)
    assert of(a, greedy)["benchmarks"][0]["pairs"]  # two of different sampling are compared, too
    assert next(figure.title for figure in same["figures"]) == "correct (pass@1)"


def test_many_evaluations_are_compared_with_the_first_one(evaluation: Callable[..., Path]) -> None:
    paths = [evaluation(f"runs/e{i}", "ci", minute=i) for i in range(9)]
    (found,) = of(paths[0].parent)["benchmarks"]
    assert [pair["a"] for pair in found["pairs"]] == ["e0"] * 8


def test_many_evaluations_of_two_samplings_are_compared_with_the_first_one_of_theirs(
    evaluation: Callable[..., Path],
) -> None:
    paths = [evaluation(f"runs/e{i}", "ci", minute=i, temperature=float(i % 2)) for i in range(10)]
    (found,) = of(paths[0].parent)["benchmarks"]
    assert sorted(pair["a"] for pair in found["pairs"]) == ["e0"] * 4 + ["e1"] * 4


def test_best_of_n_of_several_quick_starts_names_them(tmp_path: Path, write: Callable[..., None]) -> None:
    curve = {"ks": [1, 2], "problems": 9, "curves": {"pass": [{"value": 0.5, "low": 0.4, "high": 0.6}] * 2}}
    for name in ("one", "two"):
        begin(tmp_path / name, "quick start", 1)
        write(tmp_path / name / "summary.json", {"stages": {"prm": {"best_of_n": curve}}})
    assert [each["name"] for each in of(tmp_path)["best_of_n"]] == ["one, prm", "two, prm"]
    assert [each["name"] for each in of(tmp_path / "one")["best_of_n"]] == ["prm"]


def test_an_evaluation_without_step_labels_has_no_step_metrics(evaluation: Callable[..., Path]) -> None:
    rows = evaluation_rows("ci", labels=False)
    a, b = (evaluation(name, rows=rows, minute=i) for i, name in enumerate(("a", "b")))
    (found,) = of(a, b)["benchmarks"]
    assert [figure.title for figure in found["figures"]] == ["correct (pass@1)"]
    assert found["pairs"][0]["step_accuracy"] is None


def test_a_metric_without_a_value_has_no_plot(evaluation: Callable[..., Path]) -> None:
    rows = [{**row, "samples": row["samples"][:1] * 2} for row in evaluation_rows("ii")]
    (found,) = of(evaluation("a", rows=rows))["benchmarks"]
    assert found["models"]["a"]["correct_with_incorrect_step"]["value"] is None
    assert [figure.title for figure in found["figures"]] == ["correct (pass@1)", "correct steps"]


def test_reliability_of_scored_rows_with_labels_is_that_of_their_steps_up_to_the_first_error(scores: Path) -> None:
    (folder,) = find_folders([scores])
    steps = labelled_steps(
        [each.scores for each in folder.solutions],  # type: ignore[misc]
        [each.labels for each in folder.solutions],
        up_to_first_error=True,
    )
    expected = calibration_report(steps.scores, steps.labels)
    found = of(scores)
    assert found["sets"]["scores"][""]["calibration"]["n"] == expected.n == 18
    assert found["sets"]["scores"][""]["calibration"]["bins"] == expected.to_dict()["bins"]
    reliability, lowest, errors, correct = found["plots"]["scores"]
    assert reliability.title == "scores: reliability"
    assert f"{expected.ece.value:.3f}" in reliability.note
    assert lowest.title == "scores: lowest score"
    assert errors.title == "scores: first incorrect step"
    assert [line.name for line in errors.legend] == ["true", "predicted"]
    assert correct.title == "scores: correct steps"
    assert "Rank correlation with the number" in correct.note


def test_scores_without_labels_still_say_where_the_lowest_one_falls(scores: Path) -> None:
    rows = [{**row, "step_labels": None} for row in scored_rows()]
    write_jsonl(scores / "results.jsonl", rows)
    found = of(scores)
    assert [figure.title for figure in found["plots"]["scores"]] == ["scores: lowest score"]
    share = found["sets"]["scores"][""]["argmin"]["share_last"]["value"]
    assert share == 1.5 / 8  # the last two steps of one solution have equal scores


def test_best_of_n_of_scored_samples_and_a_stored_one_in_its_place(
    tmp_path: Path, scores: Path, write: Callable[..., None]
) -> None:
    (found,) = of(scores)["best_of_n"]
    expected = best_of_n_from_files({"score": scores}).to_dict()
    assert found["ks"] == expected["ks"] == [1, 2]
    assert found["curves"]["score"] == expected["curves"]["score"]
    assert found["curves"]["some sample correct (ceiling)"] == expected["curves"]["pass"]
    write(tmp_path / "best" / "best_of_n.json", expected | {"problems": 77})
    assert [each["problems"] for each in of(scores, tmp_path / "best")["best_of_n"]] == [77]


def test_a_search_shows_methods_at_their_cost_over_lines_of_the_shared_samples(search: Path) -> None:
    (found,) = of(search)["searches"]
    figure, stored = found["figure"], found["summary"]
    assert [part.name for part in figure.legend] == [
        *("1 greedy", "2 self_consistency@4", "3 best_of_n@4", "4 beam@4x2"),
        *("some sample correct (ceiling)", "majority vote", "best of N", "weighted vote"),
    ]
    assert [list(part.x) for part in figure.legend] == [[10], [40], [40], [60], *[[10, 20, 40]] * 4]
    greedy, weighted = figure.legend[0], figure.legend[-1]
    accuracy = stored["methods"]["greedy"]["accuracy"]
    assert [*greedy.low, *greedy.high] == [100 * accuracy[end] for end in ("low", "high")]
    assert weighted.y[-1] == 100 * stored["pool"]["curves"]["product_vote"][-1]["value"]
    assert [text for *_, text in figure.texts][::-1] == ["1", "2", "3", "4"], "from left to right"
    assert len(found["curves"]["curves"]) == 10  # the ceiling, the majority, four reductions with and without a vote
    assert found["curves"]["peaks"]["product"] == stored["pool"]["peaks"]["product"]
    assert found["bins"] == {"0": 1, "0 to 1/3": 1, "1/3 to 2/3": 1, "2/3 to 1": 1, "1": 2}


def test_a_search_without_a_scorer_or_samples_that_tell_the_difficulty_has_no_such_parts(search: Path) -> None:
    rows = [row for row in search_rows() if row["method"] in ("pool", "greedy", "self_consistency@4")]
    (search / "summary.json").write_text(json.dumps(summarise_search(rows, ["greedy", "self_consistency@4"], [1, 4])))
    (found,) = of(search)["searches"]
    assert [part.name for part in found["figure"].legend][2:] == ["some sample correct (ceiling)", "majority vote"]
    assert found["bins"] == {}


def test_tokens_of_a_search_count_the_shared_samples_once(search: Path) -> None:
    (found,) = of(search)["engines"]
    assert (found["name"], found["tokens"]) == ("search", 6 * (40 + 40 + 10 + 60))


def test_a_judgement_shows_its_stored_numbers(judgement: Path) -> None:
    found = of(judgement)
    assert found["sets"]["judged"]["gsm8k"]["solutions"] == 6
    assert [figure.title for figure in found["plots"]["scores"]] == [
        "judged, gsm8k: reliability",
        "judged, gsm8k: lowest score",
        "judged, gsm8k: first incorrect step",
        "judged, gsm8k: correct steps",
    ]


def test_two_judgements_are_paired_by_solution(judgement: Path, tmp_path: Path) -> None:
    shutil.copytree(judgement, tmp_path / "second")
    found = dict(of(judgement, tmp_path / "second")["f1_differences"])
    name = "second minus judged: gsm8k, fixed"
    assert list(found) == [name, f"{name}, with an error", f"{name}, all correct"]
    assert {each["value"] for each in found.values()} == {0}
    rows = tmp_path / "second" / "results.jsonl"
    rows.write_text(rows.read_text().replace('"prompt": "', '"prompt": "Other: '))
    ((name, difference),) = of(judgement, tmp_path / "second")["f1_differences"]
    assert difference == {}
    assert "hold different prompts, steps or labels under the id" in name


def test_labels_are_counted_by_place(labels: Path) -> None:
    (figure,) = of(labels)["plots"]["labels"]
    correct, incorrect = figure.legend
    assert [correct.name, incorrect.name] == ["correct", "incorrect"]
    assert correct.high == [5, 5, 8, 8, 8, 8]
    assert incorrect.high == [8] * 6
    assert figure.note == "6 correct answers, 3 of them with an incorrect step"


def test_curves_hold_what_changes_train_beside_validation(training: Callable[..., Path]) -> None:
    (figure,) = of(training("run"))["plots"]["curves"]  # the learning rate never changes
    train, val = figure.legend
    assert figure.title == "run: loss"
    assert (train.name, list(train.y)[:2]) == ("train", [4.0, 3.95])
    assert (val.name, list(val.x), list(val.y)) == ("val", [20, 39], [3.5, 2.5])


def test_runs_of_one_method_share_their_plots(training: Callable[..., Path]) -> None:
    paths = [training("a"), training("b"), training("c", "PRMModule")]
    figures = of(*paths)["plots"]["curves"]
    assert [figure.title for figure in figures] == ["a, b: loss", "c: loss"]
    assert [line.name for line in figures[0].legend] == ["a, train", "a, val", "b, train", "b, val"]
    assert len({(line.colour, line.stroke("")["stroke-dasharray"]) for line in figures[0].legend}) == 4


def test_lengths_are_counted_by_outcome(evaluation: Callable[..., Path]) -> None:
    (figure,) = of(evaluation("a", "cfil"))["plots"]["lengths"]
    correct, incorrect = figure.legend
    assert (correct.name, incorrect.name) == ("correct", "incorrect")
    assert list(correct.high)[::2] == [0, 4, 2, *[0] * 13]  # bars of six tokens
    assert list(incorrect.high)[::2] == [0, 4, 3, *[0] * 12, 1]  # stacked on them
    assert figure.note == "8 solutions, 1 cut off"


def test_claims_and_iterations_have_their_plots(claim: Path, iterated: Path) -> None:
    found = of(claim, iterated)["plots"]
    assert [figure.title for figure in found["claims"]] == ["b_beats_a: pass@1"]
    assert [line.name for line in found["iterations"][0].legend][:2] == ["correct, greedy", "correct (pass@1)"]
    assert list(found["iterations"][0].across.ticks.values()) == ["M0", "M1"]


def test_settings_that_differ_are_told_for_folders_of_one_kind(evaluation: Callable[..., Path]) -> None:
    a, b = evaluation("a", limit=5), evaluation("b", limit=9)
    assert of(a, b)["differing"]["evaluation"]["limit"] == [5, 9]
    assert "benchmark.name" not in of(a, b)["differing"]["evaluation"]


def test_a_scoring_job_outside_a_quick_start_keeps_its_curve(
    tmp_path: Path, scores: Path, write: Callable[..., None]
) -> None:
    curve = {"ks": [1, 2], "problems": 9, "curves": {"pass": [{"value": 0.5, "low": 0.4, "high": 0.6}] * 2}}
    for name in ("quick", "other"):
        shutil.copytree(scores, tmp_path / name / "scores")
    begin(tmp_path / "quick", "quick start", 1)
    write(tmp_path / "quick" / "summary.json", {"stages": {"prm": {"best_of_n": curve}}})
    found = of(tmp_path / "quick", tmp_path / "other")["best_of_n"]
    assert [each["name"] for each in found] == ["prm", "other/scores"]


def test_places_of_lowest_scores_are_resampled_by_problem(scores: Path) -> None:
    write_jsonl(scores / "results.jsonl", [{**row, "step_labels": None} for row in scored_rows()])
    (folder,) = find_folders([scores])
    lists = [[*each.scores] for each in folder.solutions]
    expected = argmin_positions(lists, problems=[each.problem for each in folder.solutions])  # type: ignore[arg-type]
    assert of(scores)["sets"]["scores"][""]["argmin"] == expected


def test_metrics_without_a_split_have_plots_of_their_own(tmp_path: Path) -> None:
    lines = [{"run": 1, "step": at, "loss": 1.0 * at, "lr-AdamW": at / 10, "val/loss": 2.0 * at} for at in range(3)]
    write_jsonl(tmp_path / "run" / "metrics.jsonl", lines)
    loss, rate = of(tmp_path / "run")["plots"]["curves"]
    assert (loss.title, [line.name for line in loss.legend]) == ("run: loss", ["loss", "val"])
    assert rate.title == "run: lr-AdamW"


def test_places_that_few_solutions_reach_are_left_out_with_a_note(labels: Path, write: Callable[..., None]) -> None:
    summary = json.loads((labels / "summary.json").read_text())
    write(labels / "summary.json", summary | {"labelled": 900})
    (figure,) = of(labels)["plots"]["labels"]
    assert figure.note.endswith("; without places that fewer than 1% reach")
