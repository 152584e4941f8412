"""Labelling solutions that are there already: rollout rows, step-labelled rows, worked solutions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.rows import STEPWISE
from stepkd.data.spec import DataConfig, load_rows, parse_spec
from stepkd.errors import ConfigError, DataError
from stepkd.labels.labellers import Solution
from stepkd.labels.settings import LabelConfig
from stepkd.labels.solutions import Candidate, cut
from stepkd.steps.segment import get_segmenter
from stepkd.tasks.rows import make_rows

TASK = "modular:terms=3,modulus=2"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(spec: LabelConfig) -> list[dict[str, Any]]:
    return load_rows(DataConfig(path=str(Path(spec.out) / "labels.jsonl")))


def given(spec: LabelConfig, rollouts: str, name: str, **changes: Any) -> LabelConfig:
    settings = {"problems": None, "rollouts": rollouts, "labeller": "checker", "out": f"{spec.out}-{name}"}
    return replace(spec, **(settings | changes))


# ---- rollout rows --------------------------------------------------------------------------------------------------


def test_rollouts_once_labels_several_times(spec: LabelConfig, run: Any, recording: Any) -> None:
    run(replace(spec, labeller="checker"))
    checked = labelled(spec)
    sampler = recording()
    again = given(spec, spec.out, "again", model=None, labeller="monte_carlo")
    run(again, sampler=sampler)
    assert sampler.sampled == [], "nothing is sampled but continuations"
    rows = labelled(again)
    assert [row["labelling"]["labeller"] for row in rows] == ["monte_carlo"] * 10
    for row, before in zip(rows, checked, strict=True):
        same = ("id", "problem_id", "token_ids", "logprobs", "step_ends", "steps", "correct", "answer", "task", "meta")
        assert {name: row[name] for name in same} == {name: before[name] for name in same}
        assert row["labelling"]["segmenter"] == before["labelling"]["segmenter"], "the steps' own, not 'of the row'"
    back = given(spec, f"{again.out}/labels.jsonl", "back")
    run(back)
    assert [row["step_labels"] for row in labelled(back)] == [row["step_labels"] for row in checked]
    assert all("step_values" not in row for row in labelled(back)), "the checker estimates no values"


def test_another_segmenter_cuts_anew(spec: LabelConfig, run: Any) -> None:
    run(replace(spec, labeller="checker"))
    whole = given(spec, spec.out, "whole", segmenter="whole", labeller="outcome")
    run(whole)
    assert all(row["step_ends"] == [len(row["token_ids"])] for row in labelled(whole))
    assert all(row["step_labels"] == [row["correct"]] for row in labelled(whole))
    assert {len(row["step_ends"]) for row in labelled(spec)} != {1}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_confidence_comes_from_the_rows(
    spec: LabelConfig, run: Any, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities at temperature 1 are in the rows; nothing is computed again."""
    run(replace(spec, labeller="checker", temperature=temperature, segmenter="adaptive_step:0.02"))
    monkeypatch.setattr("stepkd.labels.sources.token_signals", None)
    again = given(spec, spec.out, "again", segmenter="adaptive_step:0.02")
    run(again)
    assert [row["step_ends"] for row in labelled(again)] == [row["step_ends"] for row in labelled(spec)]
    assert max(len(row["step_ends"]) for row in labelled(spec)) > 2


def test_missing_confidence_is_computed(spec: LabelConfig, run: Any, tmp_path: Path) -> None:
    run(replace(spec, labeller="checker", temperature=0.7, segmenter="adaptive_step:0.02"))
    rows = [{k: v for k, v in row.items() if k != "raw_logprobs"} for row in labelled(spec)]
    again = given(spec, write(tmp_path / "r.jsonl", rows), "again", segmenter="adaptive_step:0.02")
    run(again)
    assert [row["step_ends"] for row in labelled(again)] == [row["step_ends"] for row in labelled(spec)]


def test_a_teacher_for_reject(spec: LabelConfig, run: Any) -> None:
    rejects = replace(spec, labeller="checker", segmenter="reject:0.5", teacher="tiny-0.5m")
    run(rejects)
    again = given(spec, rejects.out, "again", segmenter="reject:0.5", teacher="tiny-0.5m")
    run(again)
    assert [row["step_ends"] for row in labelled(again)] == [row["step_ends"] for row in labelled(rejects)]
    assert max(len(row["step_ends"]) for row in labelled(again)) > 2


# ---- texts ---------------------------------------------------------------------------------------------------------


def stepwise_rows() -> list[dict[str, Any]]:
    rows = make_rows(TASK, 4, seed=0)
    return [
        {k: row[k] for k in ("id", "prompt", "answer", "task", "meta")}
        | {"completions": [step.strip() for step in row["steps"]], "labels": [None] * (len(row["steps"]) - 1) + [True]}
        for row in rows
    ]


def test_step_labelled_rows_keep_their_steps(spec: LabelConfig, run: Any, tmp_path: Path) -> None:
    rows = stepwise_rows()
    rows[1]["completions"][0] = "nonsense"
    rows[2] |= {"completions": rows[2]["completions"][:1], "labels": [True]}  # stops early
    job = given(spec, write(tmp_path / "s.jsonl", rows), "steps")
    summary = run(job)
    out = load_rows(DataConfig(path=f"{job.out}/labels.jsonl"), contract=STEPWISE)
    assert [row["completions"] for row in out] == [row["completions"] for row in rows], "as the row wrote them"
    assert out[0]["labels"] == [True] * len(rows[0]["completions"])
    assert out[1]["labels"] == [False] + [True] * (len(rows[1]["completions"]) - 1)
    assert [row["outcome"] for row in out] == [True, True, False, True], "graded by the answer"
    assert out[0]["labelling"]["segmenter"] == {"name": "of the row"}
    assert summary is not None
    assert summary["right_answers_with_a_wrong_step"] == 1


def test_a_solution_that_stops_early_is_continued(spec: LabelConfig, run: Any, tmp_path: Path) -> None:
    rows = stepwise_rows()[:2]
    rows[1] |= {"completions": ["no number here"], "labels": [False]}
    job = given(spec, write(tmp_path / "s.jsonl", rows), "mc", labeller="monte_carlo")
    run(job)
    trials = [row["label_facts"]["trials"] for row in labelled(job)]
    assert trials[0][-1] == 0, "the solution has its answer"
    assert trials[1] == [2], "without an answer its end can be continued"


def test_worked_solutions_end_in_the_end_token(spec: LabelConfig, run: Any, tmp_path: Path) -> None:
    rows = [{k: row[k] for k in ("id", "prompt", "answer", "solution")} for row in make_rows(TASK, 3, seed=0)]
    job = given(spec, write(tmp_path / "d.jsonl", rows), "worked", labeller="monte_carlo")
    run(job)
    for row, source in zip(labelled(job), rows, strict=True):
        assert "".join(row["completions"]) == source["solution"]
        assert (row["labels"][-1], row["step_values"][-1], row["outcome"]) == (True, 1.0, True)
        assert "solution" not in row


def test_confidence_of_texts(spec: LabelConfig, run: Any) -> None:
    job = given(spec, f'task:task="{TASK}",n=4', "texts", segmenter="adaptive_step", quantile=0.2)
    run(job)
    assert (Path(job.out) / "threshold.json").is_file()
    assert all(len(row["completions"]) == len(row["labels"]) for row in labelled(job))


def test_steps_that_share_a_token_are_dropped() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, " ": 1, "b": 2, "a ": 3, "a b": 4}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocab=vocabulary, merges=[("a", " "), ("a ", "b")]))
    )
    steps = ("b ", "a ", "b")
    candidate = Candidate("x", 0, {"id": "x"}, (0,), "stepwise", {}, None, text="".join(steps), steps=steps)
    newline = get_segmenter("newline")
    assert cut(candidate, tokenizer, None, newline) == "steps_share_a_token"
    apart = ("b ", "a b")
    solution = cut(replace(candidate, text="".join(apart), steps=apart), tokenizer, None, newline)
    assert isinstance(solution, Solution)
    assert (solution.spans, solution.steps) == (((0, 2), (2, 3)), apart)


def test_long_rows_are_dropped(spec: LabelConfig, run: Any, tmp_path: Path, policy: Any) -> None:
    rows = stepwise_rows()
    rows[0] |= {"completions": ["1", " 2" * policy.max_length], "labels": [True, False]}
    job = given(spec, write(tmp_path / "s.jsonl", rows), "long")
    summary = run(job)
    assert summary["dropped"] == {"longer_than_context": 1}
    assert (summary["solutions"], summary["labelled"]) == (4, 3)
    with pytest.raises(DataError, match="no solution is left to label: every row is longer"):
        run(replace(given(spec, write(tmp_path / "l.jsonl", rows[:1]), "longer")))


def test_data_settings_take_a_job_folder(tmp_path: Path) -> None:
    write(tmp_path / "labels.jsonl", [{}])
    assert parse_spec(str(tmp_path)).path == str(tmp_path / "labels.jsonl")
    assert parse_spec("task:n=3").source == "task"


# ---- what is refused -----------------------------------------------------------------------------------------------

PROBLEM = {"id": "a", "prompt": "1+1=\n", "answer": "2"}
STEPS = {"id": "a", "prompt": "1+1=\n", "completions": ["2"], "labels": [True]}


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([STEPS], {"labeller": "monte_carlo"}, "row 'a' has no 'answer', and Monte-Carlo labels compare"),
        ([STEPS | {"answer": "2"}], {}, "row 'a' has no 'task' and 'meta': only rows of the tiny world"),
        ([STEPS], {"labeller": "outcome"}, "neither an 'answer' nor a stated outcome"),
        ([PROBLEM], {}, "row 'a' is a problem without a solution: give it as --problems"),
        ([STEPS, STEPS], {}, "share the id 'a'"),
        ([STEPS | {"completions": []}], {}, "has zero steps"),
        ([STEPS | {"labels": [True, False]}], {}, "has 2 entries for 1 completions"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], {}, "preference rows hold no single solution"),
    ],
)
def test_bad_rows(
    spec: LabelConfig, run: Any, tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    job = given(spec, write(tmp_path / "r.jsonl", rows), "bad", **changes)
    with pytest.raises(DataError, match=message):
        run(job)
    assert not Path(job.out).exists(), "refused before anything is written"


def test_the_model_must_be_known(spec: LabelConfig, run: Any, tmp_path: Path) -> None:
    run(replace(spec, labeller="checker"))
    rows = labelled(spec)
    rows[0]["model"] = "another"
    with pytest.raises(ConfigError, match=r"give --model, .* the rows name 2 models \(another, tiny-0.1m\)"):
        run(given(spec, write(tmp_path / "r.jsonl", rows), "two", model=None))
    with pytest.raises(ConfigError, match="the rows name none"):
        run(given(spec, f'task:task="{TASK}",n=2', "none", model=None))
