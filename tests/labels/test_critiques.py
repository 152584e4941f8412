"""Critiques as training rows: what labels ask for, which agree, SFT and pairs of them, rewards; tagged solutions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepkd.data.config import DataConfig
from stepkd.data.encode import Encoder
from stepkd.data.load import load_rows
from stepkd.data.templates import get_template
from stepkd.errors import ConfigError, DataError
from stepkd.grading.pool import Grader
from stepkd.labels.convert import Demonstrations, Preference, convert_rows
from stepkd.labels.critiques import Critiques, Tagged
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig
from stepkd.modules.rewards import RewardConfig, Rewards
from stepkd.scorers.critiques import FORMS, Tags, get_form
from stepkd.scorers.scorer import score_one, score_rows
from stepkd.steps.segment import get_segmenter
from stepkd.tasks import critique_rows, make_rows
from stepkd.tasks.rows import Noise

LABELLED = {"id": "a", "prompt": "p", "completions": ["x", "y", "z"], "labels": [True, False, True]}


def written(step: int | None, *texts: str, finish: str = "stop") -> list[dict[str, Any]]:
    return [{"step": step, "text": text, "verdict": None, "tokens": 1, "finish": finish} for text in texts]


def scored(*critiques: dict[str, Any], **more: Any) -> dict[str, Any]:
    form = FORMS[more.pop("form", "step")].id
    return LABELLED | {"score_facts": {"form": form, "critiques": list(critiques)}} | more


# ---- problems of a critic --------------------------------------------------------------------------------------------


def test_labels_say_the_verdict_of_every_request() -> None:
    found = convert_rows([LABELLED], Critiques())
    assert found.counts == {"rows": 2, "without_a_label": 1}, "behind the first incorrect step nothing is asked"
    assert [(row["id"], row["answer"]) for row in found.rows] == [
        ("a/critique-0", "correct"),
        ("a/critique-1", "incorrect"),
    ]
    assert found.rows[1]["prompt"] == [text for _, text in FORMS["step"].questions(LABELLED, ["x", "y"])][1]
    unknown = LABELLED | {"id": "b", "labels": [None, True, True]}
    clean = LABELLED | {"id": "c", "labels": [1, 0, 1]}
    found = convert_rows([LABELLED, unknown, clean], Critiques(form="processbench"))
    assert [(row["id"], row["answer"]) for row in found.rows] == [("a/critique", "1"), ("c/critique", "-1")]
    assert found.counts["without_a_label"] == 1


@pytest.mark.parametrize("form", ["step", "processbench"])
def test_the_accuracy_reward_reads_verdicts(form: str) -> None:
    """GRPO with the verdict as reward needs no reward of its own."""
    answers = ("correct", "incorrect") if form == "step" else ("-1", "1", "10")
    texts = [rf"It is \boxed{{7}}, no: \boxed{{{each}}}" for each in answers]
    with Grader() as grader:
        rewards = Rewards([RewardConfig("accuracy")], grader)
        for gold in answers:
            n = len(answers)
            columns = {"prompts": ["p"] * n, "completions": texts, "answer": [gold] * n, "cut_off": [False] * n}
            totals, _ = rewards(columns, list(answers))
            assert totals == [float(each == gold) for each in answers]
        if form == "step":  # a verdict in another LaTeX word earns what the critic reads in it
            text = r"\boxed{\text{Correct}}"
            assert get_form(form).meaning(get_form(form).read(text)) is True
            columns = {"prompts": ["p"] * 2, "completions": [text] * 2, "answer": [*answers], "cut_off": [False] * 2}
            assert rewards(columns, list(answers))[0] == [1.0, 0.0]


def test_requests_are_balanced_by_step_and_never_stand_behind_an_unknown_label() -> None:
    many = [[False, True, True], [True, False, False], [True, True, False], [True, True, True], [True, True, True]]
    rows = [LABELLED | {"id": f"r{i}", "labels": labels} for i, labels in enumerate(many)]
    every = convert_rows(rows, Critiques())
    kept = convert_rows(rows, Critiques(balance_seed=1))
    asked = {row["id"]: row["answer"] for row in kept.rows}
    assert asked.items() <= {(row["id"], row["answer"]) for row in every.rows}
    for step in range(3):
        answers = [answer for name, answer in asked.items() if name.endswith(f"-{step}")]
        assert sorted(answers) == ["correct", "incorrect"]
    assert kept.counts == {"rows": 6, "in_surplus": every.counts["rows"] - 6, "without_a_label": 3}
    gap = convert_rows([LABELLED | {"labels": [None, True, True]}, LABELLED | {"id": "b"}], Critiques())
    assert [row["id"] for row in gap.rows] == ["b/critique-0", "b/critique-1"]


# ---- critiques that a Critic has written -----------------------------------------------------------------------------


def test_critiques_that_agree_are_demonstrations_and_the_better_side_of_pairs() -> None:
    row = scored(
        *written(0, r"good \boxed{correct}", r"bad \boxed{incorrect}"),
        *written(1, r"wrong: \boxed{Incorrect}", "no verdict", " "),
        *written(2, r"behind \boxed{correct}"),
    )
    found = convert_rows([row], Critiques())
    assert found.counts == {"rows": 4, "agree": 2, "disagree": 1, "without_a_label": 1, "without_a_verdict": 2}
    kept = convert_rows(found.rows, Demonstrations())
    assert [(each["id"], each["solution"]) for each in kept.rows] == [
        ("a/critique-0/0", r"good \boxed{correct}"),
        ("a/critique-1/0", r"wrong: \boxed{Incorrect}"),
    ]
    assert kept.counts == {"rows": 2, "incorrect_answer": 2}
    pairs = convert_rows(found.rows, Preference())
    assert [(each["problem_id"], each["chosen"], each["rejected"]) for each in pairs.rows] == [
        ("a/critique-0", r"good \boxed{correct}", r"bad \boxed{incorrect}"),
        ("a/critique-1", r"wrong: \boxed{Incorrect}", "no verdict"),
    ]


def test_critiques_that_were_cut_off_are_no_demonstrations(tmp_path: Path) -> None:
    critiques = [*written(None, r"\boxed{1}", finish="length"), *written(None, r"\boxed{01}", r"\boxed{2}")]
    row = scored(*critiques, form="processbench")
    found = convert_rows([row], Critiques(form="processbench"))
    Critiques().write(found.rows, tmp_path / "graded.jsonl")
    rows = load_rows(DataConfig(path=str(tmp_path / "graded.jsonl")))
    kept = convert_rows(rows, Demonstrations())
    assert [each["solution"] for each in kept.rows] == [r"\boxed{01}"]
    assert kept.counts == {"rows": 1, "cut_off": 1, "incorrect_answer": 1}


def test_bad_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a: no step labels"):
        convert_rows([{"id": "a", "prompt": "p", "completions": ["x"]}], Critiques())
    with pytest.raises(ConfigError, match="no form of critiques"):
        Critiques(form="boxes")
    with pytest.raises(ConfigError, match="balance_seed=0: form 'processbench' has one verdict per solution"):
        Critiques(form="processbench", balance_seed=0)
    with pytest.raises(DataError, match="rows 1 and 2 share the id 'a'"):
        convert_rows([LABELLED, LABELLED | {"completions": ["x", "y", "other"]}], Critiques())
    with pytest.raises(DataError, match="a row has no id"):
        convert_rows([{key: LABELLED[key] for key in LABELLED if key != "id"}], Critiques())
    with pytest.raises(DataError, match="a, column 'labels': 3 steps and 1 labels"):
        convert_rows([LABELLED | {"labels": [True]}], Critiques())
    with pytest.raises(DataError, match=r"none of 1 rows is left \(1 without_a_label\)"):
        convert_rows([LABELLED | {"labels": [None, True, True]}], Critiques(form="processbench"))
    of_steps = scored(*written(0, "so #### 1"), form="task")
    for form in ("processbench", "step"):
        with pytest.raises(DataError, match=r"a, column 'score_facts': .* in form task: give --to\.form"):
            convert_rows([of_steps], Critiques(form=form))
    assert convert_rows([of_steps], Critiques(form="task")).counts == {
        "rows": 1,
        "agree": 1,
        "without_a_critique": 1,
        "without_a_label": 1,
    }
    own = tmp_path / "own.yaml"
    own.write_text(
        "{prompt: 'Other words. {problem} {steps}', line: '{text}', verdict: '#### *(\\S+)', words: ['1', '0']}"
    )
    with pytest.raises(DataError, match=r"were asked for in form task: give --to\.form the Critic's"):
        convert_rows([of_steps], Critiques(form=str(own)))
    unnamed = scored(*written(0, "so #### 1")) | {"score_facts": {"critiques": written(0, "so #### 1")}}
    with pytest.raises(DataError, match=r"name another form than --to\.form, or none: .* score the rows again"):
        convert_rows([unnamed], Critiques(form="task"))
    with pytest.raises(DataError, match="1 of 2 rows have a Critic's critiques"):
        convert_rows([of_steps, LABELLED | {"id": "b"}], Critiques(form="task"))


# ---- the tiny world's ------------------------------------------------------------------------------------------------


def test_a_tiny_verifier_learns_the_requests_of_its_form() -> None:
    """The source's rows are those that the converter makes of labels, with the line computed anew as the critique."""
    options = {"task": "modular:terms=4", "n": 5, "seed": 3, "noise": {"rate": 0.4}}
    rows = load_rows(DataConfig(source="task", options={**options, "critiques": True}))
    solutions = make_rows("modular:terms=4", 5, seed=3, noise=Noise(0.4))
    asked = convert_rows(solutions, Critiques(form="task")).rows
    assert [(row["prompt"], row["answer"]) for row in rows] == [(row["prompt"], row["answer"]) for row in asked]
    assert {row["answer"] for row in rows} == {"0", "1"}
    first = make_rows("modular:terms=3", 1, seed=0)[0] | {"steps": ["1=1", "x"]}
    (row,) = critique_rows(first)
    line = make_rows("modular:terms=3", 1, seed=0)[0]["steps"][0]
    assert row["prompt"] == f"{first['prompt']}1=1?\n"
    assert row["solution"] == f"{line}#### 0"
    (plain,) = make_rows("independent:terms=2,modulus=10", 1, seed=0)
    turned = [plain["steps"][1], plain["steps"][0]]
    lines = [each["solution"] for each in critique_rows(plain | {"steps": turned})]
    assert lines == [f"{line.strip()}\n#### 1" for line in turned], "of lines in any order the one that stands there"
    surplus = critique_rows(make_rows("modular:terms=2", 1, seed=0)[0] | {"steps": [*solutions[0]["steps"][:0]]})
    assert surplus == []
    grades = Grader(extractors=("hash",)).grade([row["solution"] for row in rows], [row["answer"] for row in rows])
    assert {str(grade.verdict) for grade in grades} == {"correct"}, "the first answer mark is the verdict's"


# ---- tagged steps ----------------------------------------------------------------------------------------------------

TAGS = {"correct": "Y", "incorrect": "N"}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load(PolicyConfig(path="tiny-0.1m", special_tokens=("Y", "N")))


def test_tags_stand_behind_labelled_steps_and_texts_do_not_show_them(policy: Policy, tmp_path: Path) -> None:
    rows = make_rows("modular:terms=4", 6, seed=3, noise=Noise(0.4))
    found = convert_rows(rows, Tagged(**TAGS))
    assert found.counts["correct"] + found.counts["incorrect"] == sum(len(row["steps"]) for row in rows)
    encoder = Encoder(policy.tokenizer, get_template("task"), get_segmenter("newline"))
    policy.tokenizer.save_pretrained(tmp_path)
    for row, tagged in zip(rows, found.rows, strict=True):
        marks = ["NY"[correct] for correct in row["step_labels"]]
        lines = [f"{step.rstrip()}{mark}" for step, mark in zip(row["steps"], marks, strict=True)]
        assert tagged["solution"] == "\n".join(lines)
        completion, spans = encoder.steps(tagged)
        assert policy.tokenizer.decode(completion.token_ids, skip_special_tokens=True) == row["solution"]
        sampled = {"token_ids": list(completion.token_ids), "step_ends": [end for _, end in spans], "id": "s"}
        logps = [math.log(0.9)] * len(completion.token_ids)
        (scores,) = score_rows(Tags("tiny-0.1m", **TAGS), [sampled | {"logprobs": logps}])
        assert scores == pytest.approx([0.9 if correct else 0.1 for correct in row["step_labels"]])
        (certain,) = score_rows(Tags(str(tmp_path), **TAGS), [sampled])
        assert certain == list(map(float, row["step_labels"]))
    unlabelled = convert_rows([LABELLED | {"labels": [None, True, False]}], Tagged(**TAGS)).rows[0]
    assert unlabelled["solution"] == "x\nyY\nzN"


def test_bad_tags(policy: Policy) -> None:
    with pytest.raises(ConfigError, match="two different tokens"):
        Tagged(correct="Y", incorrect="Y")
    with pytest.raises(DataError, match="a: a step holds the tag already: 'x'"):
        convert_rows([LABELLED], Tagged(correct="x", incorrect="N"))
    with pytest.raises(DataError, match="a, column 'token_ids': tags are read in sampled completions"):
        score_rows(Tags("tiny-0.1m", **TAGS), [LABELLED])
    with pytest.raises(ConfigError, match="tag 'Yes' is 3 tokens"):
        score_rows(Tags("tiny-0.1m", correct="Yes", incorrect="N"), [{"token_ids": [5], "step_ends": [1]}])
    with pytest.raises(ConfigError, match=r"policy.special_tokens: 'Yes' is 3 tokens"):
        Policy.load(PolicyConfig(path="tiny-0.1m", special_tokens=("Yes",)))
    unsure = {"token_ids": np.array([5, 6]), "step_ends": [1, 2], "logprobs": np.array([-1.0, -1.0])}
    (scores,) = score_rows(Tags("tiny-0.1m", **TAGS), [unsure])
    assert np.isnan(scores).all()
    with pytest.raises(ConfigError, match="a search and the labeller Scored give step texts"):
        score_one(Tags("tiny-0.1m", **TAGS), "p", ["x"])
    with pytest.raises(DataError, match="a, column 'labels': 3 steps and 2 labels"):
        convert_rows([LABELLED | {"labels": [True, False]}], Tagged(**TAGS))
    assert json.dumps(Tags("m", **TAGS).provenance())
