"""Step spans: half-open token ranges that partition a completion exactly.

A span is a ``(start, end)`` pair of token indices counted from the first completion token. The spans of one completion
are in order, are never empty, and cover every token once. Everything in stepkd that speaks of a step (labels, losses,
search, evaluation) uses these spans, so a step means the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

Span = tuple[int, int]


class TruncatedSpans(NamedTuple):
    """Result of :func:`truncate_spans`."""

    spans: list[Span]
    """The spans that fit."""
    num_dropped: int
    """How many whole steps were dropped."""


def check_partition(spans: Sequence[Span], num_tokens: int) -> None:
    """Assert that ``spans`` partition ``range(num_tokens)``.

    Raises:
        ValueError: a gap, an overlap, an empty span, or a wrong total length; the message names the span.
    """
    cursor = 0
    for i, (start, end) in enumerate(spans):
        if start != cursor or end <= start:
            raise ValueError(f"step {i} spans tokens [{start}, {end}) but must be non-empty and start at {cursor}")
        cursor = end
    if cursor != num_tokens:
        raise ValueError(f"the steps cover {cursor} tokens, the completion has {num_tokens}")


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
    """Exclusive end of every step: the form in which rollout rows store spans."""
    return [end for _, end in spans]


def step_index(spans: Sequence[Span]) -> list[int]:
    """Step number of every token, a list of length ``spans[-1][1]``."""
    return [i for i, (start, end) in enumerate(spans) for _ in range(start, end)]


def truncate_spans(spans: Sequence[Span], max_tokens: int) -> TruncatedSpans:
    """Keep the leading steps that fit into ``max_tokens``; a step is kept whole or dropped.

    Args:
        spans: a partition as made by a segmenter.
        max_tokens: budget in tokens, >= 0.

    Returns:
        The kept spans and the number of dropped steps. The caller counts and reports the drops.
    """
    kept = [span for span in spans if span[1] <= max_tokens]
    return TruncatedSpans(kept, len(spans) - len(kept))


def first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading ids that two completions of one prompt share.

    MCTS-DPO (Xie et al. 2024, arXiv 2405.00451) takes its loss from there on. Shared leading tokens have the same
    context on both sides, so their log-ratios cancel in DPO's difference; leaving them out changes length-normalised
    ratios and the rewards that are logged.
    """
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
