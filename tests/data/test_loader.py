"""The loader resumes at any position and gives every rank its share."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from stepkd.data.batching import BatchPlan, Position, StepBatch, StepLoader
from stepkd.data.encode import Example
from stepkd.errors import ConfigError

EXAMPLES = [Example(f"e{i}", (1,) * (1 + i * 7 % 11), (2, 3), ((0, 2),)) for i in range(23)]
LENGTHS = [example.length for example in EXAMPLES]
START = Position()
PLANS: list[dict[str, Any]] = [{"size": 4}, {"size": 20, "unit": "tokens"}]


def loader(position: Position | Callable[[], Position] = START, plan: Any = None, **settings: Any) -> StepLoader:
    where = position if callable(position) else lambda: position
    return StepLoader(EXAMPLES, BatchPlan(LENGTHS, **(plan or {"size": 4})), position=where, **settings)


def uninterrupted(plan: dict[str, Any], epochs: int = 3) -> list[StepBatch]:
    return [batch for epoch in range(epochs) for batch in loader(Position(epoch), plan)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_resume_at_any_position_goes_on_exactly(plan: dict[str, Any]) -> None:
    whole = uninterrupted(plan)
    for cut in range(len(whole) - 1):
        position = whole[cut].next_position
        rest: list[StepBatch] = []
        while position.epoch < 3:
            rest += loader(position, plan)
            position = rest[-1].next_position
        assert whole[: cut + 1] + rest == whole


@pytest.mark.parametrize("plan", PLANS, ids=str)
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


@pytest.mark.parametrize("plan", PLANS, ids=str)
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
    batches = BatchPlan(LENGTHS, **plan).batches(0)  # type: ignore[arg-type]
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
    assert {share.filler for share in shares} == {min(EXAMPLES, key=lambda e: (e.length, e.id))}


def test_length() -> None:
    assert len(loader()) == 6
    with pytest.raises(TypeError, match="their number is known only epoch by epoch"):
        len(loader(plan={"size": 20, "unit": "tokens"}))


def test_state_is_the_position() -> None:
    assert loader(Position(2, 3)).state_dict() == {"epoch": 2, "batch": 3}


def test_a_position_beyond_the_epoch_is_refused() -> None:
    # A batch size that has changed since the checkpoint; yielding nothing would loop for ever.
    with pytest.raises(ConfigError, match=r"before batch 6 of epoch 1, .* only 6 batches: resume with the data and"):
        next(iter(loader(Position(1, 6))))
