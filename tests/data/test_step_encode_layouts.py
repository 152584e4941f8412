"""No layout tells which step is the last one: in data whose incorrect step ends the solution that gives the label
away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepkd.data.encode import LabelRule
from stepkd.data.step_encode import Layout, StepEncoder
from stepkd.data.templates import PromptTemplate
from stepkd.models.spec import tiny_tokenizer
from stepkd.steps.format import StepFormat, auto_marker, marker_token_id

FORMATS = {
    "step_end": StepFormat(),
    "two newlines": StepFormat(separator="\n\n"),
    "no marker": StepFormat(marker=None),
    "before_separator": StepFormat(marker_place="before_separator"),
    "per_step": StepFormat(tokenize="per_step"),
    "per_step, no marker": StepFormat(marker=None, tokenize="per_step"),
    "per_step, no separator": StepFormat(separator="", tokenize="per_step"),
    "no separator": StepFormat(separator=""),
}
CLOSED = ("step_end", "two newlines", "no marker", "per_step", "per_step, no marker")
"""Formats that are read behind a separator."""
STEP_LISTS = [
    ["1+2=3"],
    ["1+2=3", "3*2=6", "#### 6"],
    ["1+2=3\n", "3*2=6\n", "#### 6"],
    ["so 7", "so so", "b", "so a7"],
]


def byte_level() -> Any:
    """Byte-level BPE without tokens across a line end; only "so" and "so " were merged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=260,
        special_tokens=["<eos>", "<extra_0>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["so "] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)


def sentencepiece_like() -> Any:
    """Pieces with a begin-of-word mark and bytes for the rest: a newline alone is encoded as two pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", "<extra_0>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(0x21, 0x7F)]
    backend = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", additional_special_tokens=["<extra_0>"]
    )


TOKENIZERS: dict[str, Callable[[], Any]] = {"tiny": tiny_tokenizer, "bpe": byte_level, "pieces": sentencepiece_like}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def tiny() -> Any:
    return tiny_tokenizer()


def make(tokenizer: Any, name: str, **settings: Any) -> StepEncoder:
    format = FORMATS[name]
    if format.marker == "auto":
        format = StepFormat(**{**format.__dict__, "marker": auto_marker(tokenizer)})
    marker = None if format.marker is None else marker_token_id(tokenizer, format.marker)
    template = PromptTemplate(style="plain", plain="{prompt}")
    return StepEncoder(tokenizer, template, format=format, marker_id=marker, **settings)


def sampled(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """A completion with the ids of the texts as a whole, cut where they end, and an end token."""
    encoded = tokenizer("".join(texts), add_special_tokens=False, return_offsets_mapping=True)
    cuts = [sum(map(len, texts[: i + 1])) for i in range(len(texts))]
    ends = [sum(end <= cut for _, end in encoded["offset_mapping"]) for cut in cuts]
    return {
        "id": "r", "prompt": "Q:", "completion": "".join(texts), "steps": texts,
        "token_ids": [*encoded["input_ids"], tokenizer.eos_token_id], "step_ends": [*ends[:-1], ends[-1] + 1],
    }  # fmt: skip


def before_the_reading(encoder: StepEncoder, layout: Layout) -> list[int]:
    """The token right before every marker; without markers the one that is read."""
    return [layout.ids[at - (encoder.marker_id is not None)] for at in layout.read_at]


def assert_prefixes(layouts: Callable[[int], Layout], steps: int, *, behind_last: bool = False) -> None:
    """The first k steps give the whole solution's ids up to and including the place where step k is read.

    ``behind_last``: a separator may stand behind the last marker, where no score sees it.
    """
    whole = layouts(steps)
    for kept in range(1, steps + 1):
        part, end = layouts(kept), whole.read_at[kept - 1] + 1
        assert part.ids[: part.read_at[-1] + 1] == whole.ids[:end]
        assert part.read_at == whole.read_at[:kept]
        assert [start for start, _ in part.spans] == [start for start, _ in whole.spans[:kept]]
        assert behind_last or part.ids == whole.ids[:end], "nothing is behind the last reading place"


# ---- the separator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", STEP_LISTS)
@pytest.mark.parametrize("name", CLOSED)
def test_one_token_stands_before_every_marker(tokenizer: Any, name: str, steps: list[str]) -> None:
    encoder = make(tokenizer, name)
    newline = tokenizer("1\n", add_special_tokens=False)["input_ids"][-1]
    assert tokenizer.decode([newline]) == "\n"
    texts = [steps, [f"{step.strip()}\n" for step in steps[:-1]] + steps[-1:]]
    for layout in [encoder.layout(texts[0]), *(encoder.row_layout(sampled(tokenizer, some)) for some in texts)]:
        assert before_the_reading(encoder, layout) == [newline] * len(steps)


def test_the_rows_of_training_have_it_too(tokenizer: Any) -> None:
    """PRM800K's alternatives: the same steps, and an incorrect one that ends the solution."""
    encoder = make(tokenizer, "step_end", labels=LabelRule())
    newline = tokenizer("1\n", add_special_tokens=False)["input_ids"][-1]
    incorrect = {"id": "w", "prompt": "Q:", "completions": ["1+2=3", "3*2=5"], "labels": [True, False]}
    correct = {"id": "r", "prompt": "Q:", "completions": ["1+2=3", "3*2=6", "#### 6"], "labels": [True, True, True]}
    completion = sampled(tokenizer, ["1+2=3\n", "3*2=5"]) | {"step_labels": [True, False]}
    examples = [encoder.example(row) for row in (incorrect, correct, completion)]
    for example in examples:
        assert example is not None
        assert {example.token_ids[at - 1] for at in example.read_at} == {newline}
    assert examples[0] is not None
    assert examples[2] is not None
    assert examples[0].key == examples[2].key


@pytest.mark.parametrize("name", ["step_end", "no marker", "two newlines"])
def test_sampled_steps_without_a_line_end_all_get_a_separator(tokenizer: Any, name: str) -> None:
    """Sentences: closing the last one alone would mark it as the last."""
    encoder = make(tokenizer, name)
    layout = encoder.row_layout(sampled(tokenizer, ["so 7.", " so 8.", " 9"]))
    assert len(set(before_the_reading(encoder, layout))) == 1
    separator = encoder.format.separator
    mark = "" if encoder.marker_id is None else tokenizer.decode([encoder.marker_id])
    texts = [tokenizer.decode(list(layout.ids[:end])) for _, end in layout.spans]
    assert texts[-1] == f"so 7.{separator}{mark} so 8.{separator}{mark} 9{separator}{mark}"


@pytest.mark.parametrize("name", ["before_separator", "no separator", "per_step, no separator"])
def test_nothing_is_put_behind_the_last_step_of_other_formats(tiny: Any, name: str) -> None:
    encoder = make(tiny, name)
    steps = ["1+2=3\n", "#### 3"]
    for layout in (encoder.layout(steps), encoder.row_layout(sampled(tiny, steps))):
        assert tiny.decode(list(layout.ids))[-2:] == "3~"
        assert layout.ids[-1] == encoder.marker_id


# ---- prefixes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [*STEP_LISTS, ["so 7.", " so 8.", " 9"], ["1 ", "2 \n", "3\n\n", "4 "]])
@pytest.mark.parametrize("name", FORMATS)
def test_the_first_steps_are_a_prefix(tokenizer: Any, name: str, steps: list[str]) -> None:
    encoder, behind_last = make(tokenizer, name), name == "before_separator"
    for row in (lambda steps: {"completions": steps}, lambda steps: sampled(tokenizer, steps)):
        assert_prefixes(lambda kept: encoder.row_layout(row(steps[:kept])), len(steps), behind_last=behind_last)  # noqa: B023


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.text("17+=.ab so\n", min_size=1, max_size=6), st.sampled_from(["", " ", "\n", "\n\n"]))
        .map("".join)
        .filter(str.strip),
        min_size=1,
        max_size=5,
    )
)
def test_any_first_steps_are_a_prefix(tiny: Any, name: str, steps: list[str]) -> None:
    """Characters as tokens: no step shares one with another, so the property holds for every format."""
    encoder, behind_last = make(tiny, name), name == "before_separator"
    for row in (lambda steps: {"completions": steps}, lambda steps: sampled(tiny, steps)):
        assert_prefixes(lambda kept: encoder.row_layout(row(steps[:kept])), len(steps), behind_last=behind_last)  # noqa: B023


def reaching() -> Any:
    """Byte-level BPE with tokens over every kind of step end: text and separator, separator and the next step."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["7.\n", "a\nb", " b", " \n", "\n\n", "\n ", "  "])
    return tokenizer


def gpt_like() -> Any:
    """Byte-level BPE behind GPT-2's pattern, which looks past white space: what follows decides how it is cut."""
    from tokenizers import pre_tokenizers

    tokenizer = reaching()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return tokenizer


REACHING = {"reaching": reaching(), "gpt": gpt_like(), "pieces": sentencepiece_like()}
ODD = st.lists(
    st.tuples(
        st.sampled_from(["", " ", "\n", "  ", "\t"]),
        st.text("17+.ab so", min_size=1, max_size=5).filter(str.strip),
        st.sampled_from(["", " ", "  ", "\t", "\n", " \n", "\n\n", "\n ", "\r\n", "\u00a0"]),
    ).map("".join),
    min_size=1,
    max_size=5,
)
"""Steps that begin and end with any white space."""


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(steps=ODD, tokenizer=st.sampled_from(sorted(REACHING)))
def test_every_step_is_read_at_its_own_end_whatever_follows(name: str, steps: list[str], tokenizer: str) -> None:
    encoder = make(REACHING[tokenizer], name)
    layout = encoder.layout(steps)
    assert_prefixes(lambda kept: encoder.layout(steps[:kept]), len(steps), behind_last=name == "before_separator")
    assert len(layout.read_at) == len(steps)
    for number, at in enumerate(layout.read_at, start=1):
        read = [i for i in layout.ids[: at + 1] if i != encoder.marker_id]
        assert words(REACHING[tokenizer].decode(read)) == words("".join(steps[:number])), "its text, and not more"
        if name != "before_separator" and encoder.format.separator:
            assert REACHING[tokenizer].decode(read).endswith("\n"), "behind its separator, as every step"


def words(text: str) -> str:
    return "".join(text.split())


def test_a_blank_at_a_steps_end_separates_nothing() -> None:
    tokenizer = gpt_like()
    assert tokenizer.decode(tokenizer("so 7 b", add_special_tokens=False)["input_ids"][-1:]) == " b"
    for name, text in (
        ("step_end", "so 7 \n<extra_0>b\n<extra_0>"),
        ("no marker", "so 7 \nb\n"),
        ("before_separator", "so 7<extra_0> \nb<extra_0>"),
        ("no separator", "so 7 <extra_0>b<extra_0>"),
    ):
        assert tokenizer.decode(list(make(tokenizer, name).layout(["so 7 ", "b"]).ids)) == text


def test_a_sampled_step_that_ends_in_a_blank_gets_a_separator(tokenizer: Any) -> None:
    texts = ["1+2=3 ", "7+7=14\n", "a"]
    completion = sampled(tokenizer, texts)
    encoder = make(tokenizer, "step_end")
    before = set(before_the_reading(encoder, encoder.row_layout(completion)))
    assert [tokenizer.decode([i]) for i in before] == ["\n"]


# ---- text and ids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["step_end", "two newlines", "no marker", "no separator"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.text("17+=.ab so", min_size=1, max_size=6), st.sampled_from(["", " ", "\n", "\n\n"]))
        .map("".join)
        .filter(str.strip),
        min_size=1,
        max_size=5,
    )
)
def test_sampled_ids_and_their_text_have_one_layout(tiny: Any, name: str, steps: list[str]) -> None:
    encoder, completion = make(tiny, name), sampled(tiny, steps)
    text = {key: value for key, value in completion.items() if key not in ("token_ids", "step_ends")}
    assert encoder.row_layout(completion) == encoder.row_layout(text) == encoder.layout(steps)


@pytest.mark.parametrize("steps", [["1\n", "2"], ["1\n", "2 \n", "3\n"], ["1"]])
def test_markers_before_separators_have_one_layout_where_steps_end_in_lines(tiny: Any, steps: list[str]) -> None:
    """The sampled ids of this format are never added to; as text, steps that run into each other are separated."""
    encoder = make(tiny, "before_separator")
    assert encoder.row_layout(sampled(tiny, steps)) == encoder.layout(steps)
