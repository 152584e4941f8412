"""Step markers go in as ids, behind each step."""

from __future__ import annotations

from typing import Any

import pytest

from stepkd.errors import ConfigError
from stepkd.steps.format import marker_token_id


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
