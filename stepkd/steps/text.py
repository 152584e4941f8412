"""A completion as one tokenisation: ids, text, and the characters each token covers.

Text is tokenised once and as a whole; sampled ids are never turned into text and back. Both roads end in a
:class:`TokenizedText`, the only thing a segmenter sees.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

from stepkd.errors import DataError, ModelError

_INCOMPLETE = "\ufffd"  # what a decoder prints for a UTF-8 sequence whose last bytes are still to come


@dataclass(frozen=True)
class TokenizedText:
    """Token ids with their text.

    ``char_ends[i]`` is the number of characters of ``text`` that are complete after token ``i``; it never decreases.
    Special tokens and tokens that hold only part of a character add nothing.
    """

    token_ids: tuple[int, ...]
    """Ids of the completion, T of them."""
    text: str
    """Decoded text without special tokens."""
    char_ends: tuple[int, ...]
    """For each of the T tokens, the exclusive end in ``text`` of the characters decoded so far."""
    logprobs: tuple[float, ...] | None = None
    """Log-probability of each token under the sampling model (nats, <= 0). Confidence-based segmenters read them as
    those at temperature 1 with nothing cut off: a completion's ``raw_logprobs``, not its ``logprobs``."""
    entropies: tuple[float, ...] | None = None
    """Entropy (nats, >= 0) of the next-token distribution at temperature 1 that each token was drawn from."""
    teacher_logprobs: tuple[float, ...] | None = None
    """Log-probability of each token (nats, <= 0) under another model at temperature 1."""

    def __post_init__(self) -> None:
        for name in ("char_ends", "logprobs", "entropies", "teacher_logprobs"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.token_ids):
                raise ValueError(f"{len(self.token_ids)} ids but {len(values)} {name}")

    def __len__(self) -> int:
        return len(self.token_ids)

    def token_end(self, char_end: int) -> int:
        """Number of leading tokens needed to hold ``text[:char_end]``.

        A token that straddles the boundary belongs to the text before it, unless all it holds of that is white space
        (a blank that the tokenizer joined with the next word).
        """
        if char_end <= 0 or not len(self):
            return 0
        last = min(bisect_left(self.char_ends, char_end), len(self) - 1)
        start = self.char_ends[last - 1] if last else 0
        blank = last > 0 and self.char_ends[last] > char_end and not self.text[start:char_end].strip()
        return last + (not blank)

    def span_text(self, start: int, end: int) -> str:
        """Text of the tokens ``[start, end)``.

        Args:
            start, end: token indices, 0 <= start <= end <= T.

        Returns:
            The characters that become complete within these tokens, so that the texts of spans that partition a
            completion join to its text.
        """
        return self.text[self.char_ends[start - 1] if start else 0 : self.char_ends[end - 1] if end else 0]


def tokenize_text(tokenizer: Any, text: str) -> TokenizedText:
    """Tokenise a completion once, as a whole, without special tokens.

    Args:
        tokenizer: a fast transformers tokenizer (offsets are needed).
        text: the completion.

    Returns:
        Its ids and, for each, how many characters are complete behind it.

    Raises:
        ModelError: the tokenizer is a slow one and gives no offsets.
        DataError: the text cannot be encoded as UTF-8.
    """
    return tokenize_texts(tokenizer, [text])[0]


def tokenize_texts(tokenizer: Any, texts: Sequence[str]) -> list[TokenizedText]:
    """Tokenise texts, each on its own, without special tokens.

    Args:
        tokenizer: a fast transformers tokenizer (offsets are needed).
        texts: what to tokenise.

    Raises:
        ModelError: the tokenizer is a slow one and gives no offsets.
        DataError: a text cannot be encoded as UTF-8.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} gives no character offsets: load the fast version (use_fast=True) or convert "
            "the tokenizer to a tokenizer.json"
        )
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"character {error.start} of the text is a lone surrogate ({text[error.start]!r}), which no tokenizer "
                "can encode: repair the text where it was written (for instance with errors='replace')"
            ) from error
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    return [_aligned(*each) for each in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)]


def _aligned(text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> TokenizedText:
    ends, last = [], 0
    for i, (_, end) in enumerate(offsets):
        # Byte-level tokens that share a character all report it whole; it is complete when the next token starts later.
        complete = min(end, offsets[i + 1][0]) if i + 1 < len(offsets) else len(text)
        last = max(last, complete)
        ends.append(last)
    return TokenizedText(tuple(ids), text, tuple(ends))


_RUN = 4
"""Longest run of ids whose text is kept, in tokens: completions of one tokenizer share most of them."""
_KEPT = 2**16
"""Most runs that are kept of a tokenizer."""
_TEXTS: WeakKeyDictionary[Any, dict[tuple[int, ...], str]] = WeakKeyDictionary()
"""Of each tokenizer the texts of runs; one to which special tokens are added later keeps what it decoded before."""


def text_from_ids(tokenizer: Any, token_ids: Iterable[int], logprobs: Iterable[float] | None = None) -> TokenizedText:
    """Decode sampled ids piece by piece, keeping track of which token completes which character.

    The ids are kept as they are. Decoding a growing window of the last few tokens gives the same text as decoding all
    at once (tokenizers that treat the first token of a sequence differently included) in linear time. Where it does not
    (SentencePiece decodes a run of byte pieces with one bad byte differently as it grows), every prefix is decoded.

    Args:
        tokenizer: any transformers tokenizer.
        token_ids: T sampled ids, special tokens allowed.
        logprobs: T log-probabilities of the sampled ids; at temperature 1 where a segmenter is to read them.
    """
    ids = tuple(map(int, token_ids))
    texts = _TEXTS.setdefault(tokenizer, {})
    if len(texts) > _KEPT:
        texts.clear()

    def decode(start: int, end: int) -> str:
        part = ids[start:end]
        text = texts.get(part)
        if text is None:
            text = str(tokenizer.decode(list(part), skip_special_tokens=True, clean_up_tokenization_spaces=False))
            if len(part) <= _RUN:
                texts[part] = text
        return text

    pieces: list[str] = []
    ends: list[int] = []
    length = window = read = 0
    for i in range(len(ids)):
        before, now = decode(window, read), decode(window, i + 1)
        complete = now.rstrip(_INCOMPLETE)
        if len(now) > len(before) and (len(complete) == len(now) or i + 1 == len(ids)):
            pieces.append(now[len(before) :])
            length += len(pieces[-1])
            window, read = read, i + 1
            ends.append(length)
        else:
            ends.append(max(length + len(complete) - len(before), ends[-1] if ends else 0))
    text = decode(0, len(ids))
    if "".join(pieces) != text:
        shared = [first_difference(text, decode(0, i + 1)) for i in range(len(ids))]
        ends = list(accumulate(shared, max))
    return TokenizedText(ids, text, tuple(ends), None if logprobs is None else tuple(logprobs))


def first_difference(left: Collection[Any], right: Collection[Any]) -> int:
    """Number of leading ids that two completions of one prompt share (of characters, for texts).

    MCTS-DPO (Xie et al. 2024, arXiv 2405.00451) takes its loss from there on. Shared leading tokens have the same
    context on both sides, so their log-ratios cancel in DPO's difference; leaving them out changes length-normalised
    ratios and the rewards that are logged.
    """
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
