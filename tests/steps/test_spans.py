"""Spans: closed form, then properties, then bad input."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepkd.steps import check_partition, spans_from_ends, step_ends, step_index, truncate_spans


def test_closed_form() -> None:
    spans = spans_from_ends([3, 5], 9)
    assert spans == [(0, 3), (3, 5), (5, 9)]
    assert step_ends(spans) == [3, 5, 9]
    assert step_index(spans) == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert spans_from_ends([], 4) == [(0, 4)]
    assert spans_from_ends([1, 2], 0) == []
    assert step_ends([]) == []
    assert step_index([]) == []


@given(st.lists(st.integers(-3, 30)), st.integers(0, 25))
def test_any_ends_make_a_partition(ends: list[int], num_tokens: int) -> None:
    spans = spans_from_ends(ends, num_tokens)
    check_partition(spans, num_tokens)
    assert [i for start, end in spans for i in range(start, end)] == list(range(num_tokens))
    assert spans_from_ends(step_ends(spans), num_tokens) == spans
    assert len(step_index(spans)) == num_tokens
    assert set(step_ends(spans)) == ({end for end in ends if 0 < end < num_tokens} | {num_tokens}) - {0}


@given(st.lists(st.integers(1, 30)), st.integers(1, 25), st.integers(0, 30))
def test_truncation_keeps_whole_steps_only(ends: list[int], num_tokens: int, budget: int) -> None:
    spans = spans_from_ends(ends, num_tokens)
    kept, dropped = truncate_spans(spans, budget)
    assert kept == spans[: len(kept)]
    assert len(kept) + dropped == len(spans)
    assert not kept or kept[-1][1] <= budget
    if dropped:
        assert spans[len(kept)][1] > budget
        check_partition(kept, kept[-1][1] if kept else 0)


def test_truncation_at_a_step_end_keeps_the_step() -> None:
    spans = [(0, 3), (3, 5), (5, 9)]
    assert truncate_spans(spans, 5) == ([(0, 3), (3, 5)], 1)
    assert truncate_spans(spans, 4) == ([(0, 3)], 2)
    assert truncate_spans(spans, 2) == ([], 3)
    assert truncate_spans(spans, 9) == (spans, 0)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 3), (4, 9)], "step 1 spans tokens [4, 9) but must be non-empty and start at 3"),
        ([(0, 3), (2, 9)], "step 1 spans tokens [2, 9) but must be non-empty and start at 3"),
        ([(0, 3), (3, 3)], "step 1 spans tokens [3, 3) but must be non-empty and start at 3"),
        ([(1, 9)], "step 0 spans tokens [1, 9) but must be non-empty and start at 0"),
        ([(0, 8)], "the steps cover 8 tokens, the completion has 9"),
        ([], "the steps cover 0 tokens, the completion has 9"),
    ],
)
def test_what_is_not_a_partition(spans: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_partition(spans, 9)
