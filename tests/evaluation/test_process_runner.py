"""Judging a step scorer end to end: rows, scores, resumption, summary, comparison, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.config import EvaluatePRMConfig, ReferenceConfig, ScoreConfig
from stepkd.evaluation.process import compare_process, summarise_process
from stepkd.evaluation.score_rows import _judged, evaluate_process, score_file
from stepkd.labels.labellers import ScorerLabeller, Solution
from stepkd.runs.files import write_json, write_jsonl
from stepkd.runs.job import JobOptions, read_results
from stepkd.scorers.critiques import Tags
from stepkd.scorers.rules import Checker
from stepkd.scorers.scorer import Judged, Meaning, Solutions
from stepkd.tasks import make_rows

ROWS = [
    {"id": "a", "prompt": "p1", "completions": ["1", "2", "3"], "labels": [True, False, None]},
    {"id": "b", "prompt": "p2", "completions": ["1", "2"], "labels": [True, True]},
    {"id": "c", "prompt": "p3", "completions": ["x", "2"], "labels": [False, None]},
    {"id": "d", "prompt": "p4", "completions": ["1", "2", "3", "4"], "labels": [True, True, True, True]},
]
"""Solutions whose first error is 1, -1, 0, -1."""


REFERENCE = ReferenceConfig(value=50.0, low=40.0, high=60.0, source="a table", settings="as there", ran="not run here")


class Scripted:
    """Scores a step by its text; counts what it was asked."""

    meaning: Meaning = "correctness"

    def __init__(self, scores: Mapping[str, float], stop_after: int | None = None) -> None:
        self.scores = scores
        self.asked: list[str] = []
        self.stop_after = stop_after

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += [str(problem.row["id"]) for problem in problems]
        return [[[self.scores[step] for step in steps] for steps in problem.solutions] for problem in problems]

    def provenance(self) -> dict[str, Any]:
        return {"scorer": "scripted", "scores": repr(dict(self.scores))}


GOOD = {"1": 0.9, "2": 0.3, "3": 0.8, "4": 0.7, "x": 0.1}
"""Correct on a and c; calls step 2 incorrect on b and d at 0.5, and not at 0.25."""


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return f"rows:path={path}"


def spec(data: str, out: Path, **settings: Any) -> EvaluatePRMConfig:
    return EvaluatePRMConfig(scorer="m", sets=(data,), out=str(out), **{"max_rows": 2, **settings})


def test_summary_by_hand(data: str, tmp_path: Path) -> None:
    summary = evaluate_process(spec(data, tmp_path / "out"), Scripted(GOOD))
    (section,) = summary["sets"].values()
    fixed = section["fixed"]
    assert fixed["acc_error"]["value"] == 1.0  # a: first below 0.5 is step 1; c: step 0
    assert fixed["acc_correct"]["value"] == 0.0  # b and d have a step of 0.3
    assert fixed["f1"]["value"] == 0.0
    assert (fixed["n_error"], fixed["n_correct"]) == (2, 2)
    assert section["baselines"]["always positive"]["f1"]["value"] == 0.0
    assert section["baselines"]["always positive"]["acc_correct"]["value"] == 1.0
    assert section["steps"]["steps"] == 2 + 2 + 1 + 4  # up to and including the first error
    assert section["unscored_solutions"] == 0
    assert "tuned" not in section
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["sets"] == summary["sets"]


def test_threshold_tuned_on_a_named_set(data: str, tmp_path: Path) -> None:
    scores = {**GOOD, "2": 0.3, "x": 0.1}
    summary = evaluate_process(spec(data, tmp_path / "out", tune_on=data), Scripted(scores))
    (section,) = summary["sets"].values()
    # Between 0.1 and 0.3 step 2 passes everywhere: a is missed, c is found, b and d are correct. F1 of 1/2 and 1.
    assert 0.1 < summary["tuned_threshold"] <= 0.3
    assert section["tuned"]["f1"]["value"] == pytest.approx(2 / 3)
    assert section["tuned"]["optimistic"] is True
    assert summary["tuned_on"] == data


def test_killed_and_resumed(data: str, tmp_path: Path) -> None:
    whole = evaluate_process(spec(data, tmp_path / "whole"), Scripted(GOOD))
    with pytest.raises(KeyboardInterrupt):
        evaluate_process(spec(data, tmp_path / "cut"), Scripted(GOOD, stop_after=2))
    again = Scripted(GOOD)
    resumed = evaluate_process(spec(data, tmp_path / "cut"), again)
    assert again.asked == ["c", "d"]
    assert resumed["sets"] == whole["sets"]
    for name in ("settings.json", "results.jsonl", "summary.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(ConfigError, match="scorer"):
        evaluate_process(spec(data, tmp_path / "cut"), Scripted({**GOOD, "1": 0.8}))


def test_two_ranks_share_the_solutions(data: str, tmp_path: Path) -> None:
    whole = evaluate_process(spec(data, tmp_path / "whole"), Scripted(GOOD))
    scorers = [Scripted(GOOD), Scripted(GOOD)]
    found = [
        evaluate_process(spec(data, tmp_path / "two"), scorers[rank], options=JobOptions(rank=rank, world_size=2))
        for rank in (1, 0)
    ]
    assert found == [{}, whole]
    assert [scorer.asked for scorer in scorers] == [["a", "b"], ["c", "d"]]


def test_unscored_solutions_are_left_out_and_counted(data: str, tmp_path: Path) -> None:
    summary = evaluate_process(spec(data, tmp_path / "out"), Scripted({**GOOD, "4": float("nan")}))
    (section,) = summary["sets"].values()
    assert section["unscored_solutions"] == 1
    assert section["solutions"] == 3
    assert read_results(tmp_path / "out")[3]["scores"] == [0.9, 0.3, 0.8, None]
    with pytest.raises(DataError, match=r"no solution of .* has a score for each of its steps"):
        evaluate_process(spec(data, tmp_path / "none"), Scripted(dict.fromkeys(GOOD, float("nan"))))


def test_comparison_is_paired(data: str, tmp_path: Path) -> None:
    better = {**GOOD, "2": 0.6}  # misses a, correct on b, c and d
    a = evaluate_process(spec(data, tmp_path / "a"), Scripted(GOOD))
    b = evaluate_process(spec(data, tmp_path / "b"), Scripted(better))
    differences = compare_process(tmp_path / "a", tmp_path / "b", (a, b))
    assert [name.removeprefix(f"{data}, fixed") for name in differences] == ["", ", with an error", ", all correct"]
    assert [each.value for each in differences.values()] == pytest.approx([2 / 3, -0.5, 1.0])


def test_classes_of_errors_are_compared_by_prm_score(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "error_type": "own"}) + "\n" for row in ROWS))
    data = f"rows:path={path}"
    scorers = {"a": Scripted(GOOD), "b": Scripted({**GOOD, "2": 0.6})}
    a, b = (evaluate_process(spec(data, tmp_path / name), scorer) for name, scorer in scorers.items())
    found = compare_process(tmp_path / "a", tmp_path / "b", (a, b))
    assert [name.removeprefix(f"{data}, PRMScore") for name in found] == ["", ", correct steps", ", incorrect steps"]
    for part, difference in zip(("score", "acc_correct", "acc_incorrect"), found.values(), strict=True):
        scores = [each["sets"][data]["prm_score"]["all"][part]["value"] for each in (a, b)]
        assert difference.value == pytest.approx(scores[1] - scores[0])
    silent = tmp_path / "silent"
    write_json(silent / "summary.json", a)
    rows = read_results(tmp_path / "a")
    write_jsonl(silent / "results.jsonl", [row | {"scores": [None] * len(row["scores"])} for row in rows])
    with pytest.warns(
        UserWarning, match="0 solutions of .* are compared, others are not: 4 without scores of all steps"
    ):
        found = compare_process(tmp_path / "a", silent, (a, a))
    assert [(name, math.isnan(each.value)) for name, each in found.items()] == [(f"{data}, PRMScore", True)]
    write_jsonl(silent / "results.jsonl", [row | {"labels": row["labels"][::-1]} for row in rows])
    with pytest.raises(ConfigError, match="hold different prompts, steps or labels under the id"):
        compare_process(tmp_path / "a", silent, (a, a))
    for other in ({"prompt": "another"}, {"problem_id": "other"}):
        write_jsonl(silent / "results.jsonl", [row | other for row in rows])
        with pytest.raises(ConfigError, match="hold different prompts, steps or labels under the id"):
            compare_process(tmp_path / "a", silent, (a, a))
    write_jsonl(silent / "results.jsonl", rows[:2] + [row | {"error_type": None} for row in rows[2:]])
    write_jsonl(tmp_path / "a" / "results.jsonl", [*rows[:2], rows[2] | {"error_type": None}])
    with pytest.warns(UserWarning, match="2 solutions of .* not: 1 without a class of error; 1 in one folder alone"):
        compare_process(tmp_path / "a", silent, (a, a))


def test_solutions_of_unknown_first_error_are_not_compared_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [*ROWS[:3], ROWS[3] | {"labels": [True, None, True, True]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"rows:path={path}"
    a, b = (evaluate_process(spec(data, tmp_path / name), Scripted(GOOD)) for name in "ab")
    with pytest.warns(UserWarning, match="3 solutions of .* 1 with labels that leave the first error open"):
        compare_process(tmp_path / "a", tmp_path / "b", (a, b))


def test_cut_off_solutions_are_not_compared_and_counted(data: str, tmp_path: Path) -> None:
    a = evaluate_process(spec(data, tmp_path / "a"), Scripted(GOOD))
    b = evaluate_process(spec(data, tmp_path / "b"), Scripted({**GOOD, "4": float("nan")}))
    with pytest.warns(
        UserWarning, match="3 solutions of .* are compared, others are not: 1 without scores of all steps"
    ):
        found = compare_process(tmp_path / "a", tmp_path / "b", (a, b))
    assert all(each.value == 0 for each in found.values()), "what both scored is equal"


def test_intervals_resample_problems_under_several_questions() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"set": "s", "prompt": f"p{i}", "problem_id": str(i), "completions": ["x"] * 3, "labels": [True, True, i > 9]}
        | {"scores": rng.random(3).tolist(), "first_error": -1 if i > 9 else 2}
        for i in range(20)
    ]
    once, twice = (
        summarise_process(each)["sets"]["s"]
        for each in (rows, [*rows, *({**row, "prompt": f"as {row['prompt']}"} for row in rows)])
    )
    assert twice["steps"]["auroc"] == once["steps"]["auroc"], "a problem that is there twice is one problem"
    assert twice["calibration"]["ece"] == once["calibration"]["ece"]


def test_completions_with_step_labels_are_read(tmp_path: Path) -> None:
    data = 'task:task="modular:terms=3",n=6,noise.rate=0.5,split=test'
    from stepkd.scorers.rules import Checker

    summary = evaluate_process(spec(data, tmp_path / "out"), Checker())
    (section,) = summary["sets"].values()
    assert section["fixed"]["f1"]["value"] == 1.0
    # The checker's score of a solution falls from 1 to 0 when a line comes before the one it needs.
    swap = section["order_swap"]
    assert swap["drop_rate"]["value"] == 1.0
    assert swap["mean_drop"]["value"] == 1.0
    assert (swap["swaps"], swap["unscored"]) == (6, 0)


def test_an_exact_checker_lets_independent_lines_swap(tmp_path: Path) -> None:
    from stepkd.scorers.rules import Checker

    summary = evaluate_process(spec('task:task="independent:terms=3",n=5,split=test', tmp_path / "out"), Checker())
    (section,) = summary["sets"].values()
    assert section["order_swap"] is None
    assert section["independent_swap"]["change_rate"]["value"] == 0.0
    assert section["independent_swap"]["swaps"] >= 8


def test_no_order_swaps_without_a_checker(data: str, tmp_path: Path) -> None:
    (section,) = evaluate_process(spec(data, tmp_path / "out"), Scripted(GOOD))["sets"].values()
    assert (section["order_swap"], section["independent_swap"], section["prm_score"]) == (None, None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.0}, "must lie between 0 and 1"),
        ({"sets": ()}, "sets is empty: name one of gsm8k"),
        ({"sets": ("gsm8",)}, "no set 'gsm8'. Did you mean 'gsm8k'?"),
        ({"tune_on": "mth"}, "no set 'mth'. Did you mean 'math'?"),
        ({"limit": 0}, "limit=0: must be at least 1"),
        ({"check_parity": True}, "check_parity compares with a reference, and there is none"),
        ({"sets": ("gsm8k", "math"), "reference": REFERENCE}, "four subsets, and sets lacks olympiadbench, omnimath: "),
        (
            {"sets": ("prmbench:path=x,limit=9",), "limit": 3},
            "limit=3 is of every set, and prmbench:path=x,",
        ),
        ({"max_rows": 0}, "max_rows=0: must be at least 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        evaluate_process(EvaluatePRMConfig(**{"scorer": "checker", "out": "x", **settings}))


def test_bad_rows_and_scorers(data: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    for row, found in (
        ({"prompt": "p", "completion": "1"}, "0 steps and 0 labels"),
        ({"prompt": "p", "completion": "1\n2", "steps": ["1\n", "2"]}, "2 steps and 0 labels"),
        ({"prompt": "p", "completion": "1\n2", "steps": ["1\n", "2"], "step_labels": [True]}, "2 steps and 1 labels"),
    ):
        path.write_text(json.dumps({"id": "a", **row}) + "\n")
        with pytest.raises(DataError, match=f"(?s)a, column 'labels'.*needs a step-labelled row.*{found}"):
            evaluate_process(spec(f"rows:path={path}", tmp_path / "x"), _NoLabels(GOOD))
    outcome = Scripted(GOOD)
    outcome.meaning = "outcome"
    with pytest.raises(ConfigError, match="finds no first error"):
        evaluate_process(spec(data, tmp_path / "y"), outcome)


class _NoLabels(Scripted):
    """Never to be asked: the rows are refused first."""

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        raise AssertionError("rows without labels were scored")


def test_rows_without_a_known_first_error_stay_out_of_f1(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    extra = {"id": "e", "prompt": "p5", "completions": ["1", "2", "3"], "labels": [None, None, False]}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, extra]))
    (section,) = evaluate_process(spec(f"rows:path={path}", tmp_path / "out"), Scripted(GOOD))["sets"].values()
    assert (section["solutions"], section["unknown_first_error"]) == (5, 1)
    assert (section["fixed"]["n_error"], section["fixed"]["n_correct"]) == (2, 2)
    assert section["steps"]["steps"] == 9 + 1


@pytest.mark.parametrize(("kept", "undefined"), [("ac", "n_correct"), ("bd", "n_error")])
def test_sets_of_one_kind_give_what_they_can(kept: str, undefined: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS if row["id"] in kept))
    data = f"rows:path={path}"
    summary = evaluate_process(spec(data, tmp_path / "out", tune_on=data), Scripted(GOOD))
    (section,) = summary["sets"].values()
    assert section["fixed"]["f1"] is None
    assert section["fixed"][undefined] == 0
    assert section["baselines"]["random"] is None
    assert summary["tuned_threshold"] is None
    assert "F1 is undefined" in summary["undefined"]["tuned_threshold"]


def test_processbench_subsets(data_dir: Path, tmp_path: Path) -> None:
    settings = EvaluatePRMConfig(
        scorer="m", processbench=str(data_dir / "processbench"), out=str(tmp_path / "out"), limit=40
    )

    class Length(Scripted):
        def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
            return [[[1 / (1 + i) for i, _ in enumerate(steps)] for steps in p.solutions] for p in problems]

    summary = evaluate_process(settings, Length(GOOD))
    assert list(summary["sets"]) == ["gsm8k", "math"]
    assert summary["tuned_on"] == "gsm8k"
    assert summary["sets"]["gsm8k"]["tuned"]["optimistic"] is True
    assert summary["sets"]["math"]["tuned"]["optimistic"] is False
    assert summary["sets"]["math"]["tuned"]["threshold"] == summary["tuned_threshold"]
    assert all(section["solutions"] == 40 for section in summary["sets"].values())
    f1 = [section["fixed"]["f1"] for section in summary["sets"].values()]
    mean = summary["mean"]["f1"]
    assert (summary["mean"]["sets"], mean["value"]) == (2, pytest.approx((f1[0]["value"] + f1[1]["value"]) / 2))
    above = [each["high"] - each["value"] for each in f1]
    assert mean["high"] - mean["value"] == pytest.approx(math.hypot(*above) / 2)


def test_a_set_for_tuning_alone_does_not_enter_the_mean(data_dir: Path, tmp_path: Path) -> None:
    folder = str(data_dir / "processbench")
    settings = EvaluatePRMConfig(
        scorer="m", sets=("math",), tune_on="gsm8k", processbench=folder, out=str(tmp_path / "out"), limit=20
    )

    class Length(Scripted):
        def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
            return [[[1 / (1 + i) for i, _ in enumerate(steps)] for steps in p.solutions] for p in problems]

    summary = evaluate_process(settings, Length(GOOD))
    assert list(summary["sets"]) == ["math", "gsm8k"]
    assert summary["mean"]["sets"] == 1
    assert summary["mean"]["f1"]["value"] == summary["sets"]["math"]["fixed"]["f1"]["value"]


def test_so_many_of_every_class_of_prmbench(tmp_path: Path) -> None:
    raw = {"modified_question": "p", "question": "q", "modified_process": ["1", "2"], "error_steps": [2, 3]}
    items = [{**raw, "idx": f"i{n}", "classification": kind} for kind in ("circular", "deception") for n in range(5)]
    path = tmp_path / "subset.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in items))
    data = f"prmbench:path={path}"
    summary = evaluate_process(spec(data, tmp_path / "out", limit=3), Scripted(GOOD))
    found = summary["sets"][data]["prm_score"]
    assert {kind: each["solutions"] for kind, each in found.items()} == {"all": 6, "circular": 3, "deception": 3}
    assert found["all"]["ignored_errors"] == 6
    assert found["all"]["score"]["value"] == 1.0
    assert summary["mean"] is None
    rows = read_results(tmp_path / "out")
    assert {row["prompt"] for row in rows} == {"p"}
    assert sorted({row["problem_id"] for row in rows}) <= ["i0", "i1", "i2", "i3", "i4"]
    again = evaluate_process(spec(data, tmp_path / "again", limit=3), Scripted(GOOD))
    assert again["sets"] == summary["sets"]


class Critical(Scripted):
    """A critic: predictions by prompt, and what each cost; no scores where it names nothing."""

    named: Mapping[str, int | None] = {"p1": 1, "p2": 0, "p3": None, "p4": -1}

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        found: list[list[list[float]]] = []
        for problem in problems:
            named = self.named[problem.row["prompt"]]
            critiques = [{"step": None, "text": "t", "verdict": str(named), "tokens": 5, "finish": "stop"}] * 2
            facts = {"critiques": critiques, "without_verdict": 2 * (named is None)}
            facts |= {"generated_tokens": 10, "prefill_tokens": 7}
            scores = [
                [float("nan") if named is None else float(k != named) for k, _ in enumerate(steps)]
                for steps in problem.solutions
            ]
            found.append([Judged(each, facts=facts, prediction=named) for each in scores])
        return found


def test_a_critics_own_predictions_are_judged_as_in_processbench(data: str, tmp_path: Path) -> None:
    """Over all solutions: one without a prediction is a miss, in the threshold's F1 too, and has no scores."""
    summary = evaluate_process(spec(data, tmp_path / "out"), Critical(GOOD))
    (section,) = summary["sets"].values()
    predicted = section["predicted"]
    assert [predicted[name]["value"] for name in ("acc_error", "acc_correct", "f1")] == [0.5, 0.5, 0.5]
    assert (predicted["n_error"], predicted["n_correct"], predicted["without_prediction"]) == (2, 2, 1)
    fixed = section["fixed"]
    assert [fixed[name]["value"] for name in ("acc_error", "acc_correct", "f1")] == [0.5, 0.5, 0.5]
    assert (fixed["n_error"], fixed["n_correct"], section["solutions"]) == (2, 2, 3)
    assert section["unscored_solutions"] == 1
    costs = {"critiques": 8, "without_verdict": 2, "generated_tokens": 40, "prefill_tokens": 28}
    assert section["critiques"] == costs
    row = read_results(tmp_path / "out")[2]
    assert (row["prediction"], row["score_facts"]["critiques"][0]["text"]) == (None, "t")
    config = ScoreConfig(scorer="m", completions=data, out=str(tmp_path / "scored"))
    assert score_file(config, scorer=Critical(GOOD))["critiques"] == costs
    assert [row.get("prediction") for row in read_results(tmp_path / "scored")] == [1, 0, None, -1]
    labels = ScorerLabeller(Critical(GOOD)).label([solution("p1"), solution("p3")])
    assert [each.labels for each in labels] == [(True, False), (None, None)]
    assert [each.facts["generated_tokens"] for each in labels] == [10, 10]
    other = evaluate_process(spec(data, tmp_path / "other"), Scripted({**GOOD, "x": 0.9}))
    found = compare_process(tmp_path / "out", tmp_path / "other", (summary, other))
    own = [found[f"{data}, own{part}"].value for part in ("", ", with an error", ", all correct")]
    theirs = [other["sets"][data]["fixed"][part]["value"] for part in ("f1", "acc_error", "acc_correct")]
    assert own == pytest.approx([value - 0.5 for value in theirs]), "a critic's predictions against a threshold's"
    assert not any(", own" in name for name in compare_process(tmp_path / "other", tmp_path / "other", (other, other)))


def solution(prompt: str) -> Solution:
    row = {"id": prompt, "prompt": prompt}
    return Solution(np.array([1]), np.array([2]), index=0, correct=None, steps=("1", "2"), row=row)


def test_a_scorer_that_reads_no_texts_is_not_asked_about_swapped_steps() -> None:
    (row,) = make_rows("modular:terms=3", 1, seed=0)
    row |= {"completions": row["steps"], "labels": [True] * len(row["steps"])}
    scores = [1.0] * len(row["steps"])
    assert "swaps" in _judged(Checker(), "s", row, 0, scores)
    assert "swaps" not in _judged(Tags("m", correct="Y", incorrect="N"), "s", row, 0, scores)
    for facts, asked in (({"critiques": []}, False), ({"members": [scores, scores]}, True)):
        found = _judged(Checker(), "s", row, 0, Judged(scores, facts=facts, prediction=None))
        assert ("swaps" in found) is asked
        assert found["score_facts"] == facts
