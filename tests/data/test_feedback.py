"""Feedback rows to examples: outcomes, step labels, the cut at the first error, and what is refused or counted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.data.completion import Completion
from stepkd.data.encode import LabelRule
from stepkd.data.feedback import FeedbackEncoder
from stepkd.data.rows import COMPLETION, STEPWISE, UNPAIRED, validate
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, DataError
from stepkd.models.spec import tiny_tokenizer
from stepkd.steps.segment import get_segmenter, spans_from_ends, step_ends

PLAIN = PromptTemplate(style="plain", plain="{prompt}")
TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
STEPS = ["1+2=3\n", "3*3=8\n", "8-1=7\n", "#### 7"]


def make(max_length: int = 64, **rule: Any) -> FeedbackEncoder:
    labels = LabelRule(**{"after_error": "keep", **rule})
    return FeedbackEncoder(TOKENIZER, PLAIN, get_segmenter("newline"), max_length=max_length, labels=labels)


def completion(labels: list[Any] | None = None, *, steps: list[str] = STEPS, **columns: Any) -> dict[str, Any]:
    """A sampled solution with its end token."""
    pieces = [TOKENIZER(step, add_special_tokens=False)["input_ids"] for step in steps]
    pieces[-1].append(EOS)
    ends = [sum(len(piece) for piece in pieces[: i + 1]) for i in range(len(pieces))]
    ids = [i for piece in pieces for i in piece]
    row: dict[str, Any] = {
        "id": "r", "problem_id": "p", "prompt": "Q:", "completion": "".join(steps), "token_ids": ids,
        "logprobs": [-0.1] * len(ids), "step_ends": ends, "finish": "stop", "correct": False, "model": "m",
        "sampling": {}, "seed": 0,
    }  # fmt: skip
    row |= {} if labels is None else {"step_labels": labels}
    return validate(row | columns, COMPLETION)


def stepwise(labels: list[Any], steps: list[str] | None = None, **columns: Any) -> dict[str, Any]:
    row = {"id": "s", "prompt": "Q:", "completions": steps or STEPS[: len(labels)], "labels": labels}
    return validate(row | columns, STEPWISE)


def encode(encoder: FeedbackEncoder, row: dict[str, Any]) -> Completion:
    example = encoder.example(row)
    assert isinstance(example, Completion)
    assert spans_from_ends(step_ends(example.spans), len(example.token_ids)) == list(example.spans)
    assert len(example.step_labels) == len(example.spans)
    assert set(example.step_labels) <= {1, 0, -1}
    assert example.row is row
    return example


def text(example: Completion, ids: Any = None) -> str:
    return str(TOKENIZER.decode(list(example.token_ids if ids is None else ids)))


def parts(example: Completion) -> list[str]:
    return [text(example, example.token_ids[low:high]) for low, high in example.spans]


# ---- completions
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("correct", "outcome"), [(True, 1), (False, 0), (None, -1)])
def test_completions(correct: bool | None, outcome: int) -> None:
    row = completion([True, False, None, True], correct=correct)
    encoder = make()
    example = encode(encoder, row)
    assert (example.outcome, example.step_labels) == (outcome, (1, 0, -1, 1))
    assert list(example.token_ids) == row["token_ids"], "sampled ids as they are, the end token among them"
    assert parts(example) == [*STEPS[:3], "#### 7<eos>"]
    assert encoder.counts["rows_without_outcome"] == (correct is None)


def test_an_outcome_alone_is_feedback() -> None:
    example = encode(make(), completion(correct=True))
    assert (example.outcome, example.step_labels) == (1, (-1,) * 4)
    example = encode(make(), completion(correct=True, step_labels=None, step_values=None))
    assert example.step_labels == (-1,) * 4


def test_values_stand_in_for_labels() -> None:
    row = completion(step_values=[1.0, 0.25, 0.0, None])
    with pytest.raises(DataError, match=r"^r, column 'step_labels': a step label of 0.25 is neither correct nor"):
        make().example(row)
    assert encode(make(harden=0.25), row).step_labels == (1, 1, 0, -1)
    assert encode(make(harden=0.5), row).step_labels == (1, 0, 0, -1)
    both = completion([True] * 4, step_values=[0.0, 0.0, 0.0, 0.0])
    assert encode(make(), both).step_labels == (1,) * 4
    assert encode(make(kind="soft"), both).step_labels == (0,) * 4, "values when they are asked for"


def test_chances_of_nought_and_one_are_hard_already() -> None:
    assert encode(make(), completion(step_values=[1.0, 1.0, 0.0, 0.0])).step_labels == (1, 1, 0, 0)


@pytest.mark.parametrize(
    ("neutral", "expected"), [("correct", (1, 1, 0, 1)), ("incorrect", (1, 0, 0, 1)), ("mask", (1, -1, 0, 1))]
)
def test_neutral_ratings(neutral: str, expected: tuple[int, ...]) -> None:
    assert encode(make(neutral=neutral), completion([1, 0, -1, 1])).step_labels == expected


# ---- after the first error ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after_error", "labels", "steps"),
    [("keep", (1, 0, 1, 0), 4), ("mask", (1, 0, -1, -1), 4), ("truncate", (1, 0), 2)],
)
def test_after_the_first_error(after_error: str, labels: tuple[int, ...], steps: int) -> None:
    encoder = make(after_error=after_error)
    example = encode(encoder, completion([True, False, True, False]))
    assert example.step_labels == labels
    assert parts(example) == [*STEPS[:3], "#### 7<eos>"][:steps]
    assert example.outcome == 0
    assert encoder.counts["rows_cut_at_first_error"] == (steps < 4)


@pytest.mark.parametrize("labels", [[True] * 4, [None, True, None, True], [True, True, True, False]])
def test_nothing_to_cut(labels: list[Any]) -> None:
    """No error, or one in the last step: the end token stays."""
    encoder = make(after_error="truncate")
    example = encode(encoder, completion(labels))
    assert len(example.spans) == 4
    assert example.token_ids[-1] == EOS
    assert encoder.counts["rows_cut_at_first_error"] == 0


@pytest.mark.parametrize(
    ("labels", "rule", "kept"),
    [
        ([1, 0, 1, 1], {"neutral": "incorrect"}, (1, 0)),
        ([1, 0, -1, 1], {"neutral": "correct"}, (1, 1, 0)),
        ([1, 0, -1, 1], {"neutral": "mask"}, (1, -1, 0)),
        ([0.9, 0.5, 0.1, 0.8], {"harden": 0.5}, (1, 1, 0)),
        ([0.9, 0.5, 0.0, 0.8], {"harden": 0.6}, (1, 0)),
    ],
)
def test_what_counts_as_the_first_error(labels: list[Any], rule: dict[str, Any], kept: tuple[int, ...]) -> None:
    assert encode(make(after_error="truncate", **rule), completion(labels)).step_labels == kept


# ---- truncation to the context --------------------------------------------------------------------------------------


def test_labels_are_kept_behind_an_error_whatever_else_the_rule_sets() -> None:
    row = stepwise([True, False, True, True], outcome=False)
    kept = encode(make(after_error=None, neutral="mask"), row).step_labels
    assert kept == encode(make(after_error="keep"), row).step_labels


@pytest.mark.parametrize("after_error", ["keep", "mask", "truncate"])
@pytest.mark.parametrize("labels", [[True, True, False, True], [True, False, True, True], [True, None, True, True]])
def test_labels_go_with_the_steps_that_do_not_fit(labels: list[Any], after_error: str) -> None:
    """Step labels are longer than what is left; the leading ones stay with their steps."""
    full = encode(make(after_error="keep"), completion(labels))
    for length in range(3, full.length + 1):
        encoder = make(length, after_error=after_error)
        example = encoder.example(completion(labels))
        fitting = sum(2 + high <= length for _, high in full.spans)
        if not fitting:
            assert example is None
            assert encoder.counts["rows_without_a_whole_step"] == 1
            continue
        assert example is not None
        incorrect = next((i for i, label in enumerate(labels) if label is False), None)
        cut = fitting if after_error != "truncate" or incorrect is None else min(fitting, incorrect + 1)
        seen = {True: 1, False: 0, None: -1}
        hidden = after_error == "mask" and incorrect is not None
        expected = [-1 if hidden and incorrect is not None and i > incorrect else seen[labels[i]] for i in range(cut)]
        assert list(example.step_labels) == expected
        assert example.token_ids.tolist() == full.token_ids[: full.spans[cut - 1][1]].tolist()
        assert encoder.counts["steps_dropped"] == 4 - fitting
        assert encoder.counts["rows_truncated"] == (fitting < 4)


def test_labels_that_never_fitted_are_an_error_all_the_same() -> None:
    """Truncation must not hide rows whose labels belong to other steps."""
    row = completion() | {"step_labels": [True, True]}
    for length in (64, 12):
        with pytest.raises(DataError, match=r"^r, column 'step_labels': 2 labels for 4 steps"):
            make(length).example(row)


def test_counts_of_earlier_rows_do_not_shift_labels() -> None:
    encoder = make(16)
    labels = [True, None, False, True]
    first, second = (encode(encoder, completion(labels)) for _ in range(2))
    assert (first.key, first.spans, first.targets) == (second.key, second.spans, second.targets)
    assert first.step_labels == (1, -1)
    assert encoder.counts["steps_dropped"] == 4


# ---- stepwise rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [True, False, None])
def test_stepwise_rows(outcome: bool | None) -> None:
    """A finished solution ends in the end token; one that may be unfinished does not."""
    columns: dict[str, Any] = {} if outcome is None else {"outcome": outcome}
    encoder = make()
    example = encode(encoder, stepwise([True, False, True, None], **columns))
    assert example.step_labels == (1, 0, 1, -1)
    assert example.outcome == {True: 1, False: 0, None: -1}[outcome]
    assert parts(example) == [*STEPS[:3], "#### 7" if outcome is None else "#### 7<eos>"]
    assert encoder.counts["rows_without_outcome"] == (outcome is None)


def test_steps_without_separators_get_line_ends() -> None:
    example = encode(make(), stepwise([True, True, False], ["a", "b ", "c"], outcome=False))
    assert parts(example) == ["a\n", "b \n", "c<eos>"], "a blank separates nothing: it is part of the next word's token"
    assert example.step_labels == (1, 1, 0)


def test_a_step_may_hold_line_ends() -> None:
    """The row says what a step is, not the segmenter."""
    example = encode(make(), stepwise([True, False], ["a\nb\n", "c\nd"], outcome=True))
    assert parts(example) == ["a\nb\n", "c\nd<eos>"]


@pytest.mark.parametrize("after_error", ["keep", "truncate"])
def test_stepwise_rows_that_do_not_fit(after_error: str) -> None:
    encoder = make(15, after_error=after_error)
    example = encode(encoder, stepwise([True, True, False, True], outcome=True))
    assert (parts(example), example.step_labels) == (STEPS[:2], (1, 1))
    assert encoder.counts == {"steps_dropped": 2, "rows_truncated": 1, "rows_without_outcome": 0}
    encoder = make(7)
    assert encoder.example(stepwise([True], outcome=True)) is None
    assert encoder.counts["rows_without_a_whole_step"] == 1


def test_truncation_at_the_error_takes_the_end_token_along() -> None:
    example = encode(make(after_error="truncate"), stepwise([True, False, True, True], outcome=False))
    assert parts(example) == STEPS[:2]


@given(st.lists(st.sampled_from([True, False, None]), min_size=1, max_size=6).filter(any), st.integers(3, 60))
@settings(max_examples=60, deadline=None)
def test_stepwise_rows_and_completions_agree(labels: list[Any], length: int) -> None:
    """The same solution as step texts and as sampled ids."""
    steps = [f"{i}={'x' * i}\n" for i in range(len(labels) - 1)] + ["end"]
    for after_error in ("keep", "mask", "truncate"):
        encoders = make(length, after_error=after_error), make(length, after_error=after_error)
        one = encoders[0].example(stepwise(labels, steps, outcome=True))
        two = encoders[1].example(completion(labels, steps=steps, correct=True))
        assert encoders[0].counts == encoders[1].counts
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            assert (one.key, one.spans, one.step_labels) == (two.key, two.spans, two.step_labels)


# ---- unpaired rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [True, False])
def test_unpaired_rows(label: bool) -> None:
    row = validate({"id": "u", "prompt": "Q:", "completion": "".join(STEPS), "label": label}, UNPAIRED)
    example = encode(make(after_error="truncate"), row)
    assert (example.outcome, example.step_labels) == (int(label), (-1,) * 4)
    assert parts(example) == [*STEPS[:3], "#### 7<eos>"]


def test_columns_that_are_null_do_not_count() -> None:
    """Tables write every column of every row."""
    row = {"id": "u", "prompt": "Q:", "completion": "a\nb", "label": True, "correct": None, "token_ids": None}
    example = encode(make(), row | {"completions": None, "labels": None, "step_labels": None})
    assert (example.outcome, parts(example)) == (1, ["a\n", "b<eos>"])


# ---- nothing to learn from ------------------------------------------------------------------------------------------


def test_rows_without_feedback_are_left_out_and_counted() -> None:
    encoder = make()
    assert encoder.example(completion(correct=None)) is None
    assert encoder.example(completion([0, 0, 0, 0], correct=None)) is not None, "neutral is correct by default"
    masked = make(neutral="mask")
    assert masked.example(completion([0, 0, 0, 0], correct=None)) is None
    assert (encoder.counts["rows_without_feedback"], masked.counts["rows_without_feedback"]) == (1, 1)


def test_the_only_label_may_be_cut_off() -> None:
    encoder = make(16)
    assert encoder.example(completion([None, None, None, True], correct=None)) is None
    assert encoder.counts["rows_without_feedback"] == 1
    assert encoder.counts["rows_without_outcome"] == 0, "it is not in the data at all"


def test_examples() -> None:
    encoder = make()
    rows = [completion([True] * 4), completion(correct=None), completion(correct=True)]
    assert [example.row for example in encoder.examples(rows)] == [rows[0], rows[2]]
    with pytest.raises(DataError, match=r"no row has feedback .*max_length=64 tokens \({'steps_dropped'.*feedback': 2"):
        encoder.examples([rows[1]])


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_steps_that_share_a_token() -> None:
    """A tokenizer whose tokens cross line ends: ``a`` and ``b`` are one token and cannot be judged apart."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<eos>", "a", "b", "Q", "\n", "a\n", "a\nb"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "\n"), ("a\n", "b")]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    encoder = FeedbackEncoder(tokenizer, PLAIN, get_segmenter("newline"))
    row = {"id": "s", "prompt": "Q", "labels": [True, False], "outcome": False}
    with pytest.raises(DataError, match=r"^s, column 'completions': two steps share a token: give steps that a line"):
        encoder.example(row | {"completions": ["a", "b"]})
    example = encoder.example(row | {"completions": ["a", "bb"]})
    assert example is not None
    assert example.spans == ((0, 1), (1, 3)), "a token that straddles belongs to the step before"


@pytest.mark.parametrize(("column", "value"), [("correct", 1), ("outcome", "yes"), ("label", 0.0)])
def test_outcomes_are_not_cast(column: str, value: Any) -> None:
    row = {"id": "r", "prompt": "Q:", "completion": "a", column: value}
    with pytest.raises(DataError, match=f"^r, column '{column}': must be true or false, found {value!r}"):
        make().example(row)


def test_labels_of_another_kind_than_declared() -> None:
    with pytest.raises(DataError, match=r"^r, column 'step_labels': labels are of kind 'bool' and labels.kind asks"):
        make(kind="rating").example(completion([True] * 4))


def test_a_rule_for_outcomes_only() -> None:
    with pytest.raises(ConfigError, match=r"labels\.scope: outcome is for outcome reward models"):
        make(scope="outcome")


def test_labels_are_kept_after_an_error_by_default() -> None:
    encoder = FeedbackEncoder(TOKENIZER, PLAIN, get_segmenter("newline"))
    assert encode(encoder, completion([True, False, True, True])).step_labels == (1, 0, 1, 1)
