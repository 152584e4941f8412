"""The row contracts: every accepted form, and each kind of bad input with its message."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepkd.data.rows import (
    COMPLETION,
    CONTRACTS,
    DEMONSTRATION,
    PREFERENCE,
    PROBLEM,
    STEP_PREFERENCE,
    STEPWISE,
    Contract,
    check_unique_ids,
    detect_contract,
    validate,
)
from stepkd.errors import DataError
from stepkd.steps.labels import label_kind

GOOD: dict[str, dict[str, Any]] = {
    "problem": {"prompt": "1+1?", "answer": "2", "id": "a", "solution": "1+1=2"},
    "demonstration": {"prompt": "1+1?", "solution": "1+1=2"},
    "stepwise": {
        "prompt": "1+1+1?",
        "completions": ["1+1=2\n", "2+1=4\n"],
        "labels": [True, False],
        "outcome": False,
        "answer": "3",
        "step_values": [1, 0.25],
        "pass_rate": 0.5,
    },
    "unpaired": {"prompt": "1+1?", "completion": "2", "label": True},
    "preference": {
        "prompt": "1+1?",
        "chosen": "2",
        "rejected": "3",
        "chosen_ids": [5],
        "rejected_ids": [6, 0],
        "chosen_visits": 30,
        "rejected_visits": 10,
    },
    "step_preference": {"prompt": "1+1?", "chosen": "2", "rejected": "3", "prefix": [], "prefix_ids": []},
    "completion": {
        "problem_id": "a",
        "prompt": "1+1?",
        "completion": "1+1=2",
        "token_ids": [5, 6, 7],
        "logprobs": [-0.5, 0.0, -1],
        "step_ends": [2, 3],
        "finish": "stop",
        "correct": True,
        "model": "tiny",
        "sampling": {"temperature": 1.0},
        "seed": 0,
        "step_labels": [True, None],
        "step_values": [0.5, None],
        "pass_rate": 1,
    },
}


def good(name: str, **changes: Any) -> dict[str, Any]:
    return copy.deepcopy(GOOD[name]) | changes


@pytest.mark.parametrize("name", CONTRACTS)
def test_good_rows_come_back_as_the_same_object(name: str) -> None:
    row = good(name)
    assert validate(row, CONTRACTS[name]) is row
    assert row == GOOD[name]
    assert detect_contract(row) is CONTRACTS[name]


@pytest.mark.parametrize("name", CONTRACTS)
def test_each_required_column_is_missed(name: str) -> None:
    contract = CONTRACTS[name]
    for column in contract.required:
        row = good(name)
        del row[column]
        with pytest.raises(DataError, match=f"f.jsonl, line 7, column '{column}': missing column '{column}'") as caught:
            validate(row, contract, path="f.jsonl", line=7)
        assert f"columns: {{{column}: <that column>}}" in str(caught.value)


@pytest.mark.parametrize("name", CONTRACTS)
def test_no_column_accepts_a_foreign_type(name: str) -> None:
    for column in CONTRACTS[name].names:
        for value in (object(), 3.5, {1}):
            with pytest.raises(DataError, match=f"column '{column}': must be"):
                validate(good(name, **{column: value}), CONTRACTS[name])


@pytest.mark.parametrize("name", CONTRACTS)
def test_optional_columns_may_be_null_required_ones_not(name: str) -> None:
    for column in CONTRACTS[name].names:
        row = good(name, **{column: None})
        if column not in CONTRACTS[name].required or column == "correct":
            validate(row, CONTRACTS[name])
        else:
            with pytest.raises(DataError, match="NoneType None"):
                validate(row, CONTRACTS[name])


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]


def test_prompt_may_be_chat_messages() -> None:
    validate(good("problem", prompt=MESSAGES), PROBLEM)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "must not be empty"),
        (" \n", "must not be empty"),
        ([], "must not be an empty list of messages"),
        (7, "must be text or a list of chat messages, found int 7"),
        (["hi"], "message 1 of 1 must be an object with 'role' and 'content', found str 'hi'"),
        ([{"role": "user"}], "message 1 of 1 must be an object with 'role' and 'content'"),
        ([*MESSAGES, {"role": "usr", "content": "x"}], "message 3 of 3 has role 'usr'; known are system, user"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "message 1 of 1 has a content that is invalid: must be text",
        ),
        ([*MESSAGES, {"role": "assistant", "content": "It is"}], "ends with an assistant message.*answer_prefix"),
        ("half \ud83d pair", "half of a surrogate pair at character 6"),
    ],
)
def test_bad_prompts(prompt: object, message: str) -> None:
    with pytest.raises(DataError, match=f"column 'prompt': {message}"):
        validate(good("problem", prompt=prompt), PROBLEM)


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ([True, False], "bool"),
        ([None, True], "bool"),
        ([1, -1], "rating"),
        ([0, 1], "rating"),
        ([0.25, 1.0], "soft"),
        ([1.0, 0.0], "soft"),
        ([1, 0.5], "soft"),
        ([None, 0.0], "soft"),
    ],
)
def test_label_kinds(labels: list[object], kind: str) -> None:
    row = good("stepwise", labels=labels)
    assert validate(row, STEPWISE)["labels"] is labels
    assert [type(label) for label in labels] == [type(label) for label in copy.copy(row["labels"])]
    assert label_kind(labels) == kind


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (True, "must be a list with one label per step, found bool True"),
        ("++", "must be a list with one label per step, found str"),
        ([None, None], "has zero labelled steps; give at least one label"),
        ([], "has zero labelled steps"),
        ([math.nan, 1.0], "label 1 of 2 is nan: a label is true/false"),
        ([0.5, math.inf], r"label 2 of 2 is inf: a label is true/false, a float in \[0, 1\]"),
        ([0.5, 1.5], r"label 2 of 2 is 1.5: a label is true/false, a float in \[0, 1\]"),
        ([-1.0, 1.0], "label 1 of 2 is -1.0: .* or a whole number -1, 0 or 1"),
        ([2, 1], "label 1 of 2 is 2: .* or a whole number -1, 0 or 1"),
        ([True, 1], "mixes true/false with numbers; use one kind per row, nothing is cast"),
        ([True, 0.0], "mixes true/false with numbers"),
        ([-1, 0.5], "mixes the rating -1 with floats"),
        (["+", "-"], "label 1 of 2 is '\\+': a label is true/false"),
        ([True], "has 1 entries for 2 completions; there must be as many"),
        ([True, False, True], "has 3 entries for 2 completions"),
    ],
)
def test_bad_labels(labels: object, message: str) -> None:
    with pytest.raises(DataError, match=f"x, line 3, column 'labels': {message}"):
        validate(good("stepwise", labels=labels), STEPWISE, path="x", line=3)


scalars = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.floats(), st.text(max_size=2))


@given(st.lists(scalars, max_size=4))
def test_labels_pass_only_in_one_kind(labels: list[object]) -> None:
    """Brute force: the accepted lists are exactly those of one kind with at least one label."""
    given_labels = [label for label in labels if label is not None]

    def all_of(accept: Any) -> bool:
        return bool(given_labels) and all(accept(label) for label in given_labels)

    def is_float(label: object) -> bool:
        return type(label) is float and 0 <= label <= 1

    expected = None
    if all_of(lambda label: type(label) is bool):
        expected = "bool"
    elif all_of(lambda label: type(label) is int and label in (-1, 0, 1)):
        expected = "rating"
    elif all_of(lambda label: is_float(label) or (type(label) is int and label in (0, 1))):
        expected = "soft"
    try:
        found = label_kind(labels)
    except DataError:
        found = None
    assert found == expected


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "has zero steps; drop the row or segment the completion"),
        (["a", ""], "step 2 of 2 must not be empty"),
        (["\n", "b"], "step 1 of 2 must not be empty"),
        (["a", None], "step 2 of 2 must be text, found NoneType None"),
        ("a\nb", "must be a list of step texts, found str"),
    ],
)
def test_bad_steps(steps: object, message: str) -> None:
    with pytest.raises(DataError, match=f"column 'completions': {message}"):
        validate(good("stepwise", completions=steps), STEPWISE)


@pytest.mark.parametrize("value", [1, 0, "true", 1.0])
def test_booleans_are_never_cast(value: object) -> None:
    with pytest.raises(DataError, match=r"column 'outcome': must be true or false.*nothing is cast"):
        validate(good("stepwise", outcome=value), STEPWISE)
    with pytest.raises(DataError, match="column 'correct': must be true or false"):
        validate(good("completion", correct=value), COMPLETION)


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan, True, "0.5"])
@pytest.mark.parametrize("name", ["stepwise", "completion"])
def test_a_pass_rate_is_a_share(name: str, value: object) -> None:
    with pytest.raises(DataError, match=r"column 'pass_rate': must be a number in \[0, 1\], found"):
        validate(good(name, pass_rate=value), CONTRACTS[name])
    assert validate(good(name, pass_rate=None), CONTRACTS[name])["pass_rate"] is None


def test_as_many_values_as_steps() -> None:
    with pytest.raises(DataError, match="column 'step_values': has 1 entries for 2 completions"):
        validate(good("stepwise", step_values=[0.5]), STEPWISE)


@pytest.mark.parametrize("column", ["seed", "token_ids", "logprobs", "step_ends", "step_values"])
def test_numbers_are_never_booleans(column: str) -> None:
    value: object = True if column == "seed" else [True, *GOOD["completion"][column][1:]]
    with pytest.raises(DataError, match=f"column '{column}': .*found bool True"):
        validate(good("completion", **{column: value}), COMPLETION)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_ends": []}, "'step_ends': has zero steps"),
        ({"step_ends": [2]}, "'step_ends': must end at the number of token_ids, 3, found 2"),
        ({"step_ends": [2, 2, 3]}, "'step_ends': must be positive and strictly increasing"),
        ({"step_ends": [0, 3]}, "'step_ends': must be positive"),
        ({"logprobs": [-1.0]}, "'logprobs': has 1 entries for 3 token_ids"),
        (
            {"logprobs": [-1.0, 0.1, -1.0]},
            "'logprobs': item 2 of 3 does not fit a list of log-probabilities.*float 0.1",
        ),
        ({"logprobs": [-math.inf, -1.0, -1.0]}, "'logprobs': item 1 of 3"),
        ({"logprobs": [math.nan, -1.0, -1.0]}, "'logprobs': item 1 of 3"),
        ({"token_ids": [1, -1, 2]}, "'token_ids': item 2 of 3.*found int -1"),
        ({"completion": "half \ud83d pair"}, "'completion': half of a surrogate pair at character 6"),
        ({"step_values": [np.bool_(True), 0.5]}, "'step_values': item 1 of 2.*found bool"),
        ({"logprobs": [-1.0, np.float32(-1.0), -1.0]}, "'logprobs': item 2 of 3.*found float32"),
        ({"finish": "eos"}, "'finish': must be one of stop, length, found str 'eos'"),
        ({"step_labels": [True]}, "'step_labels': has 1 entries for 2 step_ends"),
        ({"step_values": [0.5, 1.5]}, "'step_values': item 2 of 2"),
        ({"seed": 1.0}, "'seed': must be a whole number, found float 1.0"),
    ],
)
def test_bad_completions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        validate(good("completion", **changes), COMPLETION)


def test_pairs() -> None:
    with pytest.raises(DataError, match="'rejected': is the same text as 'chosen'"):
        validate(good("preference", rejected="2"), PREFERENCE)
    validate(good("step_preference", prefix=["1+1", "=2"]), STEP_PREFERENCE)
    with pytest.raises(DataError, match="'prefix': step 1 of 1 must not be empty"):
        validate(good("step_preference", prefix=[""]), STEP_PREFERENCE)


def test_extra_columns_are_kept_unless_they_look_like_slips() -> None:
    row = good("problem", level=3, idx=4, metadata={"a": 1})
    del row["id"]
    assert validate(row, PROBLEM)["metadata"] == {"a": 1}
    slip = {"prompt": "1+1?", "completions": ["2"], "label": [True]}
    with pytest.raises(DataError, match=r"unknown column 'label'; did you mean 'labels'\? Rename it with columns: "):
        validate(slip, STEPWISE)
    with pytest.raises(DataError, match="missing column 'labels'"):
        validate(slip, STEPWISE, extra="keep")
    with pytest.raises(DataError, match=r"unknown column 'ID'; did you mean 'id'\?"):
        validate({"prompt": "1+1?", "answer": "2", "ID": "x"}, PROBLEM)


def test_a_slip_beside_the_right_column_is_no_slip() -> None:
    validate(good("stepwise", completion="1+1=2\n2+1=4\n", label=1), STEPWISE)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "1+1?", "answer": "2"},
            r"nearest is 'problem', which lacks 'prompt'.*columns: {prompt: <column>}",
        ),
        ({"prompt": "x", "completions": []}, "lacks 'labels'"),
        ({}, "the columns no columns"),
    ],
)
def test_detection_says_what_is_lacking(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"f, line 2: no row contract fits .*{message}"):
        detect_contract(row, path="f", line=2)


def test_detection_prefers_the_more_specific_contract() -> None:
    assert detect_contract(good("completion") | {"answer": "2"}) is COMPLETION
    assert detect_contract(good("step_preference") | {"answer": "2"}) is STEP_PREFERENCE
    assert detect_contract(good("problem")) is PROBLEM
    assert detect_contract({"prompt": "", "solution": ""}) is DEMONSTRATION


def test_unique_ids() -> None:
    check_unique_ids([{"id": "a"}, {"id": "b"}])
    with pytest.raises(DataError, match="f, column 'id': rows 1 and 3 share the id 'a'"):
        check_unique_ids([{"id": "a"}, {"id": "b"}, {"id": "a"}], path="f")


def test_contracts_have_distinct_columns() -> None:
    contract: Contract
    for contract in CONTRACTS.values():
        assert len(set(contract.names)) == len(contract.names)
        assert set(contract.required) <= set(contract.names)
