"""Padded micro-batches against a naive loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.data.collate import MicroBatch, Pack, PackedBatch, Unit, collate, collate_packed, plan_packs
from stepkd.data.completion import Completion
from stepkd.data.encode import Example
from stepkd.steps.segment import spans_from_ends, step_ends

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


# ---- packed rows ---------------------------------------------------------------------------------------------------


def completion(prompt: tuple[int, ...], ids: tuple[int, ...], ends: tuple[int, ...] = ()) -> Completion:
    return Completion(prompt, ids, step_ends(spans_from_ends(ends, len(ids))))


def unit(*completions: Completion, name: str = "u") -> Unit:
    first = completions[0]
    return Unit(
        Example(name, tuple(first.prompt_ids.tolist()), tuple(first.token_ids.tolist()), first.spans), completions
    )


PACKS: list[Pack] = [
    [unit(completion((1, 2, 3), (11, 12, 13), (1,)), name="a"), unit(completion((1, 2, 3), (21,)), name="b")],
    [unit(completion((5,), (31, 32), (1,)), name="c")],
]


# ---- one batch written out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "pad_to"), [("right", None), ("right", 9), ("left", None), ("left", 9)])
def test_a_batch_written_out(side: Any, pad_to: int | None) -> None:
    batch = collate_packed(PACKS, PAD, padding_side=side, pad_to=pad_to)
    width = pad_to or 7

    def padded(row: list[int], value: int) -> list[int]:
        padding = [value] * (width - len(row))
        return [*padding, *row] if side == "left" else [*row, *padding]

    assert batch.input_ids_BT.tolist() == [
        padded([1, 2, 3, 11, 12, 13, 21], PAD),
        padded([5, 31, 32], PAD),
    ]
    assert batch.attention_mask_BT.tolist() == [padded([1] * 7, 0), padded([1] * 3, 0)]
    assert batch.position_ids_BT.tolist() == [padded([0, 1, 2, 3, 4, 5, 3], 0), padded([0, 1, 2], 0)]
    assert batch.segments_BT is not None
    assert batch.segments_BT.tolist() == [padded([0, 0, 0, 1, 1, 1, 2], -1), padded([0, 1, 1], -1)]
    first = width - 7 if side == "left" else 0
    second = width + (width - 3 if side == "left" else 0)
    assert batch.needed_N.tolist() == [first + 2, first + 3, first + 4, first + 2, second, second + 1]
    assert batch.targets_N.tolist() == [11, 12, 13, 21, 31, 32]
    assert batch.row_N.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.step_N.tolist() == [0, 1, 1, 2, 3, 4]
    assert batch.completion_S.tolist() == [0, 0, 1, 2, 2]
    assert batch.num_steps_B.tolist() == [2, 1, 2]
    assert batch.num_completions == 3
    assert batch.ids == ["a", "b", "c"]


def test_the_sides_of_a_pair_are_completions_of_their_own() -> None:
    pair = unit(completion((1, 2), (3, 4)), completion((1, 2), (5,)))
    for share, shape in ((True, (1, 5)), (False, (2, 4))):
        batch = collate_packed([[pair]], PAD, share=share)
        assert tuple(batch.input_ids_BT.shape) == shape
        assert batch.row_N.tolist() == [0, 0, 1]
        assert batch.num_completions == 2
        assert batch.ids == ["u"], "one example, two completions"


def test_filler_and_devices() -> None:
    batch = collate_packed(PACKS, PAD, is_filler=True)
    assert batch.is_filler
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, PackedBatch)
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 10
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.reference_N is None


prompts = st.lists(st.integers(0, 50), min_size=1, max_size=4).map(tuple)
own_ids = st.lists(st.integers(0, 50), min_size=1, max_size=5).map(tuple)


@st.composite
def rows_of_units(draw: Any) -> list[Unit]:
    """Units over a few prompts, all with one completion, or all with two."""
    few = draw(st.lists(prompts, min_size=1, max_size=3, unique=True))
    size = draw(st.integers(1, 2))
    units = []
    for number in range(draw(st.integers(1, 12))):
        prompt = draw(st.sampled_from(few))
        completions = [completion(prompt, draw(own_ids), draw(own_ids)) for _ in range(size)]
        units.append(unit(*completions, name=str(number)))
    return units


@given(rows_of_units(), st.sampled_from(["right", "left"]), st.sampled_from([None, 40]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_every_target_is_predicted_by_the_token_before_it(
    units: list[Unit], side: Any, pad_to: int | None, share: bool
) -> None:
    packs = [pack for group in plan_packs(units, 10_000, share=share) for pack in group]
    batch = collate_packed(packs, PAD, share=share, padding_side=side, pad_to=pad_to)
    wanted = [each for pack in packs for member in pack for each in member.completions]
    assert batch.num_completions == len(wanted)
    flat, positions = batch.input_ids_BT.flatten().tolist(), batch.position_ids_BT.flatten().tolist()
    step, at = 0, 0
    for number, each in enumerate(wanted):
        size = len(each.token_ids)
        window = slice(at, at + size)
        needed = batch.needed_N[window].tolist()
        assert batch.targets_N[window].tolist() == each.token_ids.tolist()
        assert set(batch.row_N[window].tolist()) == {number}
        assert [flat[i] for i in needed] == [each.prompt_ids[-1], *each.token_ids[:-1]]
        assert [positions[i] for i in needed] == list(range(len(each.prompt_ids) - 1, each.length - 1))
        lengths = [sum(batch.step_N[window] == step + s).item() for s in range(len(each.spans))]  # type: ignore[attr-defined]
        assert lengths == [high - low for low, high in each.spans]
        assert batch.completion_S[step : step + len(each.spans)].tolist() == [number] * len(each.spans)
        assert batch.num_steps_B[number] == len(each.spans)
        at, step = at + size, step + len(each.spans)
    assert at == len(batch.needed_N) == len(batch.targets_N)
    assert step == len(batch.completion_S)
    used = int(batch.attention_mask_BT.sum())
    assert used == sum(len(row[0].prompt_ids) + sum(len(each.token_ids) for each in row) for row in _rows(packs, share))
    if batch.segments_BT is not None:
        assert ((batch.segments_BT >= 0) == batch.attention_mask_BT.bool()).all()


def _rows(packs: list[Pack], share: bool) -> list[list[Completion]]:
    rows = [[each for member in pack for each in member.completions] for pack in packs]
    return rows if share else [[each] for row in rows for each in row]


@pytest.mark.parametrize("side", ["right", "left"])
def test_single_completions_are_plain_rows(side: Any) -> None:
    """Nothing is shared, so no mask is needed, and the tensors are those of supervised training."""
    units = [unit(completion((1, 2, 3), (4, 5), (1,))), unit(completion((6,), (7,))), unit(completion((1, 2, 3), (8,)))]
    packed = collate_packed([[each] for each in units], PAD, padding_side=side, pad_to=8)
    plain = collate([each.example for each in units], PAD, padding_side=side, pad_to=8)
    assert packed.segments_BT is None
    for name in ("input_ids_BT", "attention_mask_BT", "needed_N", "targets_N", "row_N", "step_N", "num_steps_B"):
        assert torch.equal(getattr(packed, name), getattr(plain, name)), name
    apart = collate_packed([[units[0], units[2]], [units[1]]], PAD, share=False, padding_side=side, pad_to=8)
    assert apart.segments_BT is None, "packs without sharing are rows of their own"
    assert apart.num_completions == 3


# ---- the plan -------------------------------------------------------------------------------------------------------


@given(rows_of_units(), st.integers(1, 60), st.booleans())
@settings(max_examples=200, deadline=None)
def test_no_unit_is_lost_or_split_and_budgets_are_kept(units: list[Unit], max_tokens: int, share: bool) -> None:
    groups = plan_packs(units, max_tokens, share=share)
    planned = [member for group in groups for pack in group for member in pack]
    assert sorted(member.example.id for member in planned) == sorted(each.example.id for each in units)
    assert {id(member) for member in planned} == {id(each) for each in units}
    sizes = []
    for group in groups:
        assert group
        for pack in group:
            assert len({each.prompt_ids.tobytes() for member in pack for each in member.completions}) == 1
            assert share or len(pack) == 1
        cells = collate_packed(group, PAD, share=share).input_ids_BT.numel()
        assert cells <= max_tokens or (len(group) == 1 and len(group[0]) == 1), "only a single unit may exceed it"
        sizes.append(collate_packed(group, PAD, share=share).input_ids_BT.shape[1])
    if share or len(units[0].completions) == 1:
        assert sizes == sorted(sizes, reverse=True), "the largest comes first"


@given(rows_of_units())
@settings(max_examples=60, deadline=None)
def test_equal_prompts_share_a_row_where_they_fit(units: list[Unit]) -> None:
    (group,) = plan_packs(units, 10_000, share=True)
    assert len(group) == len({each.completions[0].prompt_ids.tobytes() for each in units})
    for pack in group:
        names = [int(member.example.id) for member in pack]
        assert names == sorted(names), "in the given order"
    read = sum(_tokens(group, share=True))
    apart = sum(_tokens(plan_packs(units, 10_000, share=False)[0], share=False))
    repeats = sum(
        len(pack[0].completions[0].prompt_ids) * (sum(len(m.completions) for m in pack) - 1) for pack in group
    )
    assert apart - read == repeats, "a prompt is read once"


def _tokens(packs: list[Pack], share: bool) -> list[int]:
    return [len(row[0].prompt_ids) + sum(len(each.token_ids) for each in row) for row in _rows(packs, share)]


def test_a_prompt_with_more_than_a_row_holds_gets_more_rows() -> None:
    units = [unit(completion((1,) * 10, (2,) * 5), name=str(i)) for i in range(9)]
    groups = plan_packs(units, 30, share=True)
    packs = [pack for group in groups for pack in group]
    assert [len(pack) for pack in packs] == [4, 4, 1]
    assert sorted(int(member.example.id) for pack in packs for member in pack) == list(range(9))
    assert len(plan_packs(units, 30, share=False)) == math.ceil(9 / 2)


def test_a_unit_over_the_budget_stands_alone() -> None:
    large, small = unit(completion((1,), (2,) * 50), name="l"), unit(completion((1,), (3,)), name="s")
    for order in ([large, small], [small, large]):
        for share in (True, False):
            groups = plan_packs(order, 10, share=share)
            assert [[member.example.id for pack in group for member in pack] for group in groups] == [["l"], ["s"]]


def test_nothing_to_plan() -> None:
    assert plan_packs([], 10, share=True) == [] == plan_packs([], 10, share=False)
