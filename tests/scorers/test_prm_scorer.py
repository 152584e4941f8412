"""Trained reward models as scorers: one by one against shared prompts, positions, cuts, cost, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stepkd.errors import ConfigError, DataError, ModelError
from stepkd.models.policy import Policy
from stepkd.models.spec import Classifier, LabelTokens, tiny_tokenizer
from stepkd.scorers.prm import PRMScorer
from stepkd.scorers.scorer import Solutions, facts_of, score_one
from stepkd.steps.format import StepFormat

MakePolicy = Callable[..., Policy]
HEADS = {
    "label tokens": LabelTokens(),
    "three labels": LabelTokens(labels=("-", "0", "+"), neutral="half"),
    "no marker": Classifier(format=StepFormat(marker=None)),
    "per step": Classifier(layers=1, format=StepFormat(separator="", tokenize="per_step")),
}


def flat(scores: list[list[list[float]]]) -> list[float]:
    return [value for problem in scores for solution in problem for value in solution]


def one_by_one(policy: Policy, problem: Solutions, steps: list[str]) -> list[float]:
    """The scores by the model's own call, one row, no padding, nothing shared: tiny tokens are characters."""
    tokenizer, head = policy.tokenizer, policy.require_step_head()
    marker, fmt = head.ids.marker, head.spec.format
    ids = tokenizer(problem.row["prompt"], add_special_tokens=False)["input_ids"]
    read_at = []
    for step in steps:
        text = step if step[-1].isspace() else step + fmt.separator
        ids += tokenizer(text, add_special_tokens=False)["input_ids"] + ([] if marker is None else [marker])
        read_at.append(len(ids) - 1)
    with torch.no_grad():
        output = policy.causal_lm(torch.tensor([ids]), output_hidden_states=True)
        if head.score is not None:
            probs = head.score(output.hidden_states[-1][0, read_at]).softmax(-1)
        else:
            probs = output.logits[0, read_at][:, list(head.ids.labels)].softmax(-1)
    return (probs[:, -1] + (0.5 * probs[:, 1] if probs.shape[1] == 3 else 0)).tolist()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_equals_one_plain_call_per_solution(
    make_policy: MakePolicy, problems: list[Solutions], name: str, shared: bool
) -> None:
    policy = make_policy(HEADS[name])
    expected = [[one_by_one(policy, p, list(s)) for s in p.solutions] for p in problems]
    assert len({round(value, 6) for value in flat(expected)}) > 25, "scores that tell steps apart"
    for max_rows in (1, 2, 4, 5, 64):
        scores = PRMScorer(policy, template="task", max_rows=max_rows, shared_prefix=shared).score(problems)
        assert [[len(s) for s in p] for p in scores] == [[len(s) for s in p] for p in expected]
        assert flat(scores) == pytest.approx(flat(expected), rel=0, abs=1e-10)


@pytest.mark.parametrize("shared", [True, False])
def test_an_ensemble_keeps_what_each_member_says(
    make_policy: MakePolicy, problems: list[Solutions], shared: bool
) -> None:
    """Beside the mean; in steps that were cut off nobody says anything."""
    policy = make_policy(Classifier(members=3))
    room = max(len(p.row["prompt"]) + sum(len(step) + 2 for step in s) for p in problems for s in p.solutions) - 5
    scored = PRMScorer(policy, template="task", max_rows=4, shared_prefix=shared, max_length=room).score(problems)
    assert any(math.isnan(value) for value in flat(scored)), "a step of the longest is cut off"
    heads = list(policy.require_step_head().score)  # type: ignore[arg-type]
    for m, member in enumerate(heads):
        alone = make_policy(Classifier())
        alone.require_step_head().score.load_state_dict(member.state_dict())  # type: ignore[union-attr]
        expected = PRMScorer(alone, template="task", max_length=room).score(problems)
        own = [[[math.nan if x is None else x for x in facts_of(s)["members"][m]] for s in each] for each in scored]
        assert flat(own) == pytest.approx(flat(expected), abs=1e-10, nan_ok=True)
        assert flat(own) != pytest.approx(flat(scored), abs=1e-3, nan_ok=True)
    for solution in (solution for each in scored for solution in each):
        means = [
            math.nan if None in each else sum(each) / 3 for each in zip(*facts_of(solution)["members"], strict=True)
        ]
        assert solution == pytest.approx(means, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("window", [4, 9, 30])
def test_sliding_window(sharpened: Any, problems: list[Solutions], window: int) -> None:
    """Prompts and rows longer than the window, padded on both sides."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=window, max_position_embeddings=512,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = Policy(sharpened(MistralForCausalLM(config).double()).eval(), tiny_tokenizer())
    policy.attach_step_head(LabelTokens())
    expected = [[one_by_one(policy, p, list(s)) for s in p.solutions] for p in problems]
    for max_rows in (3, 64):
        scores = PRMScorer(policy, template="task", max_rows=max_rows).score(problems)
        assert flat(scores) == pytest.approx(flat(expected), rel=0, abs=1e-10)


def test_a_prompt_is_read_once(make_policy: MakePolicy, problems: list[Solutions], tokens_read: Any) -> None:
    policy = make_policy(LabelTokens())
    read = tokens_read(policy)
    prompts = [len(p.row["prompt"]) for p in problems]
    PRMScorer(policy, template="task", max_rows=4).score(problems)
    shared = read()
    PRMScorer(policy, template="task", max_rows=4, shared_prefix=False).score(problems)
    once = sum(prompts) - len("7x")  # two problems have the same prompt
    for_each = sum(n * len(p.solutions) for n, p in zip(prompts, problems, strict=True))
    assert read() - shared == for_each - once
    assert shared > once


def test_later_steps_and_other_solutions_change_nothing(make_policy: MakePolicy, problems: list[Solutions]) -> None:
    scorer = PRMScorer(make_policy(LabelTokens()), template="task")
    steps = list(problems[1].solutions[3])
    assert len(steps) == 5
    whole = scorer.score(problems)[1][3]
    prompt = problems[1].row["prompt"]
    assert score_one(scorer, prompt, steps) == pytest.approx(whole, abs=1e-10)
    for kept in range(1, 5):  # steps 1, 3 and 5 come without their separator
        assert score_one(scorer, prompt, steps[:kept]) == pytest.approx(whole[:kept], abs=1e-10)
    ended = [step if step.endswith("\n") else step + "\n" for step in steps]
    assert score_one(scorer, prompt, ended) == pytest.approx(whole, abs=1e-10)
    backwards = scorer.score([Solutions(p.row, list(reversed(p.solutions))) for p in reversed(problems)])
    assert flat([list(reversed(p)) for p in reversed(backwards)]) == pytest.approx(flat(scorer.score(problems)))


def test_outcome_scores_only_the_last_step(make_policy: MakePolicy, problems: list[Solutions]) -> None:
    policy = make_policy(LabelTokens(meaning="outcome"))
    scorer = PRMScorer(policy, template="task")
    assert scorer.meaning == "outcome"
    for problem, scores in zip(problems, scorer.score(problems), strict=True):
        for steps, values in zip(problem.solutions, scores, strict=True):
            assert all(math.isnan(value) for value in values[:-1])
            assert values[-1] == pytest.approx(one_by_one(policy, problem, list(steps))[-1], abs=1e-10)


def test_a_head_behind_the_prompt_scores_the_question_alone(make_policy: MakePolicy) -> None:
    """P(IK): the same for every solution of a problem, and for a row without one."""
    head = Classifier(format=StepFormat(marker="~", marker_place="prompt_end"), meaning="outcome")
    policy = make_policy(head)
    scorer = PRMScorer(policy, template="task")
    with torch.no_grad():
        ids = torch.tensor([policy.tokenizer("7x?~")["input_ids"]])
        expected = float(policy.step_scores(policy.hidden(ids, torch.ones_like(ids))[0, -1:]))
    first, second = scorer.score([Solutions({"id": "a", "prompt": "7x?"}, [["a", "b"], ["c"]])])[0]
    assert math.isnan(first[0])
    assert [first[1], *second] == pytest.approx([expected, expected], abs=1e-12)
    assert scorer.score_rows([{"id": "a", "prompt": "7x?"}])[0] == pytest.approx([expected], abs=1e-12)


def test_steps_beyond_the_context_are_not_scored(make_policy: MakePolicy) -> None:
    policy = make_policy(LabelTokens())
    steps = ["aaaa", "bbbb", "cccc"]  # 6 tokens each: separator and marker are two of them
    whole = score_one(PRMScorer(policy, template="task"), "1234", steps)
    for room, scored in ((22, 3), (21, 2), (16, 2), (15, 1), (10, 1), (9, 0), (4, 0), (3, 0)):
        for shared in (True, False):
            scorer = PRMScorer(policy, template="task", max_length=room, shared_prefix=shared)
            pair = scorer.score([Solutions({"id": "x", "prompt": "1234"}, [steps, steps])])[0]
            for values in pair:
                assert [math.isnan(value) for value in values] == [i >= scored for i in range(3)], room
                assert values[:scored] == pytest.approx(whole[:scored], abs=1e-10)
    outcome = PRMScorer(make_policy(LabelTokens(meaning="outcome")), template="task", max_length=21)
    assert all(math.isnan(value) for value in score_one(outcome, "1234", steps))
    long = ["x" * 300 + "\n"] * 5
    values = score_one(PRMScorer(policy, template="task"), "1234", long)
    assert [math.isnan(value) for value in values] == [False] * 3 + [True] * 2, "1,024 tokens of context"


def test_rows_with_sampled_ids_are_read_as_they_are(make_policy: MakePolicy, tokens_read: Any) -> None:
    policy = make_policy(LabelTokens())
    read = tokens_read(policy)
    tokenizer = policy.tokenizer
    text = "1+1=2\n#### 2"
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    other = list(tokenizer("1+1=2\n", add_special_tokens=False)["input_ids"]) + [
        i for c in "#### 2" for i in tokenizer(c, add_special_tokens=False)["input_ids"]
    ]
    assert tokenizer.decode(other) == tokenizer.decode(own) == text
    assert own != other, "#### is one token, or four"
    row = {"id": "r", "prompt": "1+1=", "completion": text}
    rows = [
        row | {"token_ids": [*own, tokenizer.eos_token_id], "step_ends": [6, len(own) + 1]},
        row | {"token_ids": other, "step_ends": [6, len(other)]},
        row | {"completions": ["1+1=2", "#### 2"]},
        row,
    ]
    scorer = PRMScorer(policy, template="task")
    first, second, texts, cut = scorer.score_rows(rows)
    shared = read()
    PRMScorer(policy, template="task", shared_prefix=False).score_rows(rows)
    assert read() - shared == 3 * len("1+1="), "one prompt, four rows"
    assert first == pytest.approx(texts, abs=1e-10)
    assert first == pytest.approx(cut, abs=1e-10)
    assert second[0] == pytest.approx(first[0], abs=1e-10)
    assert abs(second[1] - first[1]) > 1e-6


def test_rows_that_cannot_be_read_have_nan_for_every_step(make_policy: MakePolicy) -> None:
    """They hold the marker, or only an end token; the rows beside them are scored as if they were not there."""
    scorer = PRMScorer(make_policy(LabelTokens()), template="task")
    tokenizer = scorer.tokenizer
    ids = tokenizer("1~\n2", add_special_tokens=False)["input_ids"]
    good = {"id": "g", "prompt": "1+", "completions": ["1", "2"]}
    marked = [
        {"completions": ["1~", "2", "3"]},
        {"completion": "1~\n2\n3"},
        {"token_ids": [*ids, tokenizer.eos_token_id], "step_ends": [3, 5], "completion": "1~\n2"},
        {"token_ids": [tokenizer.eos_token_id], "step_ends": [1], "completion": ""},
    ]
    found = scorer.score_rows([good, *({"id": "m", "prompt": "1+"} | columns for columns in marked), good])
    assert [len(values) for values in found] == [2, 3, 3, 2, 1, 2]
    assert all(math.isnan(value) for values in found[1:-1] for value in values)
    assert found[0] == found[-1] == pytest.approx(scorer.score_rows([good])[0], abs=1e-10)


def test_temperature_scales_and_nothing_else(make_policy: MakePolicy, problems: list[Solutions]) -> None:
    policy = make_policy(LabelTokens())
    plain = flat(PRMScorer(policy, template="task").score(problems))
    scaled = flat(PRMScorer(policy, template="task", temperature=0.5).score(problems))
    assert scaled == pytest.approx([p**2 / (p**2 + (1 - p) ** 2) for p in plain], abs=1e-9)


def test_scores_stay_within_bounds_and_the_mode_is_put_back(make_policy: MakePolicy) -> None:
    policy = make_policy(LabelTokens(labels=("-", "0", "+")), dtype="float32")
    with torch.no_grad():
        for parameter in policy.causal_lm.parameters():
            parameter.mul_(4)
    policy.train()
    values = [v for n in range(40) for v in score_one(PRMScorer(policy, template="task"), f"{n}", ["a", "b", "c"])]
    assert all(0 <= value <= 1 for value in values)
    assert max(values) > 0.999
    assert policy.training


def test_provenance(make_policy: MakePolicy) -> None:
    policy = make_policy(LabelTokens(meaning="value"))
    scorer = PRMScorer(policy, template="task", max_length=64, name="runs/prm")
    found = scorer.provenance()
    assert found["scorer"] == "prm"
    assert found["model"] == "runs/prm"
    assert (found["dtype"], found["max_length"], found["meaning"], found["temperature"]) == (
        "float64",
        64,
        "value",
        None,
    )
    assert found["head"]["labels"] == ("-", "+")
    assert PRMScorer(policy, template="gsm8k").provenance()["prompt"] != found["prompt"]
    with torch.no_grad():
        next(policy.causal_lm.parameters())[0, 0] += 1
    assert scorer.provenance()["weights"] != found["weights"]


def test_nan_scores_name_the_problem(make_policy: MakePolicy, problems: list[Solutions]) -> None:
    for shared in (True, False):
        policy = make_policy(LabelTokens())
        ducks = policy.tokenizer("w", add_special_tokens=False)["input_ids"][0]  # only 'how many ducks' has a w
        with torch.no_grad():
            policy.causal_lm.get_input_embeddings().weight[ducks] = float("nan")
        with pytest.raises(ModelError, match="scores of problem 'p3' are not numbers"):
            PRMScorer(policy, template="task", shared_prefix=shared).score([problems[2], problems[3]])


def test_bad_input(make_policy: MakePolicy) -> None:
    policy = make_policy(LabelTokens())
    scorer = PRMScorer(policy, template="task")
    assert scorer.score([]) == []
    assert scorer.score([Solutions({"id": "x", "prompt": "1"}, [])]) == [[]]
    with pytest.raises(DataError, match="x, column 'prompt'"):
        scorer.score([Solutions({"id": "x"}, [["a"]])])
    with pytest.raises(DataError, match="x, column 'completions': no steps"):
        scorer.score([Solutions({"id": "x", "prompt": "1"}, [[]])])
    with pytest.raises(DataError, match="step 1 of 2, from 0, has no text"):
        score_one(scorer, "1", ["a", " \n"])
    unread = scorer.score([Solutions({"id": "x", "prompt": "1"}, [["a ~ b", "c"], ["a", "c"]])])[0]
    assert [math.isnan(score) for score in unread[0]] == [True, True]
    assert unread[1] == pytest.approx(score_one(scorer, "1", ["a", "c"]))
    with pytest.raises(ConfigError, match="max_rows=0"):
        PRMScorer(policy, template="task", max_rows=0)
    with pytest.raises(ConfigError, match="max_length=1"):
        PRMScorer(policy, template="task", max_length=1)
    with pytest.raises(ConfigError, match="no prompt template named 'tusk'"):
        PRMScorer(policy, template="tusk")
    with pytest.raises(ModelError, match="this model scores no steps"):
        PRMScorer(make_policy(None), template="task")
