"""Step markers go in as ids, behind each step."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepkd.errors import ConfigError
from stepkd.steps import insert_markers, marker_token_id, spans_from_ends


def test_closed_form() -> None:
    marked = insert_markers([10, 11, 12, 13], [(0, 1), (1, 4)], 99)
    assert marked.token_ids == [10, 99, 11, 12, 13, 99]
    assert marked.marker_positions == [1, 5]
    assert marked.token_positions == [0, 2, 3, 4]
    assert insert_markers([], [], 99) == ([], [], [])


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.lists(st.integers(1, 20)))
def test_positions(ids: list[int], ends: list[int]) -> None:
    spans = spans_from_ends(ends, len(ids))
    marked = insert_markers(ids, spans, 99)
    assert [marked.token_ids[i] for i in marked.token_positions] == ids
    assert [marked.token_ids[i] for i in marked.marker_positions] == [99] * len(spans)
    assert sorted(marked.token_positions + marked.marker_positions) == list(range(len(ids) + len(spans)))
    for (_, end), marker in zip(spans, marked.marker_positions, strict=True):
        assert marked.token_positions[end - 1] == marker - 1


def test_marker_that_occurs_and_spans_that_miss() -> None:
    with pytest.raises(ValueError, match="marker id 12 already occurs at index 2"):
        insert_markers([10, 11, 12], [(0, 3)], 12)
    with pytest.raises(ValueError, match="the steps cover 2 tokens, the completion has 3"):
        insert_markers([10, 11, 12], [(0, 2)], 99)


def test_marker_ids(tokenizers_by_name: dict[str, Any]) -> None:
    characters, bpe = tokenizers_by_name["characters"], tokenizers_by_name["bpe"]
    assert marker_token_id(characters, "####") == characters.convert_tokens_to_ids("####")
    assert marker_token_id(characters, "\n") == characters.convert_tokens_to_ids("\n")  # white space is a token too
    assert marker_token_id(characters, "<eos>") == characters.eos_token_id
    assert marker_token_id(bpe, "\n") == bpe.convert_tokens_to_ids("Ċ")
    # "Ġ" is how byte-level BPE writes a space in its vocabulary, and also a letter of its own: not one token
    with pytest.raises(ConfigError, match="step marker 'Ġ' is 2 tokens"):
        marker_token_id(bpe, "Ġ")


def test_sentencepiece_prefix(tokenizers_by_name: dict[str, Any]) -> None:
    tokenizer = tokenizers_by_name["sentencepiece"]
    # Math-Shepherd's tag: the id is that of the word with its prefix, as encoding gives it, not of the inner piece.
    assert marker_token_id(tokenizer, "ки") == tokenizer.convert_tokens_to_ids("▁ки")
    assert tokenizer.convert_tokens_to_ids("▁ки") != tokenizer.convert_tokens_to_ids("ки")
    assert tokenizer.tokenize("\n") == ["▁", "<0x0A>"]
    assert marker_token_id(tokenizer, "\n") == tokenizer.convert_tokens_to_ids("<0x0A>")


def test_markers_that_are_not_one_token(tokenizers_by_name: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"step marker 'xy' is 2 tokens \['x', 'y'\] in this tokenizer, not one"):
        marker_token_id(tokenizers_by_name["characters"], "xy")
    with pytest.raises(ConfigError, match="step marker '' is 0 tokens"):
        marker_token_id(tokenizers_by_name["characters"], "")
    with pytest.raises(ConfigError, match="step marker 'к' is unknown to this tokenizer"):
        marker_token_id(tokenizers_by_name["characters"], "к")
