"""Labelling solutions that are there already: completion rows, step-labelled rows, worked solutions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stepkd.data.completion import Completion
from stepkd.data.config import DataConfig, parse_spec
from stepkd.data.load import load_rows
from stepkd.data.rows import STEPWISE
from stepkd.errors import ConfigError, DataError
from stepkd.labels.labellers import Outcome, Solution, TaskChecker
from stepkd.labels.settings import Cut, Existing, Fitted, LabelConfig, Reject
from stepkd.labels.solutions import SampledSolutions, cut
from stepkd.sampling.engine import SamplingConfig
from stepkd.steps.segment import get_segmenter
from stepkd.tasks.rows import make_rows

TASK = "modular:terms=3,modulus=2"
AT_2 = Cut(segmenter="adaptive_step:0.02")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(spec: LabelConfig) -> list[dict[str, Any]]:
    return load_rows(DataConfig(path=str(Path(spec.out) / "labels.jsonl")))


def given(spec: LabelConfig, completions: str, name: str, **changes: Any) -> LabelConfig:
    """A job of solutions that are there; ``continued``: with continuations of every step."""
    solutions = Existing(completions=completions, model=changes.pop("model", "tiny-0.1m"))
    labeller = spec.labeller if changes.pop("continued", False) else TaskChecker()
    return replace(spec, **({"solutions": solutions, "labeller": labeller, "out": f"{spec.out}-{name}"} | changes))


# ---- completion rows -------------------------------------------------------------------------------------------------


def test_completions_once_labels_several_times(spec: LabelConfig, run: Any, recording: Any) -> None:
    run(replace(spec, labeller=TaskChecker()))
    checked = labelled(spec)
    engine = recording()
    again = given(spec, spec.out, "again", model=None, continued=True)
    run(again, engine=engine)
    assert engine.sampled == [], "nothing is sampled but continuations"
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
    run(replace(spec, labeller=TaskChecker()))
    whole = given(spec, spec.out, "whole", steps=Cut(segmenter="whole"), labeller=Outcome())
    run(whole)
    assert all(row["step_ends"] == [len(row["token_ids"])] for row in labelled(whole))
    assert all(row["step_labels"] == [row["correct"]] for row in labelled(whole))
    assert {len(row["step_ends"]) for row in labelled(spec)} != {1}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_confidence_comes_from_the_rows(
    spec: LabelConfig, run: Any, drawn: Any, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities at temperature 1 are in the rows; nothing is computed again."""
    spec = drawn(replace(spec, labeller=TaskChecker(), steps=AT_2), temperature=temperature)
    run(spec)
    monkeypatch.setattr("stepkd.labels.solutions.annotate", None)
    again = given(spec, spec.out, "again", steps=AT_2)
    run(again)
    assert [row["step_ends"] for row in labelled(again)] == [row["step_ends"] for row in labelled(spec)]
    assert max(len(row["step_ends"]) for row in labelled(spec)) > 2


def test_missing_confidence_is_computed(spec: LabelConfig, run: Any, drawn: Any, tmp_path: Path) -> None:
    run(drawn(replace(spec, labeller=TaskChecker(), steps=AT_2), temperature=0.7))
    rows = [{k: v for k, v in row.items() if k != "raw_logprobs"} for row in labelled(spec)]
    again = given(spec, write(tmp_path / "r.jsonl", rows), "again", steps=AT_2)
    run(again)
    assert [row["step_ends"] for row in labelled(again)] == [row["step_ends"] for row in labelled(spec)]


def test_a_teacher_for_reject(spec: LabelConfig, run: Any) -> None:
    rejects = replace(spec, labeller=TaskChecker(), steps=Reject(teacher="tiny-0.5m"))
    run(rejects)
    again = given(spec, rejects.out, "again", steps=rejects.steps)
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
    assert summary["correct_with_incorrect_step"] == 1


def test_a_solution_that_stops_early_is_continued(spec: LabelConfig, run: Any, tmp_path: Path) -> None:
    rows = stepwise_rows()[:2]
    rows[1] |= {"completions": ["no number here"], "labels": [False]}
    job = given(spec, write(tmp_path / "s.jsonl", rows), "mc", continued=True)
    run(job)
    trials = [row["label_facts"]["trials"] for row in labelled(job)]
    assert trials[0][-1] == 0, "the solution has its answer"
    assert trials[1] == [2], "without an answer its end can be continued"


def test_worked_solutions_end_in_the_end_token(spec: LabelConfig, run: Any, tmp_path: Path) -> None:
    rows = [{k: row[k] for k in ("id", "prompt", "answer", "solution")} for row in make_rows(TASK, 3, seed=0)]
    job = given(spec, write(tmp_path / "d.jsonl", rows), "worked", continued=True)
    run(job)
    for row, source in zip(labelled(job), rows, strict=True):
        assert "".join(row["completions"]) == source["solution"]
        assert (row["labels"][-1], row["step_values"][-1], row["outcome"]) == (True, 1.0, True)
        assert "solution" not in row


def test_confidence_of_texts(spec: LabelConfig, run: Any) -> None:
    job = given(spec, f'task:task="{TASK}",n=4', "texts", steps=Fitted(quantile=0.2))
    run(job)
    assert (Path(job.out) / "threshold.json").is_file()
    assert all(len(row["completions"]) == len(row["labels"]) for row in labelled(job))


def test_steps_that_share_a_token_are_dropped() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, "\n": 1, "b": 2, "a\n": 3, "a\nb": 4}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocab=vocabulary, merges=[("a", "\n"), ("a\n", "b")]))
    )
    newline = get_segmenter("newline")

    def worked(steps: list[str]) -> Solution:
        ids = np.asarray(tokenizer("".join(steps))["input_ids"])
        text = "".join(steps)
        return Solution(np.zeros(1), ids, id="x", text=text, index=0, correct=None, columns={"completions": steps})

    steps = ["b\n", "a\n", "b"]
    assert cut(worked(steps), tokenizer, newline) == "steps_share_a_token"
    apart = ["b\n", "a\nb"]
    found = cut(worked(apart), tokenizer, newline)
    assert isinstance(found, Solution)
    assert (found.spans, found.steps) == (((0, 2), (2, 3)), tuple(apart))


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
        ([STEPS], {"continued": True}, "row 'a' has no 'answer', and Monte-Carlo labels compare"),
        ([STEPS | {"answer": "2"}], {}, "row 'a' has no 'task' and 'meta': only rows of the tiny world"),
        ([STEPS], {"labeller": Outcome()}, "neither an 'answer' nor a stated outcome"),
        ([PROBLEM], {}, "row 'a' is a problem without a solution: have solutions of it Sampled"),
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
    run(replace(spec, labeller=TaskChecker()))
    rows = labelled(spec)
    rows[0]["model"] = "another"
    with pytest.raises(ConfigError, match=r"give the model .* the rows name 2 models \(another, tiny-0.1m\)"):
        run(given(spec, write(tmp_path / "r.jsonl", rows), "two", model=None))
    with pytest.raises(ConfigError, match="the rows name none"):
        run(given(spec, f'task:task="{TASK}",n=2', "none", model=None))


def test_a_sampler_need_not_know_log_probabilities() -> None:
    """One of a script's own; the job records null."""
    source = object.__new__(SampledSolutions)
    source.sampling, source.prompts = SamplingConfig(n=1), [Completion([1], [], row={"answer": "2"}, id="p")]
    source.engine = SimpleNamespace(generate=lambda *_, **__: [[Completion([1], np.asarray([2]), text="2")]])
    grader = SimpleNamespace(grade=lambda *_, **__: [SimpleNamespace(verdict="correct")])
    source.bench, source.signals = SimpleNamespace(grader=grader), ()
    (sample,) = source.work([0])[0]["samples"]
    assert sample == {
        "token_ids": [2], "logprobs": None, "raw_logprobs": None, "finish": "stop", "text": "2", "correct": True
    }  # fmt: skip
