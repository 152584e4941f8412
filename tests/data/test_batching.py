"""Batches: every example once, the same on every rank and in every process, within the budget."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.data.batching import BatchPlan, Position, StepBatch, StepLoader, mismatched, rank_share
from stepkd.data.completion import Completion
from stepkd.errors import ConfigError

LENGTHS = np.random.default_rng(0).integers(5, 200, size=103).tolist()
lengths_lists = st.lists(st.integers(1, 50), min_size=1, max_size=40)
PLANS = [
    {"size": 8},
    {"size": 8, "shuffle": False},
    {"size": 1},
    {"size": 1000},
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_example_exactly_once_per_epoch(plan: dict[str, Any]) -> None:
    batches = BatchPlan(LENGTHS, **plan)
    for epoch in range(3):
        drawn = [i for batch in batches.batches(epoch) for i in batch]
        assert sorted(drawn) == list(range(len(LENGTHS)))
        assert all(batches.batches(epoch)), "no empty batch"
        assert len(batches.batches(epoch)) == batches.num_batches


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_same_key_same_plan(plan: dict[str, Any]) -> None:
    first, second = BatchPlan(LENGTHS, **plan), BatchPlan(LENGTHS, **plan)
    second.batches(0)  # what was asked before changes nothing
    assert first.batches(2) == second.batches(2)
    if plan.get("shuffle", True) and plan["size"] != 1000:
        assert first.batches(0) != first.batches(1)
        assert first.batches(0) != BatchPlan(LENGTHS, **plan, seed=1).batches(0)
    if not plan.get("shuffle", True):
        assert [i for batch in first.batches(1) for i in batch] == list(range(len(LENGTHS)))


def test_the_same_in_another_process() -> None:
    code = f"from stepkd.data.batching import BatchPlan; print(BatchPlan({LENGTHS}, size=300, seed=5).batches(7))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(BatchPlan(LENGTHS, size=300, seed=5).batches(7))


@given(lengths_lists, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_ranks_share_a_batch_without_repeats(lengths: list[int], world_size: int) -> None:
    batch = list(range(0, len(lengths), 2))
    shares = [rank_share(batch, lengths, rank, world_size) for rank in range(world_size)]
    assert sorted(i for share in shares for i in share) == batch
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert shares[0] == sorted(shares[0], key=lambda i: (lengths[i], i))


def test_ranks_get_similar_work() -> None:
    batch = list(range(64))
    work = [sum(LENGTHS[i] for i in rank_share(batch, LENGTHS, rank, 4)) for rank in range(4)]
    assert max(work) / min(work) < 1.15


@pytest.mark.parametrize(("rows", "full", "rest"), [(103, 12, 7), (96, 12, 0)])
def test_the_last_batch_may_be_smaller(rows: int, full: int, rest: int) -> None:
    plan = BatchPlan(LENGTHS[:rows], size=8)
    assert plan.num_batches == full + bool(rest)
    assert sorted(map(len, plan.batches(0)), reverse=True) == [8] * full + [rest] * bool(rest)


# ---- groups ---------------------------------------------------------------------------------------------------------

GROUPS = [i * 7 % 20 for i in range(len(LENGTHS))]


@pytest.mark.parametrize("plan", [{"size": 8}, {"size": 8, "shuffle": False}], ids=str)
def test_groups_stay_together(plan: dict[str, Any]) -> None:
    """A group lies in one piece of the epoch; only a batch's end can part it."""
    grouped = BatchPlan(LENGTHS, **plan, groups=GROUPS)
    for epoch in range(2):
        order = [i for batch in grouped.batches(epoch) for i in batch]
        assert sorted(order) == list(range(len(LENGTHS)))
        assert len(list(groupby(GROUPS[i] for i in order))) == 20
    assert grouped.batches(1) == BatchPlan(LENGTHS, **plan, groups=GROUPS).batches(1)
    if plan.get("shuffle", True):
        assert grouped.batches(0) != grouped.batches(1)
    else:
        members = [[i for i in range(len(LENGTHS)) if GROUPS[i] == g] for g in dict.fromkeys(GROUPS)]
        assert order == [i for group in members for i in group], "in the file's order"


def test_groups_of_one_change_nothing() -> None:
    alone = BatchPlan(LENGTHS, size=8, groups=list(range(len(LENGTHS))))
    assert alone.batches(3) == BatchPlan(LENGTHS, size=8).batches(3)
    batch = alone.batches(0)[0]
    groups = list(range(len(LENGTHS)))
    for rank in range(3):
        assert rank_share(batch, LENGTHS, rank, 3, groups) == rank_share(batch, LENGTHS, rank, 3)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), min_size=1, max_size=40), st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_ranks_share_whole_groups(examples: list[tuple[int, int]], world_size: int) -> None:
    lengths, groups = [length for length, _ in examples], [group for _, group in examples]
    batch = list(range(0, len(lengths), 2))[::-1]
    shares = [rank_share(batch, lengths, rank, world_size, groups) for rank in range(world_size)]
    assert sorted(i for share in shares for i in share) == sorted(batch)
    owners = {
        groups[i]: {rank for rank, share in enumerate(shares) for j in share if groups[j] == groups[i]} for i in batch
    }
    assert all(len(ranks) == 1 for ranks in owners.values())
    dealt = [len({groups[i] for i in share}) for share in shares]
    assert max(dealt) - min(dealt) <= 1
    assert shares == [rank_share(batch[::-1], lengths, rank, world_size, groups) for rank in range(world_size)]
    for share in shares:
        assert len(list(groupby(groups[i] for i in share))) == len({groups[i] for i in share})


# ---- mismatched pairs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 8])
def test_different_prompts_rotate_by_one(n: int) -> None:
    """Example i meets the completion of example i - 1."""
    assert mismatched([f"p{i}" for i in range(n)]) == [(i - 1) % n for i in range(n)]


@pytest.mark.parametrize(
    ("prompts", "partners"),
    [
        ("", []),
        ("a", [None]),
        ("aa", [None, None]),
        ("aaa", [None, None, None]),
        ("ab", [1, 0]),
        ("aab", [None, 2, 0]),
        ("aabb", [2, 3, 0, 1]),
        ("abab", [1, 0, 3, 2]),
        ("abca", [1, 0, 3, 2]),
    ],
)
def test_small_batches(prompts: str, partners: list[int | None]) -> None:
    assert mismatched(prompts) == partners


@given(st.lists(st.integers(0, 4), max_size=14))
@settings(max_examples=300, deadline=None)
def test_partners_have_other_prompts_and_serve_once(prompts: list[int]) -> None:
    """A bijection where the largest group allows one, and otherwise as many partners as there can be."""
    partners = mismatched(prompts)
    assert len(partners) == len(prompts)
    met = [partner for partner in partners if partner is not None]
    assert all(prompts[partner] != prompts[i] for i, partner in enumerate(partners) if partner is not None)
    assert len(set(met)) == len(met), "every completion serves at most once"
    largest = max(Counter(prompts).values(), default=0)
    rest = len(prompts) - largest
    assert len(met) == (len(prompts) if largest <= rest else 2 * rest)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.global_batch_size=0: must be at least 1"):
        BatchPlan(LENGTHS, size=0)


# ---- the loader ----------------------------------------------------------------------------------------------------


EXAMPLES = [Completion((1,) * (1 + i * 7 % 11), (2, 3), id=f"e{i}") for i in range(23)]
LENGTHS_OF_LOADER = [example.length for example in EXAMPLES]
START = Position()
PLANS_OF_LOADER: list[dict[str, Any]] = [{"size": 4}, {"size": 5, "groups": [i // 2 for i in range(23)]}]


def loader(position: Position | Callable[[], Position] = START, plan: Any = None, **settings: Any) -> StepLoader:
    where = position if callable(position) else lambda: position
    return StepLoader(EXAMPLES, BatchPlan(LENGTHS_OF_LOADER, **(plan or {"size": 4})), position=where, **settings)


def uninterrupted(plan: dict[str, Any], epochs: int = 3) -> list[StepBatch]:
    return [batch for epoch in range(epochs) for batch in loader(Position(epoch), plan)]


@pytest.mark.parametrize("plan", PLANS_OF_LOADER, ids=str)
def test_resume_at_any_position_goes_on_exactly(plan: dict[str, Any]) -> None:
    whole = uninterrupted(plan)
    for cut in range(len(whole) - 1):
        position = whole[cut].next_position
        rest: list[StepBatch] = []
        while position.epoch < 3:
            rest += loader(position, plan)
            position = rest[-1].next_position
        assert whole[: cut + 1] + rest == whole


@pytest.mark.parametrize("plan", PLANS_OF_LOADER, ids=str)
def test_positions(plan: dict[str, Any]) -> None:
    positions = [Position(), *(batch.next_position for batch in uninterrupted(plan))]
    for before, after in pairwise(positions):
        assert after in (Position(before.epoch, before.batch + 1), Position(before.epoch + 1, 0))
    assert positions[-1] == Position(3, 0)


@pytest.mark.parametrize(("limit", "batches"), [(2, 2), (0.5, 3), (1, 1), (1.0, 6), (99, 6)])
def test_a_limited_pass_ends_early_and_the_next_starts_afresh(limit: float, batches: int) -> None:
    first = list(loader(limit=limit))
    assert first == [*loader()][: batches - 1] + first[-1:]
    assert len(first) == batches
    assert first[-1].next_position == Position(1, 0)
    assert len(list(loader(Position(0, batches - 1), limit=limit))) == 1, "resumed within it"


def test_iteration_reads_the_position_each_time() -> None:
    where = [Position(0, 0)]
    batches = loader(lambda: where[0])
    first = next(iter(batches))
    assert next(iter(batches)) == first, "taking a batch does not move the position: training on it does"
    where[0] = first.next_position
    assert next(iter(batches)) != first


@pytest.mark.parametrize("plan", PLANS_OF_LOADER, ids=str)
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_union_over_ranks_is_the_batch(plan: dict[str, Any], world_size: int) -> None:
    ranks = [list(loader(plan=plan, rank=rank, world_size=world_size)) for rank in range(world_size)]
    alone = list(loader(plan=plan))
    assert {len(batches) for batches in ranks} == {len(alone)}
    for shares, whole in zip(zip(*ranks, strict=True), alone, strict=True):
        assert sorted(i for share in shares for i in share.indices) == sorted(whole.indices)
        assert {share.next_position for share in shares} == {whole.next_position}
        for share in shares:
            assert share.examples == tuple(EXAMPLES[i] for i in share.indices)


@pytest.mark.parametrize("groups", [None, [i // 3 for i in range(23)]], ids=["alone", "in groups"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])
def test_every_rank_knows_its_peers(world_size: int, groups: list[int] | None) -> None:
    """All ranks see the whole batch in one order, and where their own examples stand in it."""
    plan = {"size": 4, "groups": groups}
    ranks = [list(loader(plan=plan, rank=rank, world_size=world_size)) for rank in range(world_size)]
    batches = BatchPlan(LENGTHS_OF_LOADER, **plan).batches(0)  # type: ignore[arg-type]
    for numbers, shares in zip(batches, zip(*ranks, strict=True), strict=True):
        for share in shares:
            assert share.peers == tuple(EXAMPLES[i] for i in numbers)
            assert tuple(share.peers[place] for place in share.places) == share.examples
            assert tuple(numbers[place] for place in share.places) == share.indices
        assert sorted(place for share in shares for place in share.places) == list(range(len(numbers)))
        if groups is not None:
            owners = [{groups[i] for i in share.indices} for share in shares]
            assert sum(map(len, owners)) == len(set().union(*owners)), "a group is one rank's"


def test_peers_go_on_where_the_run_was_cut() -> None:
    whole = list(loader(plan={"size": 4}, rank=1, world_size=3))
    rest = list(loader(Position(0, 2), {"size": 4}, rank=1, world_size=3))
    assert [(b.peers, b.places) for b in rest] == [(b.peers, b.places) for b in whole[2:]]


def test_a_batch_smaller_than_the_world_leaves_ranks_empty() -> None:
    shares = [next(iter(loader(plan={"size": 2}, rank=rank, world_size=5))) for rank in range(5)]
    assert sorted(len(share.examples) for share in shares) == [0, 0, 0, 1, 1]
    assert {share.dummy for share in shares} == {min(EXAMPLES, key=lambda e: (e.length, e.id))}


def test_length() -> None:
    assert len(loader()) == 6


def test_state_is_the_position() -> None:
    assert loader(Position(2, 3)).state_dict() == {"epoch": 2, "batch": 3}


def test_a_position_beyond_the_epoch_is_refused() -> None:
    # A batch size that has changed since the checkpoint; yielding nothing would loop for ever.
    with pytest.raises(ConfigError, match=r"before batch 6 of epoch 1, .* only 6 batches: resume with the data and"):
        next(iter(loader(Position(1, 6))))
