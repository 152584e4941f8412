"""Padded micro-batches against a naive loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.data.collate import MicroBatch, collate
from stepkd.data.encode import Example

PAD = 99


def example(name: str, prompt: int, steps: list[int], first: int = 1) -> Example:
    """A row of distinct ids: ``prompt`` prompt tokens, then steps of the given lengths."""
    ends = [sum(steps[: i + 1]) for i in range(len(steps))]
    spans = tuple((end - step, end) for end, step in zip(ends, steps, strict=True))
    ids = tuple(range(first, first + prompt + sum(steps)))
    return Example(name, ids[:prompt], ids[prompt:], spans)


ROWS = [example("a", 3, [2, 1]), example("b", 1, [4], 20), example("c", 5, [1, 1, 2], 40)]


def check(batch: MicroBatch, rows: list[Example], length: int, side: str) -> None:
    """Compare with one position at a time."""
    assert batch.input_ids_BT.shape == (len(rows), length) == batch.attention_mask_BT.shape
    flat = batch.input_ids_BT.flatten()
    needed, targets, row_of, step_of, steps_before = [], [], [], [], 0
    for b, row in enumerate(rows):
        tokens = [*row.prompt_ids, *row.completion_ids]
        start = length - len(tokens) if side == "left" else 0
        for t in range(length):
            inside = start <= t < start + len(tokens)
            assert batch.attention_mask_BT[b, t] == inside
            assert batch.input_ids_BT[b, t] == (tokens[t - start] if inside else PAD)
        for j, token in enumerate(row.completion_ids):
            needed.append(b * length + start + len(row.prompt_ids) + j - 1)
            targets.append(token)
            row_of.append(b)
            step_of.append(steps_before + next(s for s, (lo, hi) in enumerate(row.spans) if lo <= j < hi))
        steps_before += len(row.spans)
    assert batch.needed_N.tolist() == needed
    assert batch.targets_N.tolist() == targets
    assert batch.row_N.tolist() == row_of
    assert batch.step_N.tolist() == step_of
    assert batch.num_steps_B.tolist() == [len(row.spans) for row in rows]
    assert torch.equal(flat[batch.needed_N + 1], batch.targets_N), "the next position holds the target"
    assert batch.attention_mask_BT.flatten()[batch.needed_N].all(), "a state that predicts is never padding"
    assert batch.examples == tuple(rows)
    assert batch.ids == [row.id for row in rows]
    assert all(value.dtype == torch.int64 for value in vars(batch).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pad_to", [None, 3, 9, 14])
def test_against_a_naive_loop(side: Any, pad_to: int | None) -> None:
    batch = collate(ROWS, PAD, padding_side=side, pad_to=pad_to)
    check(batch, ROWS, max(9, pad_to or 0), side)
    assert not batch.is_filler


rows_strategy = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 4), max_size=4)), min_size=1, max_size=5
).map(lambda shapes: [example(f"r{i}", prompt, steps, 7 * i) for i, (prompt, steps) in enumerate(shapes)])


@given(rows_strategy, st.sampled_from(["right", "left"]), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_any_rows(rows: list[Example], side: Any, pad_to: int) -> None:
    length = max([row.length for row in rows] + [pad_to])
    check(collate(rows, PAD, padding_side=side, pad_to=pad_to), rows, length, side)


def test_prompts_without_completions() -> None:
    prompts = [example("p", 4, []), example("q", 2, [])]
    batch = collate(prompts, PAD, padding_side="left")
    check(batch, prompts, 4, "left")
    for name in ("needed_N", "targets_N", "row_N", "step_N"):
        assert getattr(batch, name).shape == (0,)
        assert getattr(batch, name).dtype == torch.int64


def test_to_moves_tensors_and_keeps_the_rest() -> None:
    batch = collate(ROWS, PAD, is_filler=True)
    moved = batch.to(torch.device("meta"))
    tensors = [name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7
    for name in tensors:
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(batch, name).shape
        assert getattr(batch, name).device.type == "cpu", "the original stays"
    assert moved.examples is batch.examples
    assert moved.is_filler
