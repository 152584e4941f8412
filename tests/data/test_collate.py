"""Padded micro-batches against a naive loop."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.data.collate import Batch, collate, plan
from stepkd.data.completion import Completion
from stepkd.data.feedback import PairExample
from stepkd.errors import ConfigError
from stepkd.steps.segment import spans_from_ends, step_ends

PAD = 99


def example(name: str, prompt: int, steps: list[int], first: int = 1) -> Completion:
    """A row of distinct ids: ``prompt`` prompt tokens, then steps of the given lengths."""
    ends = [sum(steps[: i + 1]) for i in range(len(steps))]
    ids = range(first, first + prompt + sum(steps))
    return Completion(ids[:prompt], ids[prompt:], ends, id=name)


ROWS = [example("a", 3, [2, 1]), example("b", 1, [4], 20), example("c", 5, [1, 1, 2], 40)]


def check(batch: Batch, rows: list[Completion], length: int, side: str) -> None:
    """Compare with one position at a time."""
    assert batch.input_ids_BT.shape == (len(rows), length) == batch.attention_mask_BT.shape
    flat = batch.input_ids_BT.flatten()
    needed, targets, row_of, step_of, steps_before = [], [], [], [], 0
    for b, row in enumerate(rows):
        tokens = [*row.prompt_ids, *row.token_ids]
        start = length - len(tokens) if side == "left" else 0
        for t in range(length):
            inside = start <= t < start + len(tokens)
            assert batch.attention_mask_BT[b, t] == inside
            assert batch.input_ids_BT[b, t] == (tokens[t - start] if inside else PAD)
        for j, token in enumerate(row.token_ids):
            needed.append(b * length + start + len(row.prompt_ids) + j - 1)
            targets.append(token)
            row_of.append(b)
            step_of.append(steps_before + next(s for s, (lo, hi) in enumerate(row.spans) if lo <= j < hi))
        steps_before += len(row.spans)
    assert batch.needed_N.tolist() == needed
    assert batch.targets_N.tolist() == targets
    assert batch.completion_N.tolist() == row_of
    assert batch.step_N.tolist() == step_of
    assert batch.completion_S.tolist() == [b for b, row in enumerate(rows) for _ in row.spans]
    assert torch.equal(flat[batch.needed_N + 1], batch.targets_N), "the next position holds the target"
    assert batch.attention_mask_BT.flatten()[batch.needed_N].all(), "a state that predicts is never padding"
    assert batch.examples == tuple(rows)
    assert batch.ids == [row.id for row in rows]
    assert batch.num_completions == len(rows)
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert tensors.pop("targets_LC").shape[0] == 0 == len(batch.read_L) == len(batch.step_L), "nothing is labelled"
    assert all(value.dtype == torch.int64 for value in tensors.values())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pad_to", [None, 3, 9, 14])
def test_against_a_naive_loop(side: Any, pad_to: int | None) -> None:
    batch = collate(ROWS, PAD, padding_side=side, pad_to=pad_to)
    check(batch, ROWS, max(9, pad_to or 0), side)
    assert not batch.is_dummy


rows_strategy = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 4), max_size=4)), min_size=1, max_size=5
).map(lambda shapes: [example(f"r{i}", prompt, steps, 7 * i) for i, (prompt, steps) in enumerate(shapes)])


@given(rows_strategy, st.sampled_from(["right", "left"]), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_any_rows(rows: list[Completion], side: Any, pad_to: int) -> None:
    length = max([row.length for row in rows] + [pad_to])
    check(collate(rows, PAD, padding_side=side, pad_to=pad_to), rows, length, side)


def test_prompts_without_completions() -> None:
    prompts = [example("p", 4, []), example("q", 2, [])]
    batch = collate(prompts, PAD, padding_side="left")
    check(batch, prompts, 4, "left")
    for name in ("needed_N", "targets_N", "completion_N", "step_N", "completion_S"):
        assert getattr(batch, name).shape == (0,)
        assert getattr(batch, name).dtype == torch.int64


def test_to_moves_tensors_and_keeps_the_rest() -> None:
    batch = collate(ROWS, PAD, is_dummy=True)
    moved = batch.to(torch.device("meta"))
    tensors = [name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 11
    for name in tensors:
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(batch, name).shape
        assert getattr(batch, name).device.type == "cpu", "the original stays"
    assert moved.examples is batch.examples
    assert moved.is_dummy


# ---- labels, pairs, and beginnings in common -----------------------------------------------------------------------


def labelled(name: str, targets: list[tuple[float, ...] | None], prompt: int = 3) -> Completion:
    """A solution of two tokens a step, each read at its last one."""
    spans = tuple((2 * i, 2 * i + 2) for i in range(len(targets)))
    ids = tuple(range(10, 10 + 2 * len(targets)))
    ends = step_ends(spans)
    read_at = tuple(end - 1 for end in ends)
    return Completion(
        np.arange(prompt), np.array(ids), np.array(ends), id=name, read_at=read_at, targets=tuple(targets)
    )


CORRECT, INCORRECT, EVEN = (0.0, 1.0), (1.0, 0.0), (0.5, 0.5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_labelled_step_knows_its_step_its_completion_and_its_place(side: Any) -> None:
    solutions = [
        labelled("a", [CORRECT, None, INCORRECT]),
        labelled("b", [None, CORRECT, None], prompt=1),
        labelled("c", [EVEN]),
    ]
    batch = collate(solutions, PAD, padding_side=side)
    assert batch.step_L.tolist() == [0, 2, 4, 6]
    assert batch.completion_L.tolist() == [0, 0, 1, 2]
    assert batch.targets_LC.tolist() == [list(CORRECT), list(INCORRECT), list(CORRECT), list(EVEN)]
    assert batch.targets_LC.dtype == torch.float64
    assert batch.input_ids_BT.flatten()[batch.read_L].tolist() == [11, 15, 13, 11], "the steps' last tokens"
    assert (batch.read_L // batch.input_ids_BT.shape[1]).tolist() == batch.completion_L.tolist()
    assert batch.correct_L.tolist() == [True, False, True, True], "a half is correct"
    assert batch.label_S.tolist() == [1, -1, 0, -1, 1, -1, 1]
    # A step without a label goes with the next label of its own completion; behind the last one nothing is correct.
    correct = [True, False, False, True, True, False, True]
    assert batch.correct_N.tolist() == [flag for flag in correct for _ in range(2)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_at_every_token_are_read_at_the_token_itself(side: Any) -> None:
    solutions = [labelled("a", [None, None, INCORRECT]), labelled("b", [None, CORRECT, None], prompt=1)]
    batch = collate(solutions, PAD, padding_side=side)
    every = batch.at_every_token()
    kept = batch.label_N >= 0
    assert batch.label_N.tolist() == [0] * 6 + [1] * 4 + [-1] * 2, "behind the last label nothing is learnt"
    assert batch.input_ids_BT.flatten()[every.read_L].tolist() == batch.targets_N[kept].tolist()
    assert every.targets_LC.tolist() == [list(INCORRECT)] * 6 + [list(CORRECT)] * 4
    assert every.completion_L.tolist() == [0] * 6 + [1] * 4
    assert every.step_L.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert every.correct_N.tolist() == batch.correct_N.tolist()
    assert set(batch.read_L.tolist()) <= set(every.read_L.tolist()), "the last token is one of them"
    assert not len(collate(ROWS, PAD).at_every_token().read_L)


def test_a_neutral_step_is_correct_and_an_incorrect_one_is_not() -> None:
    solution = labelled("a", [(0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)])
    batch = collate([solution], PAD)
    assert solution.step_labels == (1, 0, 1)
    assert batch.label_S.tolist() == [1, 0, 1]
    assert batch.correct_N.tolist() == [True, True, False, False, True, True]


def test_a_batch_without_a_label_has_no_correct_step() -> None:
    batch = collate(ROWS, PAD)
    assert not batch.correct_N.any()
    assert batch.label_S.tolist() == [-1] * len(batch.completion_S)
    assert batch.outcome_R.tolist() == [-1] * 3


def test_feedback_gives_outcomes_and_labels() -> None:
    ids: Any = (np.array([1, 2]), np.array([3, 4, 5]), np.array([1, 3]))
    read_at = (0, 2)
    completions = [
        Completion(*ids, outcome=1, targets=(CORRECT, INCORRECT), read_at=read_at),
        Completion(*ids, outcome=0, targets=(None, CORRECT), read_at=read_at),
        Completion(*ids, targets=(None, None), read_at=read_at),
    ]
    assert [each.step_labels for each in completions] == [(1, 0), (-1, 1), (-1, -1)]
    batch = collate(completions, PAD)
    assert batch.outcome_R.tolist() == [1, 0, -1]
    assert batch.label_S.tolist() == [1, 0, -1, 1, -1, -1]
    assert batch.completion_L.tolist() == [0, 0, 1]


def pair(prompt: tuple[int, ...], better: tuple[int, ...], worse: tuple[int, ...], name: str = "p") -> PairExample:
    return PairExample(prompt, better, id=name, rejected=Completion(prompt, worse))


def solution(prompt: tuple[int, ...], ids: tuple[int, ...], ends: tuple[int, ...] = (), name: str = "s") -> Completion:
    return Completion(prompt, ids, step_ends(spans_from_ends(ends, len(ids))), id=name)


@pytest.mark.parametrize(("side", "pad_to"), [("right", None), ("left", 9)])
def test_the_sides_of_a_pair_are_rows_that_share_what_they_begin_with(side: Any, pad_to: int | None) -> None:
    batch = collate([pair((1, 2), (3, 4, 7), (3, 5))], PAD, share=True, padding_side=side, pad_to=pad_to)
    width = pad_to or 5
    first, second = (0, width) if side == "right" else (width - 5, 2 * width - 4)
    assert batch.input_ids_BT.flatten()[first : first + 5].tolist() == [1, 2, 3, 4, 7]
    assert batch.input_ids_BT.flatten()[second : second + 4].tolist() == [1, 2, 3, 5]
    assert batch.completion_N.tolist() == [0, 0, 0, 1, 1]
    assert batch.needed_N.tolist() == [first + 1, first + 2, first + 3, second + 1, second + 2]
    assert batch.shared_BT is not None
    expected = list(range(2 * width))
    expected[second : second + 3] = range(first, first + 3)
    assert batch.shared_BT.flatten().tolist() == expected
    assert batch.ids == ["p"], "one example, two completions"
    assert batch.num_completions == 2


def test_only_rows_of_one_prompt_share() -> None:
    """Another prompt that begins alike is another problem; the first row of a prompt is the one that is taken over."""
    rows = [solution((1, 2), (3,)), solution((1, 2, 3), (4,)), solution((1, 2), (3, 4)), solution((1, 2), (5,))]
    batch = collate(rows, PAD, share=True)
    assert batch.shared_BT is not None
    assert batch.shared_BT.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 11], [0, 1, 14, 15]]
    assert collate(rows, PAD).shared_BT is None, "nobody asked for it"
    assert collate(rows[:2], PAD, share=True).shared_BT is None


prompts = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple)
own_ids = st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple)


@st.composite
def examples_of_few_prompts(draw: Any) -> list[Completion]:
    """Examples over a few prompts, all with one completion, or all with two."""
    few = draw(st.lists(prompts, min_size=1, max_size=3, unique=True))
    pairs = draw(st.booleans())
    found: list[Completion] = []
    for number in range(draw(st.integers(1, 12))):
        prompt = draw(st.sampled_from(few))
        if pairs:
            found.append(pair(prompt, draw(own_ids), draw(own_ids), str(number)))
        else:
            found.append(solution(prompt, draw(own_ids), draw(own_ids), str(number)))
    return found


@given(examples_of_few_prompts(), st.sampled_from(["right", "left"]), st.sampled_from([None, 40]))
@settings(max_examples=80, deadline=None)
def test_a_place_takes_over_a_state_only_where_everything_before_it_is_equal(
    examples: list[Completion], side: Any, pad_to: int | None
) -> None:
    batch = collate(examples, PAD, share=True, padding_side=side, pad_to=pad_to)
    plain = collate(examples, PAD, padding_side=side, pad_to=pad_to)
    for name, value in vars(plain).items():
        assert name == "shared_BT" or value is None or getattr(batch, name) is value or _equal(batch, plain, name), name
    if batch.shared_BT is None:
        assert len({each.prompt_ids.tobytes() for e in examples for each in e.completions}) == plain.num_completions
        return
    rows, width = batch.input_ids_BT.shape
    starts = (batch.attention_mask_BT.argmax(1)).tolist()
    sources = batch.shared_BT.tolist()
    for b in range(rows):
        for t in range(width):
            a, u = divmod(sources[b][t], width)
            if (a, u) == (b, t):
                continue
            assert sources[a][u] == a * width + u, "what is taken over is computed"
            assert a < b
            assert u - starts[a] == t - starts[b], "at its own position"
            own = batch.input_ids_BT[b, starts[b] : t + 1].tolist()
            assert own == batch.input_ids_BT[a, starts[a] : u + 1].tolist()
            assert batch.attention_mask_BT[b, t] == batch.attention_mask_BT[a, u] == 1


def _equal(a: Batch, b: Batch, name: str) -> bool:
    ours, theirs = getattr(a, name), getattr(b, name)
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


# ---- the plan -------------------------------------------------------------------------------------------------------


def computed(group: list[Completion], share: bool) -> int:
    """Tokens that the rows of a micro-batch cost, padding included, less what is read once."""
    completions: list[Completion] = [each for example in group for each in example.completions]
    cells = len(completions) * max(each.length for each in completions)
    prompts = [tuple(each.prompt_ids) for each in completions]
    again = sum(map(len, prompts)) - sum(map(len, set(prompts)))
    return cells - again * share


@given(examples_of_few_prompts(), st.integers(1, 60), st.booleans())
@settings(max_examples=200, deadline=None)
def test_no_example_is_lost_or_split_and_budgets_are_kept(
    examples: list[Completion], max_tokens: int, share: bool
) -> None:
    groups = plan(examples, max_tokens, share=share)
    planned = [example for group in groups for example in group]
    assert sorted(example.id for example in planned) == sorted(example.id for example in examples)
    for group in groups:
        assert computed(group, share) <= max_tokens or len(group) == 1, "only a single example may exceed it"
    first = max(each.length for example in groups[0] for each in example.completions)
    assert first == max(each.length for example in examples for each in example.completions), "the longest comes first"


@given(examples_of_few_prompts())
@settings(max_examples=60, deadline=None)
def test_examples_of_one_prompt_stay_together(examples: list[Completion]) -> None:
    planned = [tuple(example.prompt_ids) for group in plan(examples, 25, share=True) for example in group]
    changes = 1 + sum(a != b for a, b in pairwise(planned))
    assert changes == len(set(planned))


def test_a_prompt_with_more_than_a_micro_batch_holds_gets_several() -> None:
    examples = [solution((1,) * 10, (2,) * 5, name=str(i)) for i in range(9)]
    groups = plan(examples, 30, share=True)
    assert [len(group) for group in groups] == [4, 4, 1]
    assert len(plan(examples, 30)) == math.ceil(9 / 2)


def test_an_example_over_the_budget_stands_alone() -> None:
    large, small = solution((1,), (2,) * 50, name="l"), solution((1,), (3,), name="s")
    for order in ([large, small], [small, large]):
        for share in (True, False):
            groups = plan(order, 10, share=share)
            assert [[example.id for example in group] for group in groups] == [["l"], ["s"]]


def test_nothing_to_plan() -> None:
    assert plan([], 10, share=True) == [] == plan([], 10, share=False)
    with pytest.raises(ConfigError, match=r"micro_batch_tokens=0: must be at least 1"):
        plan([], 0)
