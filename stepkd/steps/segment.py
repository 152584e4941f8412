"""Segmenters: where one step ends and the next begins.

A segmenter looks at one :class:`~stepkd.steps.text.TokenizedText` and returns exclusive token ends. Delimiter
segmenters find boundaries in the text and map them to tokens: separators belong to the step before them, a token that
straddles a boundary belongs to the earlier step, and white space alone is never a step. Confidence-based segmenters
(AdaptiveStep) use the same interface and read ``logprobs``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol, runtime_checkable

from stepkd.errors import ConfigError
from stepkd.steps.spans import Span, check_partition, spans_from_ends
from stepkd.steps.text import TokenizedText


@runtime_checkable
class Segmenter(Protocol):
    """Anything that can cut a completion into steps."""

    def ends(self, completion: TokenizedText) -> list[int]:
        """Exclusive token ends of the steps; the end of the completion may be left out."""
        ...


def segment(segmenter: Segmenter, completion: TokenizedText) -> list[Span]:
    """Cut ``completion`` into steps.

    Returns:
        Half-open token spans that partition the completion exactly (checked); no tokens give no spans.
    """
    spans = spans_from_ends(segmenter.ends(completion), len(completion))
    check_partition(spans, len(completion))
    return spans


@dataclass(frozen=True)
class RegexSegmenter:
    """Cut at every match of a pattern.

    Args:
        pattern: Python regular expression, multi-line mode.
        cut: ``"after"`` puts the match at the end of the step before it (a separator), ``"before"`` at the start of the
            next step (a heading such as ``Step 2:``).
    """

    pattern: str
    cut: str = "after"

    def __post_init__(self) -> None:
        if self.cut not in ("after", "before"):
            raise ConfigError(f"segmenter cut={self.cut!r}: must be 'after' or 'before'")
        try:
            compiled = re.compile(self.pattern, re.MULTILINE)
        except re.error as error:
            raise ConfigError(f"segmenter pattern {self.pattern!r} is not a regular expression: {error}") from error
        if compiled.match(""):
            raise ConfigError(f"segmenter pattern {self.pattern!r} matches the empty string and would cut everywhere")

    def ends(self, completion: TokenizedText) -> list[int]:
        """See :class:`Segmenter`."""
        text = completion.text
        kept, last = [], 0
        for boundary in self._boundaries(text):
            # White space alone is no step: it stays with the step before it, or opens the first one.
            if text[last:boundary].strip() and text[boundary:].strip():
                kept.append(boundary)
                last = boundary
        return [completion.token_end(boundary) for boundary in kept]

    def _boundaries(self, text: str) -> Iterator[int]:
        for match in re.finditer(self.pattern, text, re.MULTILINE):
            yield match.end() if self.cut == "after" else match.start()


_ABBREVIATIONS = ("mr", "mrs", "ms", "dr", "prof", "st", "vs", "etc", "e.g", "i.e", "cf", "eq", "fig", "no", "approx")


@dataclass(frozen=True)
class SentenceSegmenter:
    """Cut after sentences: ``.``, ``!`` or ``?`` (closing quotes included) before white space, and at line ends.

    The space between two sentences goes to the second one, because byte-level BPE glues it to the word that follows.
    Decimal points, enumerations such as ``1.`` at a line's start and common abbreviations do not end a sentence.
    """

    def ends(self, completion: TokenizedText) -> list[int]:
        """See :class:`Segmenter`."""
        text = completion.text
        kept, last = [], 0
        for match in re.finditer(r"[.!?]+[\"')\]]*(?:[ \t\r]*\n\s*|(?=\s))|\n\s*", text):
            sentence = text[last : match.end()]
            body = sentence.strip()
            if not body or not text[match.end() :].strip():
                continue
            if "\n" not in match.group() and body.endswith("."):
                word = body[:-1].split()[-1].lower() if body[:-1].split() else ""
                if word in _ABBREVIATIONS or (word.isdigit() and len(body.split()) == 1):
                    continue
            kept.append(match.end())
            last = match.end()
        return [completion.token_end(boundary) for boundary in kept]


@dataclass(frozen=True)
class WholeSegmenter:
    """One step per completion: outcome supervision as a special case of step supervision."""

    def ends(self, completion: TokenizedText) -> list[int]:
        """See :class:`Segmenter`."""
        return []


SEGMENTERS: dict[str, Callable[[], Segmenter]] = {
    "newline": lambda: RegexSegmenter(r"(?:[ \t\r]*\n)+"),
    "blank_line": lambda: RegexSegmenter(r"\n[ \t\r]*\n(?:[ \t\r]*\n)*"),
    "step_heading": lambda: RegexSegmenter(r"^[ \t]*(?:[#*]+[ \t]*)?(?i:step)[ \t]+\d+\b", cut="before"),
    "sentence": SentenceSegmenter,
    "whole": WholeSegmenter,
}
"""Segmenters by name. ``regex:PATTERN`` cuts after, ``regex_before:PATTERN`` before every match."""


def get_segmenter(name: str) -> Segmenter:
    """Make a segmenter from its name in a recipe.

    Args:
        name: a key of :data:`SEGMENTERS`, or ``regex:PATTERN`` / ``regex_before:PATTERN``.

    Raises:
        ConfigError: unknown name (with the nearest known one) or a bad pattern.
    """
    kind, _, pattern = name.partition(":")
    if kind in ("regex", "regex_before") and pattern:
        return RegexSegmenter(pattern, cut="after" if kind == "regex" else "before")
    if name not in SEGMENTERS:
        near = get_close_matches(name, SEGMENTERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown segmenter {name!r}.{hint} Known: {', '.join(SEGMENTERS)}, regex:PATTERN")
    return SEGMENTERS[name]()
