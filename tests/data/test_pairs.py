"""Preference rows to pairs: sampled ids, texts across token boundaries, end tokens, and pairs that are left out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.data.feedback import PairEncoder, PairExample
from stepkd.data.rows import PREFERENCE, STEP_PREFERENCE, validate
from stepkd.data.templates import PromptTemplate
from stepkd.errors import DataError
from stepkd.models.spec import tiny_tokenizer
from stepkd.steps.segment import get_segmenter, spans_from_ends, step_ends

PLAIN = PromptTemplate(style="plain", plain="{prompt}")
TINY = tiny_tokenizer()
EOS = TINY.eos_token_id


def merging(*merges: str) -> Any:
    """Characters, and tokens that join two of them or of their joins, in the order of the merges (``"a b"``)."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pairs = [(merge.split(" ")[0], merge.split(" ")[1]) for merge in merges]
    tokens = ["<eos>", *"Qabcdxyz0123456789=+\n", *(left + right for left, right in pairs)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)


def byte_level() -> Any:
    """Bytes, so that one character takes several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0} | {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=1)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)


def make(tokenizer: Any = TINY, **options: Any) -> PairEncoder:
    return PairEncoder(tokenizer, PLAIN, get_segmenter("newline"), **options)


def whole(chosen: str = "1\n#### 2", rejected: str = "3", **columns: Any) -> dict[str, Any]:
    return validate({"id": "w", "prompt": "Q", "chosen": chosen, "rejected": rejected, **columns}, PREFERENCE)


def step(prefix: list[str], chosen: str, rejected: str, **columns: Any) -> dict[str, Any]:
    row = {"id": "s", "prompt": "Q", "prefix": prefix, "chosen": chosen, "rejected": rejected, **columns}
    return validate(row, STEP_PREFERENCE)


def encode(encoder: PairEncoder, row: dict[str, Any]) -> PairExample:
    pair = encoder.example(row)
    assert isinstance(pair, PairExample)
    better, worse = pair.completions
    assert (better, worse) == (pair, pair.rejected)
    for side in (better, worse):
        assert side.prompt_ids.tolist() == pair.prompt_ids.tolist()
        assert spans_from_ends(step_ends(side.spans), len(side.token_ids)) == list(side.spans)
        assert len(side.token_ids)
    assert pair.size == len(pair.prompt_ids) + len(better.token_ids) + len(worse.token_ids)
    return pair


def ids(text: str, tokenizer: Any = TINY, *, end: bool = False) -> list[int]:
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*own, tokenizer.eos_token_id] if end else own


def written(pair: PairExample, tokenizer: Any = TINY) -> tuple[str, str, str]:
    """Prompt, chosen and rejected as text, end tokens shown."""
    return tuple(tokenizer.decode(list(each)) for each in (pair.prompt_ids, pair.token_ids, pair.rejected.token_ids))


# ---- whole solutions ------------------------------------------------------------------------------------------------


def test_whole_solutions_end_in_the_end_token() -> None:
    pair = encode(make(), whole())
    assert written(pair) == ("Q", "1\n#### 2<eos>", "3<eos>")
    assert pair.spans == ((0, 2), (2, 6))
    assert pair.rejected.spans == ((0, 2),)
    assert pair.visits is None


def test_the_end_token_is_not_doubled() -> None:
    assert written(encode(make(), whole("1<eos>", "2"))) == ("Q", "1<eos>", "2<eos>")


def test_sampled_solutions_are_used_as_they_are() -> None:
    """One that was cut off keeps its open end; the other side, without ids, is a finished text."""
    row = whole(chosen_ids=ids("1\n#### 2"))
    assert written(encode(make(), row)) == ("Q", "1\n#### 2", "3<eos>")
    row = whole(chosen_ids=ids("1\n#### 2", end=True), rejected_ids=ids("3"))
    assert written(encode(make(), row)) == ("Q", "1\n#### 2<eos>", "3")


def test_a_spelling_that_the_tokenizer_would_not_choose_survives() -> None:
    """Its steps too: they come from the ids, not from the text's own tokens."""
    tokenizer = merging("1 2", "\n 3")
    spelled = [tokenizer.convert_tokens_to_ids(c) for c in "12\n3"]
    assert spelled != ids("12\n3", tokenizer)
    encoder = make(tokenizer)
    pair = encode(encoder, whole("12\n3", "4", chosen_ids=[*spelled, tokenizer.eos_token_id]))
    assert list(pair.token_ids[:-1]) == spelled
    assert pair.spans == ((0, 3), (3, 5))
    assert encoder.counts["sides_of_another_tokenizer"] == 0


# ---- next steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [[], ["1+1=2\n"], ["1+1=2\n", "2+3=5\n"]])
def test_next_steps(prefix: list[str]) -> None:
    """The prefix belongs to the prompt, a step is one span, and no end token is made up."""
    encoder = make()
    pair = encode(encoder, step(prefix, "5*2=10\n", "5*2=12\n"))
    assert written(pair) == ("Q" + "".join(prefix), "5*2=10\n", "5*2=12\n")
    assert (pair.spans, pair.rejected.spans) == (((0, 7),), ((0, 7),))
    assert EOS not in (*pair.prompt_ids, *pair.token_ids, *pair.rejected.token_ids)
    assert not encoder.counts


def test_only_sampled_ids_can_end_the_solution() -> None:
    prefix = ["1+1=2\n"]
    row = step(
        prefix,
        "#### 2",
        "#### 3",
        prefix_ids=ids(prefix[0]),
        chosen_ids=ids("#### 2", end=True),
        rejected_ids=ids("#### 3"),
    )
    assert written(encode(make(), row)) == ("Q1+1=2\n", "#### 2<eos>", "#### 3")


def test_sampled_first_steps_have_an_empty_prefix() -> None:
    """There is nothing to give ids of, so none are asked for."""
    both = {"chosen_ids": ids("#### 2", end=True), "rejected_ids": ids("2\n")}
    cases: list[dict[str, Any]] = [{}, {"prefix_ids": []}, {"prefix_ids": None}]
    for extra in cases:
        encoder = make()
        pair = encode(encoder, step([], "#### 2", "2\n", **both, **extra))
        assert written(pair) == ("Q", "#### 2<eos>", "2\n")
        assert not encoder.counts


def test_a_prefix_that_comes_as_text_alone() -> None:
    """Sampled steps stay as they are behind it."""
    tokenizer = merging("= 3", "= 4")
    sampled = {"chosen_ids": ids("3", tokenizer, end=True), "rejected_ids": ids("4", tokenizer)}
    pair = encode(make(tokenizer), step(["x="], "3", "4", **sampled))
    assert list(pair.prompt_ids) == ids("Q", tokenizer) + ids("x=", tokenizer)
    assert list(pair.token_ids) == sampled["chosen_ids"]
    assert list(pair.rejected.token_ids) == sampled["rejected_ids"]


def test_a_side_without_ids_takes_the_other_back_to_its_text() -> None:
    """One rule for both sides: they must share every id before the step."""
    encoder = make()
    pair = encode(encoder, step(["1\n"], "2", "3", chosen_ids=ids("2", end=True), prefix_ids=ids("1\n")))
    assert written(pair) == ("Q1\n", "2", "3")
    assert encoder.counts == {"pairs_with_ids_of_one_side": 1}


# ---- ids of another tokenizer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strange", [[5, 6, 7], [100_000], []], ids=["other text", "no such id", "no ids"])
def test_ids_of_another_tokenizer_fall_back_to_the_text(strange: list[int]) -> None:
    encoder = make()
    good = ids("3", end=True)
    pair = encode(encoder, whole(chosen_ids=strange, rejected_ids=good))
    assert written(pair) == ("Q", "1\n#### 2<eos>", "3<eos>")
    assert encoder.counts["sides_of_another_tokenizer"] == 1
    encoder = make()
    pair = encode(encoder, step(["1\n"], "2\n", "3", prefix_ids=ids("1\n"), chosen_ids=strange, rejected_ids=good))
    assert written(pair) == ("Q1\n", "2\n", "3")
    assert encoder.counts["sides_of_another_tokenizer"] == 1
    encoder = make()
    sampled = {"chosen_ids": ids("2\n"), "rejected_ids": good}
    pair = encode(encoder, step(["1\n"], "2\n", "3", prefix_ids=strange, **sampled))
    assert written(pair) == ("Q1\n", "2\n", "3<eos>")
    assert encoder.counts["sides_of_another_tokenizer"] == 1


# ---- tokens across the boundary -------------------------------------------------------------------------------------


def test_a_token_across_the_boundary_belongs_to_the_step() -> None:
    """``=3`` is one token, ``=4`` two: both sides begin where the first of them does."""
    tokenizer = merging("= 3")
    pair = encode(make(tokenizer), step(["x="], "3\n", "4\n"))
    assert written(pair, tokenizer) == ("Qx", "=3\n", "=4\n")
    assert (len(pair.token_ids), len(pair.rejected.token_ids)) == (2, 3)


def test_a_merge_that_reaches_back_into_the_prefix() -> None:
    """The sides cut the prefix differently before the boundary: what they share goes to the prompt."""
    tokenizer = merging("b c", "a b", "a a")
    assert tokenizer.tokenize("aabc") == ["aa", "bc"]
    assert tokenizer.tokenize("aabd") == ["a", "ab", "d"]
    pair = encode(make(tokenizer), step(["aab"], "c", "d"))
    assert written(pair, tokenizer) == ("Q", "aabc", "aabd")
    pair = encode(make(tokenizer), step(["x", "aab"], "c", "d"))
    assert written(pair, tokenizer) == ("Qx", "aabc", "aabd")


def test_without_a_merge_the_cut_is_the_step() -> None:
    tokenizer = merging("x =", "3 \n")
    pair = encode(make(tokenizer), step(["x="], "3\n", "3\ny"))
    assert written(pair, tokenizer) == ("Qx=", "3\n", "3\ny")
    assert len(pair.token_ids) == 1, "shared leading tokens of the steps are the steps'"


def test_a_character_of_several_tokens_opens_the_step() -> None:
    """Its first bytes complete no character, and are the step's all the same."""
    tokenizer = byte_level()
    pair = encode(make(tokenizer), step(["1 "], "😀a", "😀b"))
    assert list(pair.prompt_ids) == ids("Q1 ", tokenizer)
    assert list(pair.token_ids) == ids("😀a", tokenizer)
    assert list(pair.rejected.token_ids) == ids("😀b", tokenizer)
    pair = encode(make(tokenizer), step(["é"], "😀", "😁"))
    assert written(pair, tokenizer) == ("Qé", "😀", "😁")


letters = st.text("abcd", min_size=1, max_size=5)
TOKENIZERS = [merging("a b"), merging("b c", "a b", "a a"), merging("a a", "aa aa", "d d", "c d"), byte_level()]


@given(st.lists(letters, max_size=3), letters, letters, st.sampled_from(TOKENIZERS))
@settings(max_examples=150, deadline=None)
def test_both_sides_are_what_was_written(prefix: list[str], chosen: str, rejected: str, tokenizer: Any) -> None:
    """Ids of a side behind the prompt's are the tokenisation of its whole text; the prompt holds no part of a step."""
    if chosen == rejected:
        return
    encoder = make(tokenizer)
    pair = encode(encoder, step(prefix, chosen, rejected))
    text = "".join(prefix)
    own = pair.prompt_ids[1:]
    for side, sampled in ((chosen, pair.token_ids), (rejected, pair.rejected.token_ids)):
        assert [*own, *sampled] == ids(text + side, tokenizer)
    assert text.startswith(tokenizer.decode(list(own)))
    assert encoder.counts == {}


# ---- visits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "visits"),
    [
        ({"chosen_visits": 30, "rejected_visits": 10}, (30, 10)),
        ({"chosen_visits": 0, "rejected_visits": 0}, (0, 0)),
        ({"chosen_visits": 30}, None),
        ({"chosen_visits": None, "rejected_visits": None}, None),
    ],
)
def test_visits(columns: dict[str, Any], visits: Any) -> None:
    assert encode(make(), step([], "1", "2", **columns)).visits == visits


# ---- pairs that are left out ----------------------------------------------------------------------------------------


def test_equal_sides_are_left_out_and_counted() -> None:
    """Texts that differ can have the same ids: characters that the tokenizer does not know, or spaces at the end."""
    encoder = make()
    assert encoder.example(whole("é", "è")) is None
    assert encoder.example(step(["1\n"], "é", "è")) is None
    same = {"chosen_ids": ids("1"), "rejected_ids": ids("1")}
    assert encoder.example(step([], "1", "1 ", **same)) is None
    assert encoder.counts["pairs_with_equal_sides"] == 3


def test_long_pairs_are_left_out_and_counted() -> None:
    """Either side counts, with the prompt and the prefix; nothing is cut off."""
    for row, need in ((whole("12", "3"), 4), (whole("1", "234"), 5), (step(["1\n"], "2", "345"), 6)):
        encoder = make(max_length=need)
        assert encoder.example(row) is not None
        assert encoder.counts["pairs_too_long"] == 0
        encoder = make(max_length=need - 1)
        assert encoder.example(row) is None
        assert encoder.counts == {"pairs_too_long": 1}


def test_examples() -> None:
    rows = [whole("é", "è"), whole(), whole("1" * 70, "2")]
    encoder = make(max_length=64)
    assert [pair.row for pair in encoder.examples(rows)] == [rows[1]]
    encoder = make(max_length=64)
    with pytest.raises(
        DataError, match=r"no pair is left \({'pairs_with_equal_sides': 1, 'pairs_too_long': 1}\): raise max_length=64"
    ):
        encoder.examples([rows[0], rows[2]])


def test_a_prompt_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(DataError, match=r"^w, column 'prompt': the prompt has 9 tokens and max_length is 8"):
        make(max_length=8).example(whole() | {"prompt": "Q" * 9})


def test_a_side_without_tokens() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "Q": 2, "a": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    with pytest.raises(DataError, match=r"^w, column 'rejected': has no tokens"):
        make(words).example({"id": "w", "prompt": "Q", "chosen": "a", "rejected": "\u2003"})
