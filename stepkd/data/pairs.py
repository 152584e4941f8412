"""Preference rows to pairs of completions of one prompt: whole solutions, or single next steps after a shared prefix.

The rule of ids. Where a row has the sampled ids of a side and they decode to its text, they are used as they are; next
steps need them on both sides, because the two must share every id before the step (a prefix without ids is tokenised by
itself then). Otherwise steps are tokenised together with the prefix they follow, and cut where the step begins; a token
across that boundary belongs to the step. No end token is appended to a step: only sampled ids can say that the solution
ended there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepkd.data.collate import Completion
from stepkd.data.encode import Encoder, Example, with_end
from stepkd.errors import DataError
from stepkd.steps import Span, TokenizedText, first_difference, segment, text_from_ids, tokenize_text

Ids = tuple[int, ...]


@dataclass(frozen=True)
class PairExample(Example):
    """A pair; ``prompt_ids`` include the prefix, ``completion_ids`` and ``spans`` are those of the preferred side."""

    rejected_ids: Ids = ()
    """Ids of the other side."""
    rejected_spans: tuple[Span, ...] = ()
    """Its steps."""
    visits: tuple[int, int] | None = None
    """How often a tree search visited the better and the worse side."""

    @property
    def length(self) -> int:
        """Prompt and both sides, in tokens."""
        return len(self.prompt_ids) + len(self.completion_ids) + len(self.rejected_ids)

    @property
    def sides(self) -> tuple[Completion, Completion]:
        """The preferred completion, and the other."""
        return (
            Completion(self.prompt_ids, self.completion_ids, self.spans),
            Completion(self.prompt_ids, self.rejected_ids, self.rejected_spans),
        )


class PairEncoder(Encoder):
    """Turns preference rows into :class:`PairExample` objects.

    A side that does not fit into ``max_length`` with the prompt takes its pair out, as does a pair whose sides have the
    same ids: both are counted. Nothing is cut off, because the shorter text would be another preference.
    """

    def example(self, row: Mapping[str, Any]) -> PairExample | None:
        """A row's pair; None (and a count in ``counts``) when it cannot be used.

        Raises:
            DataError: a side without tokens.
        """
        name = str(row.get("id", "?"))
        prompt = self.prompt_ids(row)
        if row.get("prefix") is None:
            sides = [self._whole(row, side) for side in ("chosen", "rejected")]
            prefix: Ids = ()
        else:
            prefix, sides = self._steps(row)
        for side, ids in zip(("chosen", "rejected"), sides, strict=True):
            if not ids:
                raise DataError("has no tokens", path=name, column=side)
        if sides[0] == sides[1]:
            self.counts["pairs_with_equal_sides"] += 1
            return None
        if len(prompt) + len(prefix) + max(map(len, sides)) > self.max_length:
            self.counts["pairs_too_long"] += 1
            return None
        visits = (row.get("chosen_visits"), row.get("rejected_visits"))
        return PairExample(
            name,
            (*prompt, *prefix),
            sides[0],
            self._spans(row, sides[0]),
            row,
            rejected_ids=sides[1],
            rejected_spans=self._spans(row, sides[1]),
            visits=None if visits[0] is None or visits[1] is None else (int(visits[0]), int(visits[1])),
        )

    def _nothing_left(self) -> str:
        return f"no pair is left ({dict(self.counts)}): raise max_length={self.max_length}, or look at the builder"

    def _whole(self, row: Mapping[str, Any], side: str) -> Ids:
        if (ids := self._sampled_side(row, side, str(row[side]))) is not None:
            return ids
        text = tokenize_text(self.tokenizer, row[side])
        return with_end(text, self.template, self.tokenizer).token_ids

    def _steps(self, row: Mapping[str, Any]) -> tuple[Ids, list[Ids]]:
        """Shared prefix and the two next steps."""
        text = "".join(row["prefix"])
        prefix = self._sampled_side(row, "prefix", text) if text else ()
        sampled = [self._sampled_side(row, side, row[side]) for side in ("chosen", "rejected")]
        chosen, rejected = sampled
        if chosen is not None and rejected is not None:
            return tokenize_text(self.tokenizer, text).token_ids if prefix is None else prefix, [chosen, rejected]
        # Both sides must share every id before the step, so one with ids goes back to its text with the other.
        if (chosen is None) != (rejected is None):
            self.counts["pairs_with_ids_of_one_side"] += 1
        whole = [tokenize_text(self.tokenizer, text + row[side]) for side in ("chosen", "rejected")]
        cut = min(_step_start(each, len(text)) for each in whole)
        cut = min(cut, first_difference(whole[0].token_ids, whole[1].token_ids))
        return whole[0].token_ids[:cut], [each.token_ids[cut:] for each in whole]

    def _sampled_side(self, row: Mapping[str, Any], column: str, text: str) -> Ids | None:
        """A side's sampled ids, unless they are another tokenizer's."""
        ids = row.get(f"{column}_ids")
        if ids is None:
            return None
        if any(i >= len(self.tokenizer) for i in ids):
            decoded = None
        else:
            decoded = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # A piece that begins a text may lose its space in decoding.
        if decoded is None or decoded.strip() != text.strip():
            self.counts["sides_of_another_tokenizer"] += 1
            return None
        return tuple(ids)

    def _spans(self, row: Mapping[str, Any], ids: Ids) -> tuple[Span, ...]:
        """Steps of a whole solution; a next step is one."""
        if row.get("prefix") is not None:
            return ((0, len(ids)),)
        spans = segment(self.segmenter, text_from_ids(self.tokenizer, ids))
        return tuple(spans) or ((0, len(ids)),)


def _step_start(text: TokenizedText, characters: int) -> int:
    """Number of leading tokens that the first ``characters`` are written with; one that goes beyond them is not."""
    if not characters:
        return 0
    last = bisect_left(text.char_ends, characters)
    return last + (text.char_ends[last] == characters)
