"""Tokenised text: both roads (text to ids, sampled ids to text) give the same characters per token."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stepkd.errors import DataError, ModelError
from stepkd.steps.segment import get_segmenter, segment
from stepkd.steps.text import TokenizedText, text_from_ids, tokenize_text

PIECES = [
    "a",
    "b",
    "7",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    ".",
    "! ",
    "Step 2:",
    "日",
    "本",
    "😀",
    "é",
    "👩‍👩‍👧",
    "ﷺ",
    "#### ",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
BYTE_LEVEL = ("bpe", "bpe_trimmed", "bpe_over_lines")


def complete_characters(tokenizer: Any, ids: list[int], text: str) -> list[int]:
    """Brute force for byte-level tokens: bytes of every prefix, counted in whole characters."""
    size = {c: len(c.encode()) for c in text}
    ends, num_bytes = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        num_bytes += len(token)  # one alphabet character per byte
        used = count = 0
        for character in text:
            used += size[character]
            if used > num_bytes:
                break
            count += 1
        ends.append(count)
    return ends


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_ends_are_exact_on_both_roads(name: str, text: str, tokenizers_by_name: dict[str, Any]) -> None:
    tokenizer = tokenizers_by_name[name]
    written = tokenize_text(tokenizer, text)
    sampled = text_from_ids(tokenizer, written.token_ids)
    assert sampled.text == text
    assert sampled.token_ids == written.token_ids
    expected = tuple(complete_characters(tokenizer, list(written.token_ids), text))
    assert sampled.char_ends == expected
    if name != "bpe_trimmed":  # a trimmed offset gives a token's trailing spaces to the next token
        assert written.char_ends == expected


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=[*map(chr, range(32, 127)), "\n"], max_size=60))
def test_characters_both_roads(text: str, tokenizers_by_name: dict[str, Any]) -> None:
    tokenizer = tokenizers_by_name["characters"]
    assume(not any(token in text for token in tokenizer.all_special_tokens))  # their names in a text are these tokens
    written = tokenize_text(tokenizer, text)
    assert text_from_ids(tokenizer, written.token_ids) == written
    assert written.char_ends[-1:] == ((len(text),) if text else ())


@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.sampled_from([" a", " b", "ab", "é", "日", "\n", "ки"]), max_size=12).map("".join))
def test_sentencepiece_both_roads(text: str, tokenizers_by_name: dict[str, Any]) -> None:
    tokenizer = tokenizers_by_name["sentencepiece"]
    text = text.lstrip(" ")  # the decoder takes one leading space away
    written = tokenize_text(tokenizer, text)
    sampled = text_from_ids(tokenizer, written.token_ids)
    assert sampled.text == text
    assert sampled.char_ends == written.char_ends


@pytest.mark.parametrize("name", [*BYTE_LEVEL, "characters", "sentencepiece"])
def test_any_ids_give_the_tokenizers_own_text(name: str, tokenizers_by_name: dict[str, Any]) -> None:
    """Sampled ids may be any bytes, broken UTF-8 and special tokens included."""
    tokenizer = tokenizers_by_name[name]
    rng = random.Random(3)
    for _ in range(40):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 40))]
        sampled = text_from_ids(tokenizer, ids)
        assert sampled.text == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert sampled.char_ends[-1] == len(sampled.text)
        assert list(sampled.char_ends) == sorted(sampled.char_ends)
        assert segment(get_segmenter("newline"), sampled)[-1][1] == len(ids)


@pytest.mark.parametrize("name", ["characters", *BYTE_LEVEL])
def test_runs_that_completions_share_are_decoded_once(
    name: str, tokenizers_by_name: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers_by_name[name]
    draw = random.Random(1)
    sequences = [[draw.randrange(len(tokenizer)) for _ in range(draw.randrange(30))] for _ in range(20)]
    first = [text_from_ids(tokenizer, ids) for ids in sequences]
    calls: list[Any] = []
    decode = type(tokenizer).decode
    monkeypatch.setattr(type(tokenizer), "decode", lambda *a, **k: (calls.append(0), decode(*a, **k))[1])
    assert [text_from_ids(tokenizer, ids) for ids in sequences] == first
    assert len(calls) < sum(map(len, sequences))  # two for each of them where nothing is kept


def test_bad_byte_after_good_ones_in_byte_fallback(tokenizers_by_name: dict[str, Any]) -> None:
    """SentencePiece turns the whole run into replacement characters; nothing of it may count as decoded before."""
    tokenizer = tokenizers_by_name["sentencepiece"]
    ids = tokenizer.convert_tokens_to_ids(["<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "▁a"])
    sampled = text_from_ids(tokenizer, ids)
    assert sampled.text == "\ufffd" * 4 + " a"
    assert sampled.char_ends[-2:] == (4, 6)


def test_emoji_split_over_tokens_is_complete_at_its_last_token(tokenizers_by_name: dict[str, Any]) -> None:
    written = tokenize_text(tokenizers_by_name["bpe"], "x\n🜚y")
    assert len(written) == 6  # the sign is three tokens, none of which is a character
    assert written.char_ends == (1, 2, 2, 2, 3, 4)


def test_special_tokens_add_no_characters(tokenizers_by_name: dict[str, Any]) -> None:
    tokenizer = tokenizers_by_name["characters"]
    ids = [*tokenizer("1+1", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert text_from_ids(tokenizer, ids).char_ends == (1, 2, 3, 3)


def test_token_end_and_span_text() -> None:
    text = TokenizedText((5, 6, 7, 8), "ab\ncd", (2, 2, 4, 5))
    assert [text.token_end(i) for i in range(7)] == [0, 1, 1, 2, 3, 4, 4]
    assert text.span_text(0, 2) == "ab"
    assert text.span_text(2, 4) == "\ncd"
    assert text.span_text(1, 1) == ""
    assert text.span_text(0, 0) == ""


def test_log_probabilities_are_kept(tokenizers_by_name: dict[str, Any]) -> None:
    assert text_from_ids(tokenizers_by_name["characters"], [5, 6], [-0.5, -1.5]).logprobs == (-0.5, -1.5)
    assert text_from_ids(tokenizers_by_name["characters"], []) == TokenizedText((), "", ())


def test_bad_input(tokenizers_by_name: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="2 ids but 1 char_ends"):
        TokenizedText((1, 2), "a", (1,))
    with pytest.raises(ValueError, match="1 ids but 2 logprobs"):
        TokenizedText((1,), "a", (1,), (0.0, 0.0))
    with pytest.raises(DataError, match=re.escape("character 2 of the text is a lone surrogate ('\\ud800')")):
        tokenize_text(tokenizers_by_name["bpe"], "ab\ud800")

    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="Slow gives no character offsets: load the fast version"):
        tokenize_text(Slow(), "a")


@pytest.mark.parametrize("package", ["stepkd.steps", "stepkd.losses", "stepkd.randomness"])
def test_light_import(package: str) -> None:
    code = (
        f"import sys, {package}\n"
        "heavy = {'lightning', 'transformers', 'trl', 'peft', 'datasets', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_blank_in_the_next_words_token_is_no_part_of_the_text_before() -> None:
    # tokens: "so", ".", " 7", "\n8", " "
    text = TokenizedText((1, 2, 3, 4, 5), "so. 7\n8 ", (2, 3, 5, 7, 8))
    assert [text.token_end(end) for end in (3, 4, 5, 6, 7, 8)] == [2, 2, 3, 3, 4, 5]
    assert TokenizedText((1, 2), " a b", (2, 4)).token_end(1) == 1, "the first token has no other owner"
    assert TokenizedText((), "", ()).token_end(3) == 0
