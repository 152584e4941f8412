"""Labelled steps for the judge: the nearest by hand, none of the problem's own, shown behind the solution."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, DataError
from stepkd.models.policy import Policy
from stepkd.scorers.examples import Ideas, LabelledStep, StepExamples
from stepkd.scorers.judge import PromptedJudge
from stepkd.scorers.load import Judge, load_scorer
from stepkd.scorers.scorer import Solutions

SHORT: dict[str, Any] = {
    "question": "{step} ok?", "template": PromptTemplate(style="plain", plain="{prompt}\nA:"), "answers": [("Y", "N")],
}  # fmt: skip


def row(prompt: Any, *steps: tuple[str, Any], **more: Any) -> dict[str, Any]:
    texts, labels = zip(*steps, strict=True)
    return {"prompt": prompt, "completions": list(texts), "labels": list(labels), **more}


ROWS = [
    row("red apples", ("add two", True), ("add three", False), problem_id="r"),
    row("green apples", ("take two", True), ("take four", False), problem_id="g"),
    row("blue pears", ("add two", True), ("cut five", False), problem_id="b"),
]


def cosine(a: str, b: str, texts: list[str]) -> float:
    """Of two texts of different words, by the formula."""
    n = len(texts)
    weight = {w: math.log(1 + n / max(sum(w in t.split() for t in texts), 1)) for w in f"{a} {b}".split()}
    length = math.prod(math.sqrt(sum(weight[w] ** 2 for w in text.split())) for text in (a, b))
    return sum(weight[w] ** 2 for w in set(a.split()) & set(b.split())) / length


@pytest.mark.parametrize(("prompt", "step"), [("green pears", "add four"), ("red apples tall", "cut two"), ("x", "y")])
def test_the_nearest_by_hand(prompt: str, step: str) -> None:
    """The sum of both cosines, words that the index does not know among them; the nearest of each verdict."""
    every = [(each["prompt"], *pair) for each in ROWS for pair in zip(each["completions"], each["labels"], strict=True)]
    problems, steps = [each["prompt"] for each in ROWS], [text for _, text, _ in every]
    near = [cosine(prompt, p, problems) + cosine(step, text, steps) for p, text, _ in every]
    order = sorted(range(len(every)), key=lambda i: (-round(near[i], 9), i))
    best = [next(i for i in order if every[i][2] is verdict) for verdict in (True, False)]
    expected = [LabelledStep(*every[i]) for i in sorted(best, key=lambda i: (round(near[i], 9), i))]
    assert StepExamples(ROWS).nearest({"prompt": prompt}, [step]) == [expected]


def test_both_verdicts_the_nearest_last_and_of_equal_ones_the_first() -> None:
    index = StepExamples(ROWS, shots=2)
    (found,) = index.nearest({"prompt": "apples"}, ["take two"])
    assert [each.correct for each in found].count(True) == 2
    assert found[-1] == LabelledStep("green apples", "take two", True)
    assert found == [LabelledStep(*each) for each in (
        ("red apples", "add three", False), ("red apples", "add two", True),
        ("green apples", "take four", False), ("green apples", "take two", True),
    )]  # fmt: skip
    unknown = {"prompt": "nothing in common"}
    assert [each.step for each in index.nearest(unknown, ["zzz"])[0]] == [
        "add two",
        "add three",
        "take two",
        "take four",
    ]
    both = index.nearest({"prompt": "apples"}, ["zzz", "take two"])
    assert both[1] == found, "a step's examples do not hang on the steps beside it"
    assert StepExamples(ROWS[::-1], shots=2).nearest({"prompt": "apples"}, ["take two"])[0][-1] == found[-1]


@pytest.mark.parametrize(
    "own",
    [
        {"prompt": " Red\n apples"},
        {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "red apples"}]},
        {"prompt": "other words", "problem_id": "r", "id": "g"},
        {"prompt": "other words", "id": "r"},
    ],
)
def test_no_step_of_the_problem_itself(own: dict[str, Any]) -> None:
    (found,) = StepExamples(ROWS, shots=9).nearest(own, ["add three"])
    assert {each.problem for each in found} == {"green apples", "blue pears"}
    assert StepExamples(ROWS[:1]).nearest(own, ["add three"]) == [[]]


def test_labels_of_every_kind_and_steps_that_occur_again() -> None:
    """From 0.5 on correct, neutral too; none where there is no label; labelled completions as they are."""
    rows = [
        row("p", ("a\n", 0.5), ("b", 0.4), ("c", None)),
        row("p", ("a", 1.0), ("b", 0.6)),
        row("q", ("a", 0), ("d", -1)),
        {
            "id": "s/0", "problem_id": "s", "prompt": "s", "completion": "e", "token_ids": [1], "logprobs": [-1.0],
            "step_ends": [1], "finish": "stop", "correct": False, "model": "m", "sampling": {}, "seed": 0,
            "steps": ["e"], "step_labels": [False],
        },
    ]  # fmt: skip
    assert [(each.problem, each.step, each.correct) for each in StepExamples(rows).steps] == [
        *(("p", "a", True), ("p", "b", False), ("p", "b", True), ("q", "a", True), ("q", "d", False)),
        ("s", "e", False),
    ]


def test_bad_examples() -> None:
    with pytest.raises(ConfigError, match="shots=0"):
        StepExamples(ROWS, shots=0)
    with pytest.raises(DataError, match="2 labelled steps, none of them incorrect: a judge is shown steps of both"):
        StepExamples([row("p", ("a", True), ("b", True))])
    with pytest.raises(DataError, match="1 labelled steps, none of them correct"):
        StepExamples([row("p", ("a", False))])


def by_hand(policy: Policy, text: str) -> float:
    """P(Y) / (P(Y) + P(N)) behind a text, from the whole vocabulary's softmax."""
    yes, no = (policy.tokenizer.convert_tokens_to_ids(each) for each in "YN")
    with torch.no_grad():
        ids = policy.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        probs = policy.causal_lm(ids).logits[0, -1].softmax(-1)
    return float(probs[yes] / (probs[yes] + probs[no]))


HEAD = "Problem:\napples\n\nSolution:\n"
SHOWN = (
    "Steps of other problems:\n\n"
    "Problem: red apples\nStep: add three\nIs the step right? N\n\nProblem: red apples\nStep: add two\nIs the step "
    "right? Y\n\n"
)


@pytest.mark.parametrize("shared", [True, False])
def test_the_judge_reads_them_behind_the_solution(
    make_policy: Callable[..., Policy], shared: bool, tokens_read: Any
) -> None:
    """The prompt up to its question is what it is without them, so that a solution is still read once."""
    policy = make_policy()
    judge = PromptedJudge(policy, examples=StepExamples(ROWS), shared_prefix=shared, **SHORT)
    plain = PromptedJudge(policy, shared_prefix=shared, **SHORT)
    problem = Solutions({"id": "x", "prompt": "apples"}, [["add two", "add two more"]])
    lines = ["Step 1: add two\n", "Step 2: add two more\n"]
    texts = [f"{HEAD}{''.join(lines[:k])}\n{SHOWN}{k} ok?\nA:" for k in (1, 2)]
    read = tokens_read(policy)
    (scores,) = judge.score([problem])[0]
    longer = read()
    assert scores == pytest.approx([by_hand(policy, text) for text in texts], abs=1e-10)
    read()
    (without,) = plain.score([problem])[0]
    assert longer - read() == 2 * len(SHOWN)
    assert scores != pytest.approx(without, abs=1e-4)
    own = Solutions({"id": "x", "prompt": "apples", "problem_id": "r"}, problem.solutions)
    assert judge.score([own])[0][0] != pytest.approx(scores, abs=1e-4), "other steps than the problem's own"
    only = PromptedJudge(policy, examples=StepExamples(ROWS[:1]), shared_prefix=shared, **SHORT)
    assert only.score([own])[0][0] == pytest.approx(without, abs=1e-10)


def test_a_question_without_room_for_them_is_asked_without(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    problem = Solutions({"id": "x", "prompt": "apples"}, [["add two", "add two more"]])
    room = len(f"{HEAD}Step 1: add two\n\n{SHOWN}1 ok?\nA:")
    judge = PromptedJudge(policy, examples=StepExamples(ROWS), max_length=room, **SHORT)
    (scores,) = judge.score([problem])[0]
    (whole,) = PromptedJudge(policy, examples=StepExamples(ROWS), **SHORT).score([problem])[0]
    (without,) = PromptedJudge(policy, **SHORT).score([problem])[0]
    assert scores == pytest.approx([whole[0], without[1]], abs=1e-10)


@pytest.mark.parametrize("shared", [True, False])
def test_ideas_stand_before_the_solution(make_policy: Callable[..., Policy], shared: bool, tokens_read: Any) -> None:
    """The first five samples of the same problem, told by prompt or id, and read once for all its solutions."""
    policy = make_policy()
    rows = [{"prompt": "apples", "completion": f"idea {k}\n"} for k in range(6)]
    own = {"prompt": [{"role": "user", "content": "apples"}], "completions": ["a", "b"]}
    rows[3:3] = [{"prompt": "pears", "completion": "of another problem", "id": "x", "problem_id": "x"}, own]
    judge = PromptedJudge(policy, ideas=Ideas(rows), shared_prefix=shared, **SHORT)
    problem = Solutions({"problem_id": "x", "prompt": "Apples"}, [["add two", "add"], ["add one"]])
    ideas = "Here are some brainstormed ideas:\n\nidea 0\n\nidea 1\n\nidea 2\n\na\nb\n\nidea 3\n\n"
    head = f"Problem:\nApples\n\n{ideas}Solution:\n"
    texts = ["Step 1: add two\n\n1", "Step 1: add two\nStep 2: add\n\n2", "Step 1: add one\n\n1"]
    read = tokens_read(policy)
    first, second = judge.score([problem])[0]
    assert (read() < 3 * len(head)) is shared
    assert [*first, *second] == pytest.approx([by_hand(policy, f"{head}{text} ok?\nA:") for text in texts], abs=1e-10)
    small = PromptedJudge(policy, ideas=Ideas(rows), shared_prefix=shared, max_length=2 * len(head) - 1, **SHORT)
    fewer = head.replace("idea 3\n\n", "")
    assert small.score([problem])[0][1] == pytest.approx([by_hand(policy, f"{fewer}{texts[2]} ok?\nA:")], abs=1e-10)
    assert judge.provenance()["ideas"]["samples"] == 8
    with pytest.raises(DataError, match="hold no sample of this problem"):
        judge.score([Solutions({"id": "z", "prompt": "plums"}, [["a"]])])
    with pytest.raises(DataError, match="no text of a solution"):
        Ideas([{"prompt": "apples"}])


@pytest.mark.parametrize("shared", [True, False])
def test_p_true_is_yes_against_no_about_the_whole_behind_the_ideas(
    make_policy: Callable[..., Policy], shared: bool
) -> None:
    policy = make_policy()
    how = {name: value for name, value in SHORT.items() if name != "question"}
    ideas = Ideas([{"prompt": "apples", "completion": "idea 0"}])
    judge = PromptedJudge(policy, whole=True, ideas=ideas, shared_prefix=shared, **how)
    first, last = judge.score([Solutions({"prompt": "apples"}, [["add two", "add"]])])[0][0]
    asked = "Is this solution correct? Answer Yes or No."
    text = (
        "Problem:\napples\n\nHere are some brainstormed ideas:\n\nidea 0\n\nSolution:\nStep 1: add two\nStep 2: add\n\n"
    )
    assert math.isnan(first)
    assert last == pytest.approx(by_hand(policy, f"{text}{asked}\nA:"), abs=1e-10)


def test_the_judge_of_whole_solutions_is_an_outcome_scorer(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n")
    judge = load_scorer(Judge("tiny-0.1m", answers=("Y", "N"), whole=True, ideas=str(file)), device="cpu")
    assert isinstance(judge, PromptedJudge)
    assert (judge.meaning, judge.whole) == ("outcome", True)
    first, last = judge.score([Solutions({"prompt": ROWS[0]["prompt"]}, [["a", "b"]])])[0][0]
    assert math.isnan(first)
    assert 0 < last < 1


def test_settings_say_what_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in ROWS))
    config = Judge("tiny-0.1m", answers=("Y", "N"), examples=str(file), shots=2)
    judge = load_scorer(config, device="cpu")
    assert isinstance(judge, PromptedJudge)
    found = judge.provenance()["examples"]
    assert (found["steps"], found["shots"]) == (6, 2)
    other = StepExamples([*ROWS[:2], row("blue pears", ("add two", False), ("cut five", False))])
    assert found["fingerprint"] == StepExamples(ROWS).provenance()["fingerprint"] != other.provenance()["fingerprint"]
    assert "examples" not in load_scorer(Judge("tiny-0.1m", answers=("Y", "N")), device="cpu").provenance()
    with pytest.raises(ConfigError, match="shots=0"):
        Judge("m", examples=str(file), shots=0)
    with pytest.raises(ConfigError, match="kept for evaluation"):
        Judge("m", examples="prm800k:path=x.jsonl,split=test")
    with pytest.raises(ConfigError, match="no file, folder or data source named"):
        Judge("m", examples="nowhere.d")
