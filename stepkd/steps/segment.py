"""Segmenters: where one step ends and the next begins; and spans, the half-open token ranges that are the steps.

The spans of one completion are in order, are never empty, and cover every token once. Everything in stepkd that speaks
of a step (labels, losses, search, evaluation) uses them, so a step means the same everywhere.

A segmenter looks at one :class:`~stepkd.steps.text.TokenizedText` and returns exclusive token ends. Delimiter
segmenters find boundaries in the text and map them to tokens: separators belong to the step before them, a token that
straddles a boundary belongs to the earlier step unless it holds only white space of it, and white space alone is never
a step. Confidence-based segmenters (:mod:`stepkd.steps.confidence`) use the same interface and read per-token signals.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol, runtime_checkable

from stepkd.errors import ConfigError, check_bounds, nearest
from stepkd.steps.confidence import SIGNAL_SEGMENTERS
from stepkd.steps.text import TokenizedText

Span = tuple[int, int]
"""``(start, end)`` token indices, counted from the first completion token."""


def spans_from_ends(ends: Sequence[int], num_tokens: int) -> list[Span]:
    """Build spans from exclusive step ends.

    Args:
        ends: step ends in any order, duplicates allowed; values outside ``(0, num_tokens)`` are ignored, and the last
            step always ends at ``num_tokens``.
        num_tokens: number of completion tokens; 0 gives no spans.

    Returns:
        Spans that partition ``range(num_tokens)``.
    """
    if num_tokens == 0:
        return []
    cuts = [0, *sorted({end for end in ends if 0 < end < num_tokens}), num_tokens]
    return list(pairwise(cuts))


def step_ends(spans: Sequence[Span]) -> list[int]:
    """Exclusive end of every step: the form in which completion rows store spans.

    Args:
        spans: half-open token spans of one completion, in order.

    Returns:
        Token counts, increasing; :func:`spans_from_ends` makes spans of them again.
    """
    return [end for _, end in spans]


@runtime_checkable
class Segmenter(Protocol):
    """Anything that can cut a completion into steps; :func:`segment` makes spans of its ends.

    A class with ``ends`` is enough, no base is needed::

        class Thirds:
            def ends(self, completion):
                return [len(completion) * part // 3 for part in (1, 2)]
    """

    def ends(self, completion: TokenizedText) -> list[int]:
        """Say where the steps of a completion end.

        Args:
            completion: T tokens with their text; a segmenter that needs signals reads its log-probabilities or
                entropies there.

        Returns:
            Exclusive token ends; the end of the completion may be left out.
        """
        ...


def segment(segmenter: Segmenter, completion: TokenizedText) -> list[Span]:
    """Cut ``completion`` into steps.

    Args:
        segmenter: what finds the ends of steps, such as ``get_segmenter("newline")``.
        completion: the tokenised completion, see :func:`~stepkd.steps.text.tokenize_text`.

    Returns:
        Half-open token spans that partition the completion exactly; no tokens give no spans.
    """
    return spans_from_ends(segmenter.ends(completion), len(completion))


def _ends_at(completion: TokenizedText, boundaries: Iterable[int]) -> list[int]:
    """Map boundaries in the text to token ends, leaving out those that would make a step of white space alone.

    Args:
        completion: the tokenised text.
        boundaries: increasing character positions at which a step may end.

    Returns:
        Increasing token ends. White space stays with the step before it, or opens the first one. A step whose words are
        all in a straddling token belongs, with the white space behind it, to the earlier step that has that token.
    """
    text, words_end = completion.text, len(completion.text.rstrip())
    ends: list[int] = []
    cut = token = 0
    for boundary in boundaries if len(completion) else ():
        if boundary >= words_end or not text[cut:boundary].strip():
            continue
        end = completion.token_end(boundary)
        if completion.char_ends[end - 1] >= words_end:
            break
        if ends and not completion.span_text(token, end).strip():
            ends.pop()
        ends.append(end)
        cut, token = boundary, end
    return ends


@dataclass(frozen=True)
class RegexSegmenter:
    """Cut at every match of a pattern.

    Args:
        pattern: Python regular expression, multi-line mode.
        cut: ``"after"`` puts the match at the end of the step before it (a separator), ``"before"`` at the start of the
            next step (a heading such as ``Step 2:``).
    """

    pattern: str
    cut: Literal["after", "before"] = "after"

    def __post_init__(self) -> None:
        check_bounds("segmenter ", self)
        try:
            compiled = re.compile(self.pattern, re.MULTILINE)
        except re.error as error:
            raise ConfigError(f"segmenter pattern {self.pattern!r} is not a regular expression: {error}") from error
        if compiled.match(""):
            raise ConfigError(f"segmenter pattern {self.pattern!r} matches the empty string and would cut everywhere")

    def ends(self, completion: TokenizedText) -> list[int]:
        """See :class:`Segmenter`."""
        matches = re.finditer(self.pattern, completion.text, re.MULTILINE)
        return _ends_at(completion, (each.end() if self.cut == "after" else each.start() for each in matches))


_ABBREVIATIONS = ("mr", "mrs", "ms", "dr", "prof", "st", "vs", "etc", "e.g", "i.e", "cf", "eq", "fig", "no", "approx")
_LONGEST_ABBREVIATION = 16  # characters before a point that are looked at; any number above the longest abbreviation
# The look-behind starts a match only at the first mark, so that a long run of marks is read once.
_SENTENCE_END = r"(?<![.!?])[.!?]+[\"')\]]*(?:[ \t\r]*\n\s*|(?=\s))|\n\s*"


@dataclass(frozen=True)
class SentenceSegmenter:
    """Cut after sentences: ``.``, ``!`` or ``?`` (closing quotes included) before white space, and at line ends.

    The space between two sentences goes to the second one, because byte-level BPE glues it to the word that follows.
    Decimal points, enumerations such as ``1.`` at a line's start and common abbreviations do not end a sentence.
    """

    def ends(self, completion: TokenizedText) -> list[int]:
        """See :class:`Segmenter`."""
        return _ends_at(completion, self._boundaries(completion.text))

    def _boundaries(self, text: str) -> Iterator[int]:
        last = 0
        for match in re.finditer(_SENTENCE_END, text):
            end = match.end()
            body = text[last:end].strip()
            if match.group() == ".":
                words = body[-_LONGEST_ABBREVIATION:-1].split()
                word = words[-1].lower().lstrip("([\"'") if words else ""
                if word in _ABBREVIATIONS or body[:-1].isdigit():
                    continue
            if body:
                last = end
                yield end


@dataclass(frozen=True)
class WholeSegmenter:
    """One step per completion: outcome supervision as a special case of step supervision."""

    def ends(self, completion: TokenizedText) -> list[int]:
        """See :class:`Segmenter`."""
        return []


SEGMENTERS: dict[str, Callable[[], Segmenter]] = {
    "newline": lambda: RegexSegmenter(r"\n(?:[ \t\r]*\n)*"),
    "blank_line": lambda: RegexSegmenter(r"\n[ \t\r]*\n(?:[ \t\r]*\n)*"),
    "step_heading": lambda: RegexSegmenter(r"^[ \t#*]*(?i:step)[ \t]+\d+\b", cut="before"),
    "sentence": SentenceSegmenter,
    "whole": WholeSegmenter,
}
"""Segmenters of plain text by name. ``regex:PATTERN`` cuts after, ``regex_before:PATTERN`` before every match; those
that need per-token signals are in :data:`~stepkd.steps.confidence.SIGNAL_SEGMENTERS`."""


def segmenter_settings(segmenter: Segmenter) -> dict[str, Any]:
    """What a segmenter does, as JSON values, for a job to record and compare.

    Args:
        segmenter: any; one that is no dataclass has no settings.

    Returns:
        Its fields by name, whatever file its threshold came from; empty where it has none.
    """
    return asdict(segmenter) if is_dataclass(segmenter) and not isinstance(segmenter, type) else {}


def get_segmenter(name: str) -> Segmenter:
    """Make a segmenter from its name in a recipe.

    Args:
        name: a key of :data:`SEGMENTERS`; ``regex:PATTERN`` or ``regex_before:PATTERN``; ``adaptive_step:THRESHOLD`` or
            ``entropy:THRESHOLD``, where the threshold is a number or a file saved by
            ``stepkd label``; ``reject`` or ``reject:PROBABILITY``.

    Raises:
        ConfigError: unknown name (with the nearest known one), a bad pattern, or a threshold missing, out of range or
            on another signal.
        DataError: a damaged threshold file.
    """
    kind, _, argument = name.partition(":")
    if kind in ("regex", "regex_before") and argument:
        return RegexSegmenter(argument, cut="after" if kind == "regex" else "before")
    if kind in SIGNAL_SEGMENTERS:
        return SIGNAL_SEGMENTERS[kind](argument)
    if name not in SEGMENTERS:
        hint = nearest(kind, (*SEGMENTERS, *SIGNAL_SEGMENTERS))
        known = (*SEGMENTERS, "regex:PATTERN", "adaptive_step:FILE_OR_NUMBER", "entropy:FILE_OR_NUMBER", "reject")
        raise ConfigError(f"unknown segmenter {name!r}.{hint} Known: {', '.join(known)}")
    return SEGMENTERS[name]()
