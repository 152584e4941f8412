"""The prompted judge: probabilities by hand, shared reading against plain, answers as tokens, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, DataError, ModelError
from stepkd.models.policy import Policy
from stepkd.models.spec import tiny_tokenizer
from stepkd.sampling.branches import gap_limit
from stepkd.sampling.decode import Decoder
from stepkd.scorers.judge import JUDGE_TEMPLATE, PromptedJudge, answer_ids
from stepkd.scorers.scorer import Solutions, score_one

MakePolicy = Callable[..., Policy]
Y = {"answers": [("Y", "N"), ("y", "n")]}
SHORT = {"question": "{step} ok?", "template": PromptTemplate(style="plain", plain="{prompt}\nA:"), **Y}


@pytest.fixture(scope="module")
def policy(make_policy: MakePolicy) -> Policy:
    return make_policy()


def flat(scores: list[list[list[float]]]) -> list[float]:
    return [value for problem in scores for solution in problem for value in solution]


def by_hand(policy: Policy, text: str) -> float:
    """P(yes) / (P(yes) + P(no)) behind a text, from the whole vocabulary's softmax."""
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        probs = policy.causal_lm(torch.tensor([ids])).logits[0, -1].softmax(-1)
    p = {c: float(probs[policy.tokenizer(c, add_special_tokens=False)["input_ids"][0]]) for c in "YyNn"}
    return (p["Y"] + p["y"]) / sum(p.values())


@pytest.mark.parametrize("shared", [True, False])
def test_every_step_by_hand(policy: Policy, problems: list[Solutions], shared: bool) -> None:
    judge = PromptedJudge(policy, shared_prefix=shared, **SHORT)
    assert judge.meaning == "correctness"
    values = []
    for problem in problems[:2]:
        for steps in problem.solutions:
            for k in range(1, len(steps) + 1):
                lines = "".join(f"Step {i}: {step.strip()}\n" for i, step in enumerate(steps[:k], start=1))
                values.append(by_hand(policy, f"Problem:\n{problem.row['prompt']}\n\nSolution:\n{lines}\n{k} ok?\nA:"))
    assert flat(judge.score(problems[:2])) == pytest.approx(values, rel=0, abs=1e-10)
    assert len({round(value, 6) for value in values}) > 20


@pytest.mark.parametrize("max_rows", [1, 2, 5, 64])
def test_shared_reading_changes_nothing(policy: Policy, problems: list[Solutions], max_rows: int) -> None:
    expected = flat(PromptedJudge(policy, max_rows=64, shared_prefix=False, **SHORT).score(problems))
    for shared in (True, False):
        scores = PromptedJudge(policy, max_rows=max_rows, shared_prefix=shared, **SHORT).score(problems)
        assert flat(scores) == pytest.approx(expected, rel=0, abs=1e-10)
        assert [[len(s) for s in p] for p in scores] == [[len(s) for s in p.solutions] for p in problems]


@pytest.mark.parametrize("window", [6, 400])
def test_sliding_window_too_short_for_gaps_is_read_plainly(
    sharpened: Any, problems: list[Solutions], window: int, tokens_read: Any
) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=window, max_position_embeddings=512,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = Policy(sharpened(MistralForCausalLM(config).double()).eval(), tiny_tokenizer())
    read = tokens_read(policy)
    expected = flat(PromptedJudge(policy, shared_prefix=False, **SHORT).score(problems))
    plainly = read()
    gap_limit(Decoder(policy, max_rows=4))
    plainly += read()  # the judge asks that, too
    assert flat(PromptedJudge(policy, **SHORT).score(problems)) == pytest.approx(expected, rel=0, abs=1e-10)
    assert (read() == plainly) == (window == 6)


def test_problem_and_solution_are_read_once(policy: Policy, problems: list[Solutions], tokens_read: Any) -> None:
    read = tokens_read(policy)
    PromptedJudge(policy, **SHORT).score(problems)
    shared = read()
    gap_limit(Decoder(policy, max_rows=4))
    shared -= read()
    PromptedJudge(policy, shared_prefix=False, **SHORT).score(problems)
    apart = read()
    heads = [len(f"Problem:\n{p.row['prompt']}\n\nSolution:\n") for p in problems]
    lengths = [
        [len(f"Step {i}: {step.strip()}\n") for i, step in enumerate(steps, start=1)]
        for p in problems
        for steps in p.solutions
    ]
    questions = sum(map(len, lengths)) * len("\n1 ok?\nA:")
    assert shared == sum(heads) + sum(map(sum, lengths)) + questions
    again = sum(h * len(s) for h, p in zip(heads, problems, strict=True) for s in p.solutions)
    assert apart == again + sum(sum(steps[: k + 1]) for steps in lengths for k in range(len(steps))) + questions


def test_chat_models_are_asked_as_users(policy: Policy) -> None:
    judge = PromptedJudge(policy, **Y)
    text = (
        "user: Problem:\n1+1=\n\nSolution:\nStep 1: 2\n\nIs step 1 right, given the problem and the steps before it? "
        "Answer Yes or No.\nassistant: "
    )
    assert score_one(judge, "1+1=", ["2"]) == [pytest.approx(by_hand(policy, text), abs=1e-10)]
    messages = Solutions({"id": "x", "prompt": [{"role": "user", "content": "1+1="}]}, [["2"]])
    assert judge.score([messages])[0][0] == [pytest.approx(by_hand(policy, text), abs=1e-10)]
    plain = tiny_tokenizer()
    plain.chat_template = None
    other = Policy(policy.model, plain)
    text = text.removeprefix("user: ").replace("\nassistant: ", "\nAnswer:")
    assert score_one(PromptedJudge(other, **Y), "1+1=", ["2"]) == [pytest.approx(by_hand(other, text), abs=1e-10)]


def test_a_step_that_names_its_number_is_not_numbered_again(policy: Policy) -> None:
    judge = PromptedJudge(policy, **SHORT)
    assert score_one(judge, "p", ["step 1 is a", "b"]) != pytest.approx(score_one(judge, "p", ["is a", "b"]))
    expected = by_hand(policy, "Problem:\np\n\nSolution:\nstep 1 is a\nStep 2: b\n\n2 ok?\nA:")
    assert score_one(judge, "p", ["step 1 is a", "b"])[1] == pytest.approx(expected, abs=1e-10)
    expected = by_hand(policy, "Problem:\np\n\nSolution:\nStep 1: step 12 is a\n\n1 ok?\nA:")
    assert score_one(judge, "p", ["step 12 is a"]) == [pytest.approx(expected, abs=1e-10)]


def test_a_reference_is_shown_when_asked_for(policy: Policy) -> None:
    judge = PromptedJudge(policy, reference=True, **SHORT)
    row = {"id": "x", "prompt": "1+1=", "answer": "2", "solution": "one and one\nis two\n"}
    for shown, given in (
        ("Reference solution:\none and one\nis two", row),
        ("Reference answer:\n2", row | {"solution": None}),
    ):
        expected = by_hand(policy, f"Problem:\n1+1=\n\n{shown}\n\nSolution:\nStep 1: 3\n\n1 ok?\nA:")
        assert judge.score([Solutions(given, [["3"]])]) == [[[pytest.approx(expected, abs=1e-10)]]]
    with pytest.raises(DataError, match="x: the judge was asked to show a reference, and the row has neither"):
        judge.score([Solutions({"id": "x", "prompt": "1+1="}, [["3"]])])


@pytest.mark.parametrize("shared", [True, False])
def test_one_question_about_the_whole(policy: Policy, problems: list[Solutions], shared: bool) -> None:
    """P(yes) among all tokens behind the last step; a question needs no number, and steps before have no score."""
    how = SHORT | {"question": "on the way?"}
    judge = PromptedJudge(policy, whole=True, shared_prefix=shared, **how)
    scores = judge.score(problems[:2])
    for problem, of_problem in zip(problems[:2], scores, strict=True):
        for steps, values in zip(problem.solutions, of_problem, strict=True):
            lines = "".join(f"Step {i}: {step.strip()}\n" for i, step in enumerate(steps, start=1))
            text = f"Problem:\n{problem.row['prompt']}\n\nSolution:\n{lines}\non the way?\nA:"
            ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                probs = policy.causal_lm(torch.tensor([ids])).logits[0, -1].softmax(-1)
            expected = sum(float(probs[policy.tokenizer(c, add_special_tokens=False)["input_ids"][0]]) for c in "Yy")
            assert values[-1] == pytest.approx(expected, abs=1e-10)
            assert all(math.isnan(value) for value in values[:-1])
    assert judge.provenance()["whole"] is True
    short = PromptedJudge(policy, whole=True, shared_prefix=shared, max_length=60, **how)
    assert all(math.isnan(value) for value in score_one(short, "p", ["abc"] * 9)), "not of a part of it"


def test_a_question_about_the_whole_leaves_room_for_its_answer(make_policy: MakePolicy) -> None:
    policy = make_policy()
    how, head = SHORT | {"question": "on the way?"}, len("Problem:\np\n\nSolution:\n")
    text = head + len("Step 1: abc\n") + len("\non the way?\nA:")
    for context, is_read in ((text + 1, True), (text, False)):
        policy.causal_lm.config.max_position_embeddings = context
        values = score_one(PromptedJudge(policy, whole=True, shared_prefix=False, **how), "p", ["abc"])
        assert math.isnan(values[0]) is not is_read


def test_steps_beyond_the_context_are_not_scored(policy: Policy) -> None:
    head, step, asked = len("Problem:\np\n\nSolution:\n"), len("Step 1: abc\n"), len("\n1 ok?\nA:")
    whole = score_one(PromptedJudge(policy, **SHORT), "p", ["abc"] * 3)
    for shared in (True, False):
        for room, scored in ((head + 3 * step + asked, 3), (head + 3 * step + asked - 1, 2), (head + asked, 0)):
            judge = PromptedJudge(policy, max_length=room, shared_prefix=shared, **SHORT)
            values = score_one(judge, "p", ["abc"] * 3)
            assert [math.isnan(value) for value in values] == [i >= scored for i in range(3)]
            assert values[:scored] == pytest.approx(whole[:scored], abs=1e-10)


def test_temperature_and_provenance(policy: Policy) -> None:
    p = score_one(PromptedJudge(policy, **SHORT), "p", ["a"])[0]
    scaled = score_one(PromptedJudge(policy, temperature=0.5, **SHORT), "p", ["a"])[0]
    assert scaled == pytest.approx(p**2 / (p**2 + (1 - p) ** 2), abs=1e-9)
    found = PromptedJudge(policy, reference=True, temperature=0.5, name="m", **SHORT).provenance()
    assert (found["scorer"], found["model"], found["reference"], found["temperature"]) == ("judge", "m", True, 0.5)
    assert found["question"] == "{step} ok?"
    ids = policy.tokenizer.convert_tokens_to_ids
    assert found["answer_ids"] == {"yes": [ids("Y"), ids("y")], "no": [ids("N"), ids("n")]}


def words(*vocabulary: str) -> Any:
    """A tokenizer of whole words; unknown text is cut into characters it does not know."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_tokens([AddedToken(word, normalized=False) for word in vocabulary])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")


def test_answers_are_pairs_of_single_tokens() -> None:
    tokenizer = words(" Yes", " No", "yes", "no", "Yes")
    ids = tokenizer.convert_tokens_to_ids
    yes, no = answer_ids(tokenizer)
    assert yes == (ids(" Yes"), ids("yes"))  # 'Yes' has no 'No' beside it
    assert no == (ids(" No"), ids("no"))
    assert answer_ids(tokenizer, [("Yes", "no")]) == ((ids("Yes"),), (ids("no"),))
    with pytest.raises(ConfigError, match=r"an answer of the judge must be one token: .*'No'"):
        answer_ids(tokenizer, [("Yes", "No")])
    with pytest.raises(ConfigError, match="yes and no share a token"):
        answer_ids(tokenizer, [("Yes", "no"), ("no", "yes")])
    with pytest.raises(ConfigError, match=r"none of .* as single tokens"):
        answer_ids(words("maybe"))


def test_bad_input(policy: Policy) -> None:
    with pytest.raises(ConfigError, match=r"none of .* as single tokens"):
        PromptedJudge(policy)  # characters only
    with pytest.raises(ConfigError, match=r"must hold \{step\} once"):
        PromptedJudge(policy, question="Correct?", **Y)
    with pytest.raises(ConfigError, match="max_rows=0"):
        PromptedJudge(policy, max_rows=0, **Y)
    judge = PromptedJudge(policy, **Y)
    assert judge.template is JUDGE_TEMPLATE
    with pytest.raises(DataError, match="x, column 'completions': step 1 of 2, from 0, has no text"):
        judge.score([Solutions({"id": "x", "prompt": "1"}, [["a", " "]])])
    with pytest.raises(DataError, match="no steps: drop the row"):
        judge.score([Solutions({"id": "x", "prompt": "1"}, [[]])])
    with pytest.raises(DataError, match="x, column 'prompt': the row has no problem"):
        judge.score([Solutions({"id": "x"}, [["a"]])])
    assert judge.score([Solutions({"id": "x", "prompt": "1"}, [])]) == [[]]


@pytest.mark.parametrize("shared", [True, False])
def test_nan_names_the_problem(make_policy: MakePolicy, shared: bool) -> None:
    policy = make_policy()
    with torch.no_grad():
        policy.causal_lm.get_input_embeddings().weight[policy.tokenizer.convert_tokens_to_ids("@")] = float("nan")
    judge = PromptedJudge(policy, shared_prefix=shared, **SHORT)
    with pytest.raises(ModelError, match="scores of problem 'bad' are not numbers"):
        judge.score(
            [Solutions({"id": "good", "prompt": "1"}, [["a"]]), Solutions({"id": "bad", "prompt": "@"}, [["a"]])]
        )
