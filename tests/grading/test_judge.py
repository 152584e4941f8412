"""Verdict, vote and step labels of sampled completions, and the completion rows made of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from stepkd.data.completion import Completion
from stepkd.data.rows import COMPLETION, validate
from stepkd.grading.judge import completion_row, judge, step_labels, vote_keys
from stepkd.grading.pool import Grader, GradingConfig
from stepkd.models.spec import tiny_tokenizer
from stepkd.steps.segment import get_segmenter, segment, step_ends
from stepkd.steps.text import text_from_ids
from stepkd.tasks.rows import make_rows

PROVENANCE = {"sample": 0, "model": "m", "sampling": {"n": 1}, "seed": 0, "segmenter": "newline"}


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(GradingConfig(workers=1)) as grader:
        yield grader


@pytest.fixture(scope="module")
def problem() -> dict[str, Any]:
    return make_rows("modular:terms=4", 1, seed=0, split="test")[0]


def completion(text: str, *, finish: Any = "stop", sample: int = 0) -> Completion:
    """A completion of the character tokenizer; a finished one ends in the end token."""
    tokenizer = tiny_tokenizer()
    ids = tuple(tokenizer(text)["input_ids"]) + ((tokenizer.eos_token_id,) if finish == "stop" else ())
    shown = tokenizer.decode(list(ids), skip_special_tokens=True)
    numbers = {"logprobs": (-0.5,) * len(ids), "raw_logprobs": (-0.25,) * len(ids)}
    return Completion([], ids, **numbers, finish=finish, text=shown, sample=sample)


def test_ordinary_row(grader: Grader) -> None:
    row = {"id": "r", "prompt": "?", "answer": "1234"}
    texts = ["so\n#### 1,234", "#### $1234.00", "#### 7", "#### 7.0", "nothing here", ""]
    (samples,) = judge([row], [[completion(text, sample=i) for i, text in enumerate(texts)]], grader)
    assert [sample["verdict"] for sample in samples] == [
        "correct",
        "correct",
        "incorrect",
        "incorrect",
        "unparsed",
        "unparsed",
    ]
    assert [sample["vote"] for sample in samples] == ["1234", "1234", "7", "7", None, None]
    assert [sample["extracted"] for sample in samples][2:] == ["7", "7.0", None, None]
    assert [sample["tokens"] for sample in samples] == [len(completion(text).token_ids) for text in texts]
    assert samples[0]["logprob"] == -0.25 * samples[0]["tokens"], "summed at temperature 1"
    assert all(sample["step_labels"] is None for sample in samples)
    assert all(type(sample["verdict"]) is str for sample in samples), "plain JSON values"
    assert samples[0]["completion"] == texts[0]


def test_everything_correct_is_one_class(grader: Grader) -> None:
    row = {"id": "r", "prompt": "?", "answer": r"\frac{1}{2}"}
    (samples,) = judge(
        [row], [[completion(r"\boxed{0.5}"), completion(r"\boxed{\frac{1}{2}}"), completion("#### 2/4")]], grader
    )
    assert [sample["verdict"] for sample in samples] == ["correct"] * 3
    assert len({sample["vote"] for sample in samples}) == 1
    assert samples[0]["vote"]


def test_several_rows_keep_their_samples(grader: Grader) -> None:
    rows = [{"id": str(i), "prompt": "?", "answer": str(i)} for i in range(4)]
    numbers = [[0, 5], [1], [], [9, 3, 3]]
    judged = judge(rows, [[completion(f"#### {n}\n", finish="length") for n in ns] for ns in numbers], grader)
    assert [[sample["vote"] for sample in samples] for samples in judged] == [[str(n) for n in ns] for ns in numbers]
    assert [[s["verdict"] == "correct" for s in samples] for samples in judged] == [
        [n == i for n in ns] for i, ns in enumerate(numbers)
    ]
    assert {sample["finish"] for samples in judged for sample in samples} == {"length"}


def test_votes_group_answers_by_each_other_and_not_by_the_reference(grader: Grader) -> None:
    row = {"id": "r", "prompt": "?", "answer": "1/2"}
    texts = ["0.5", "1/2", r"\frac{1}{3}", "2/6", r"\frac{3}{9}", "x = 1/3"]
    (samples,) = judge([row], [[completion(f"#### {text}") for text in texts]], grader)
    votes = [sample["vote"] for sample in samples]
    assert len(set(votes[:2])) == 1
    assert len(set(votes[2:])) == 1
    assert votes[0] != votes[2]
    (other,) = judge([{**row, "answer": "7"}], [[completion(f"#### {text}") for text in texts]], grader)
    assert [sample["vote"] for sample in other] == votes, "whatever the reference answer is"


def test_vote_keys_of_lists_equations_words_and_nothing(grader: Grader) -> None:
    answers = [
        ["1, 2", "2,1", None, "3, 1", "x=1, x=2"],
        ["a - b", "a + b", "-b + a"],
        ["yes", r"\text{Yes}", "no"],
        [],
    ]
    keys = vote_keys(answers, grader)
    assert [len(set(row)) for row in keys] == [3, 2, 2, 0]
    assert keys[0][0] == keys[0][1]
    assert keys[0][2] is None
    assert keys[1][0] == keys[1][2]


def test_a_completion_that_was_cut_off_counts_by_a_finished_answer_only(grader: Grader) -> None:
    row = {"id": "r", "prompt": "?", "answer": "18"}
    texts = ["so 9 * 2 = 18", "#### 18", "#### 18\nNext", r"so \boxed{18} and", r"\boxed{18", "The answer is 18"]
    (cut,) = judge([row], [[completion(text, finish="length") for text in texts]], grader)
    assert [sample["verdict"] == "correct" for sample in cut] == [False, False, True, True, False, False]
    (ended,) = judge([row], [[completion(text) for text in texts]], grader)
    assert [sample["verdict"] == "correct" for sample in ended] == [True, True, True, True, False, True]


def test_records_fit_the_metrics(grader: Grader, problem: dict[str, Any]) -> None:
    (samples,) = judge([problem], [[completion(problem["solution"]), completion("x", finish="length")]], grader)
    assert {sample["verdict"] for sample in samples} <= {"correct", "incorrect", "unparsed", "timeout"}
    assert {sample["finish"] for sample in samples} <= {"stop", "length"}
    assert samples[0]["verdict"] == "correct"
    assert samples[0]["step_labels"] == [True] * len(problem["steps"])
    assert samples[1]["step_labels"] == [False]


def test_an_incorrect_step_under_a_correct_answer(grader: Grader, problem: dict[str, Any]) -> None:
    steps = [*problem["steps"]]
    steps[1] = "0*0=5\n"
    (samples,) = judge([problem], [[completion("".join(steps))]], grader)
    assert samples[0]["verdict"] == "correct"
    assert samples[0]["step_labels"] == [True, False, *[True] * (len(steps) - 2)]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("", [False]),
        ("\n\n", [False]),
        ("{0}\n\n{1}", [True, True]),
        ("\n{0}{1}", [False, True]),
        ("{0}{1}\n\n", [True, True]),
        ("{0}x\x0cy\u2028z\n{2}", [True, False, True]),
        ("{0}x\r\n{2}", [True, False, True]),
    ],
    ids=repr,
)
def test_blank_lines_are_no_steps(problem: dict[str, Any], text: str, labels: list[bool]) -> None:
    # As in training: a blank line belongs to the step before it; only a newline ends a step.
    steps = problem["steps"]
    assert step_labels(problem, text.format(*steps)) == labels


def test_no_labels_without_a_checker(problem: dict[str, Any]) -> None:
    assert step_labels({"id": "r", "prompt": "?", "answer": "1"}, "a\nb") is None
    assert step_labels({key: problem[key] for key in ("id", "prompt", "answer", "task")}, "a") is None


@pytest.mark.parametrize("finish", ["stop", "length"])
@pytest.mark.parametrize(
    "text",
    ["{solution}", "a\n\n\nb\n\n", "\n\n\nccc", " \n \n", "#### #### 3\n\n", "é\né", "{solution}\n{solution}", "."],
)
def test_completion_rows_keep_the_contract(grader: Grader, problem: dict[str, Any], text: str, finish: Any) -> None:
    sampled = completion(text.format(**problem), finish=finish)
    tokens = text_from_ids(tiny_tokenizer(), sampled.token_ids, sampled.logprobs)
    ends = step_ends(segment(get_segmenter("newline"), tokens))
    ((sample,),) = judge([problem], [[sampled]], grader)
    row = completion_row(problem, sampled, sample, ends) | PROVENANCE
    validate(row, COMPLETION, extra="keep")
    assert len(row["step_labels"]) == len(ends)
    assert row["correct"] is (sample["verdict"] == "correct")
    assert (row["problem_id"], row["answer"]) == (problem["id"], problem["answer"])
    assert (row["token_ids"], row["logprobs"]) == (list(sampled.token_ids), list(sampled.logprobs))


def test_an_empty_completion_that_ends_at_once(grader: Grader, problem: dict[str, Any]) -> None:
    sampled = completion("")
    ((sample,),) = judge([problem], [[sampled]], grader)
    row = completion_row(problem, sampled, sample, [1]) | PROVENANCE
    assert validate(row, COMPLETION, extra="keep")["step_labels"] == [False]


def test_other_segmenters_need_the_step_texts(grader: Grader, problem: dict[str, Any]) -> None:
    sampled = completion(problem["solution"])
    tokens = text_from_ids(tiny_tokenizer(), sampled.token_ids)
    spans = segment(get_segmenter("whole"), tokens)
    ((sample,),) = judge([problem], [[sampled]], grader)
    without = completion_row(problem, sampled, sample, step_ends(spans)) | PROVENANCE
    assert "step_labels" not in validate(without, COMPLETION, extra="keep")
    steps = [tokens.span_text(*span) for span in spans]
    judged = completion_row(problem, sampled, sample, step_ends(spans), steps) | PROVENANCE
    assert validate(judged, COMPLETION, extra="keep")["step_labels"] == [False], (
        "a whole solution is not the first line"
    )


def test_completion_row_of_an_ordinary_problem(grader: Grader) -> None:
    row = {"id": "r", "prompt": "?", "answer": "3"}
    sampled = completion("#### 3")
    ((sample,),) = judge([row], [[sampled]], grader)
    made = completion_row(row, sampled, sample, [len(sampled.token_ids)]) | PROVENANCE
    assert "step_labels" not in validate(made, COMPLETION, extra="keep")
    assert made["correct"] is True
