"""Step markers: one token id put after each step, for models that score a step at a marker.

The marker goes in as an id. Joining step texts with a marker string and tokenising again moves token boundaries and is
known to cost a published PRM several F1 points on ProcessBench (QwenLM/ProcessBench issue 12).
"""

from __future__ import annotations

from typing import Any

from stepkd.errors import ConfigError
from stepkd.steps.format import MARKER_CANDIDATES


def marker_token_id(tokenizer: Any, marker: str, *, what: str = "step marker") -> int:
    """Id of a marker that must be exactly one token of this tokenizer.

    The id is the one that encoding the marker gives. SentencePiece tokenizers put a lone prefix piece before some
    markers (a newline on Llama 2); a first piece that decodes to nothing is ignored.

    Args:
        tokenizer: any transformers tokenizer.
        marker: its text.
        what: what to call it in messages.

    Raises:
        ConfigError: the marker is not one token here; the message shows its pieces.
    """
    ids = list(tokenizer.encode(marker, add_special_tokens=False))
    pieces = tokenizer.convert_ids_to_tokens(ids)
    if len(ids) == 2 and not marker.startswith(" ") and not tokenizer.decode(ids[:1]).strip(" "):
        ids = ids[1:]
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return int(ids[0])
    if pieces == [tokenizer.unk_token]:
        raise ConfigError(f"{what} {marker!r} is unknown to this tokenizer: choose one that it has as a token")
    raise ConfigError(
        f"{what} {marker!r} is {len(pieces)} tokens {pieces} in this tokenizer, not one: choose one that is "
        "a single token, or add it with tokenizer.add_special_tokens and resize the embeddings"
    )


def auto_marker(tokenizer: Any) -> str:
    """The first of :data:`~stepkd.steps.format.MARKER_CANDIDATES` that is one token of this tokenizer.

    Raises:
        ConfigError: none of them is.
    """
    for marker in MARKER_CANDIDATES:
        try:
            marker_token_id(tokenizer, marker)
        except ConfigError:
            continue
        return marker
    raise ConfigError(
        f"none of the usual step markers {list(MARKER_CANDIDATES)} is a single token of this tokenizer: name one that "
        "is, best a reserved special token that never occurs in solutions"
    )
