"""Labelled solutions to what a refiner is trained on: closed form on a handful of rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.config import DataConfig
from stepkd.data.load import load_rows
from stepkd.data.rows import PROBLEM
from stepkd.errors import DataError
from stepkd.labels.convert import convert_rows
from stepkd.labels.refinements import Refinements
from stepkd.tasks.base import TaskProblem
from stepkd.tasks.families import get_task
from stepkd.tasks.rows import Noise, demonstration, make_rows
from stepkd.training.fit import fit, validate

A, B, C = "2*3=6\n", "6+1=7\n", "#### 7"


def row(name: str, steps: list[str], correct: bool | None, labels: list[Any], **given: Any) -> dict[str, Any]:
    return {
        "id": name,
        "problem_id": name[0],
        "prompt": "2*3+1=?\n",
        "answer": "7",
        "task": "chain",
        "completion": "".join(steps),
        "steps": steps,
        "token_ids": list(range(len(steps))),
        "step_ends": list(range(1, len(steps) + 1)),
        "finish": "stop",
        "correct": correct,
        "step_labels": labels,
        "labelling": {"labeller": "checker"},
    } | given


GOOD = row("p/0", [A, B, C], True, [True] * 3)
BAD = row("p/1", [A, "6+1=8\n", "#### 8"], False, [True, False, False])


def test_a_global_row_is_a_draft_and_a_correct_solution() -> None:
    converted = convert_rows([GOOD, BAD], Refinements(kinds="global", seed=3))
    assert converted.rows == [
        {
            "id": "p/1/global/p/0",
            "problem_id": "p",
            "prompt": "2*3+1=?\n\nDraft:\n2*3=6\n6+1=8\n#### 8\n",
            "solution": A + B + C,
            "answer": "7",
            "labelling": {"labeller": "checker"},
            "refinement": {"kind": "global", "step": None, "draft": "p/1", "target": "p/0", "seed": 3},
        }
    ]
    assert converted.counts["global"] == 1


def test_a_local_row_marks_the_first_incorrect_step_and_goes_on_from_there() -> None:
    converted = convert_rows([GOOD, BAD], Refinements(kinds="local"))
    (found,) = converted.rows
    assert found["id"] == "p/1/local"
    assert found["prompt"] == "2*3+1=?\n\nDraft:\n2*3=6\n[BAD] 6+1=8\n#### 8\n"
    assert found["solution"] == B + C
    assert found["refinement"] == {"kind": "local", "step": 1, "draft": "p/1", "target": "p/0", "seed": 0}
    assert converted.counts == {"rows": 1, "local": 1}


def test_both_are_made_of_the_same_rows() -> None:
    counts = {"rows": 2, "ungraded_or_empty": 0, "duplicates": 0, "global": 1, "local": 1}
    assert convert_rows([GOOD, BAD], Refinements()).counts == counts


def test_an_incorrect_first_step_is_answered_by_any_correct_solution() -> None:
    bad = row("p/2", ["2*3=5\n", "5+1=6\n", "#### 6"], False, [False, True, False])
    (found,) = convert_rows([GOOD, bad], Refinements(kinds="local")).rows
    assert found["prompt"].endswith("Draft:\n[BAD] 2*3=5\n5+1=6\n#### 6\n")
    assert found["solution"] == A + B + C


def test_kept_continuations_correct_a_draft_that_no_sample_does() -> None:
    """That of the step before the first incorrect one."""
    facts = {"continuations": ["6+1=7\nso\n#### 7", None, None], "trials": [8, 8, 0]}
    other = row("p/3", ["1+6=7\n", C], True, [True, True])
    (found,) = convert_rows([other, BAD | {"label_facts": facts}], Refinements(kinds="local")).rows
    assert found["solution"] == "6+1=7\nso\n#### 7"
    assert found["refinement"]["target"] == "p/1"


def test_every_draft_that_gives_no_local_row_is_counted() -> None:
    drafts = [
        row("q/0", ["2*3=6 \n", "#### 9"], False, [True, False]),  # no correct solution begins like this
        row("q/1", [A, "#### 6"], False, [True, True]),
        row("q/2", [A, "#### 5"], False, [None, False]),
        row("q/3", [A, "#### 4"], False, [True, False]),
        row("q/4", [A, "#### 3"], False, [True, False]),
        row("q/5", [A, "#### 7"], True, [True, True]),
        row("q/6", [A, "#### 7.0"], True, [True, True], finish="length"),
    ]
    converted = convert_rows(drafts, Refinements(kinds="local"))
    assert converted.counts == {
        "rows": 1,
        "local": 1,
        "drafts_without_a_correct_continuation": 1,
        "drafts_without_an_incorrect_step": 1,
        "drafts_without_a_known_first_error": 1,
        "drafts_beyond_max_pairs": 1,
    }
    assert converted.rows[0]["solution"] == "#### 7"
    assert len(convert_rows(drafts, Refinements(kinds="local", max_pairs=2)).rows) == 2


def test_clean_targets_hold_no_incorrect_step() -> None:
    lucky = row("p/4", [A, "6+1=9\n", C], True, [True, False, True])
    assert convert_rows([lucky, BAD], Refinements(kinds="local")).rows[0]["solution"] == "6+1=9\n#### 7"
    with pytest.raises(DataError, match="1 drafts_without_a_correct_continuation"):
        convert_rows([lucky, BAD], Refinements(kinds="local", chosen_steps="clean"))


def test_rows_without_labels_give_global_rows_alone() -> None:
    plain = [{name: value for name, value in each.items() if name != "step_labels"} for each in (GOOD, BAD)]
    converted = convert_rows(plain, Refinements())
    assert [each["refinement"]["kind"] for each in converted.rows] == ["global"]
    assert converted.counts["drafts_without_a_known_first_error"] == 1


def test_stepwise_rows_are_joined_as_written() -> None:
    stepwise = [
        {"id": "a", "prompt": "?", "completions": ["one", "two"], "labels": [True, True], "outcome": True},
        {"id": "b", "prompt": "?", "completions": ["one", "three"], "labels": [True, False], "outcome": False},
    ]
    (found,) = convert_rows(stepwise, Refinements(kinds="local")).rows
    assert (found["prompt"], found["solution"]) == ("?\n\nDraft:\none\n[BAD] three\n", "two")


def test_written_rows_can_be_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert Refinements().write(convert_rows([GOOD, BAD], Refinements()).rows, path) == 2
    rows = load_rows(DataConfig(path=str(path)), contract=PROBLEM)
    assert [each["solution"] for each in rows] == [A + B + C, B + C]


def drafts(split: str, problems: int) -> list[dict[str, Any]]:
    """Eight solutions of every problem, in which lines slip at random, with true labels."""
    task = get_task("modular:terms=4")
    found = []
    for number, each in enumerate(make_rows("modular:terms=4", problems, seed=0, split=split)):
        problem = TaskProblem(each["prompt"], each["answer"], each["meta"])
        for sample in range(8):
            rng = random.Random(f"{number}/{sample}")
            steps, labels = demonstration(task, problem, rng, Noise(rate=0.3, recover=0.0))
            given = {"id": f"{each['id']}/{sample}", "prompt": each["prompt"], "answer": each["answer"]}
            correct = steps[-1].split()[-1] == each["answer"]
            found.append(given | {"completions": steps, "labels": labels, "outcome": correct})
    return found


@pytest.mark.slow
def test_a_refiner_learns_from_them(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "trainer": {"max_steps": 150, "val_check_interval": None, "check_val_every_n_epoch": None},
        "checkpoint": {"monitor": None},
        "model": {"init_args": {"policy": {"path": "tiny-0.1m"}, "validation": {"sampling": None}}},
        "data": {"init_args": {"max_length": 256, "global_batch_size": 32}},
    }
    for split, problems in (("train", 300), ("validation", 40)):
        path = tmp_path / f"{split}.jsonl"
        Refinements(max_pairs=4).write(convert_rows(drafts(split, problems), Refinements(max_pairs=4)).rows, path)
        settings["data"]["init_args"][split] = {"path": str(path)}
    before = validate(["tiny/sft"], settings)["val/loss"]
    fit(["tiny/sft"], settings, out=tmp_path / "run")
    settings["model"]["init_args"]["policy"]["path"] = str(tmp_path / "run")
    after = validate(["tiny/sft"], settings)["val/loss"]
    assert after < before / 3
