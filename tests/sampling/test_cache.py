"""The cache with room to grow holds what transformers' own would."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from stepkd.sampling.cache import LEAST_ROOM, RoomyLayer, close_up, make_room, room_for


def columns(width: int, rows: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, 2, width, 4, generator=draw)
    return keys, values


def filled(width: int, rows: int = 3) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(*columns(width, rows, seed=layer), layer)
    return cache


def both(width: int, rows: int = 3) -> tuple[Any, Any]:
    plain, roomy = filled(width, rows), filled(width, rows)
    make_room(roomy)
    assert all(type(layer) is RoomyLayer for layer in roomy.layers)
    return plain, roomy


@pytest.mark.parametrize("width", [1, 5, 3 * LEAST_ROOM])
def test_grows_like_the_plain_one(width: int) -> None:
    """Past several rooms, by one column and by several, with rows that leave in between."""
    plain, roomy = both(width)
    rows, moved = 3, 0
    for step in range(3 * LEAST_ROOM):
        if step == LEAST_ROOM:
            for cache in (plain, roomy):
                cache.batch_select_indices(torch.tensor([2, 0]))
            rows = 2
        for layer in range(2):
            new = columns(1 + 2 * (step % 7 == 3), rows, seed=step * 2 + layer)
            before = roomy.layers[layer].keys.data_ptr()
            for ours, theirs in zip(roomy.update(*new, layer), plain.update(*new, layer), strict=True):
                assert torch.equal(ours, theirs)
            moved += roomy.layers[layer].keys.data_ptr() != before
        assert roomy.get_seq_length() == plain.get_seq_length()
    assert 0 < moved < 2 * 12  # not at every column


@pytest.mark.parametrize(("prompt", "total"), [(1, 200), (40, 300), (7, 8)])
def test_it_is_at_most_a_quarter_and_a_little_larger_than_needed(prompt: int, total: int) -> None:
    _, roomy = both(prompt)
    for step in range(total - prompt):
        roomy.update(*columns(1, seed=step), 0)
    assert total <= roomy.layers[0]._rooms[0].shape[-2] <= 1.25 * total + LEAST_ROOM


@pytest.mark.parametrize("width", [1, 5, 3 * LEAST_ROOM])
def test_whole_rooms_hold_the_columns_and_zeros_behind_them(width: int) -> None:
    plain, whole = filled(width), filled(width)
    assert make_room(whole, whole=True)
    for step in range(2 * LEAST_ROOM):
        new = columns(1, seed=step)
        for ours, theirs in zip(whole.update(*new, 0), plain.update(*new, 0), strict=True):
            columns_now = theirs.shape[-2]
            assert ours.is_contiguous()
            assert ours.shape[-2] == room_for(columns_now) >= columns_now
            assert torch.equal(ours[..., :columns_now, :], theirs)
            assert not ours[..., columns_now:, :].any()
        assert whole.get_seq_length() == plain.get_seq_length()


def test_a_copy_has_room_of_its_own() -> None:
    _, roomy = both(4)
    roomy.update(*columns(1), 0)
    other = copy.deepcopy(roomy)
    kept = roomy.layers[0].keys.clone()
    other.update(*columns(1, seed=5), 0)
    roomy.update(*columns(1, seed=6), 0)
    assert torch.equal(roomy.layers[0].keys[..., :5, :], kept)
    assert torch.equal(roomy.layers[0].keys[..., 5:, :], columns(1, seed=6)[0])
    assert torch.equal(other.layers[0].keys[..., 5:, :], columns(1, seed=5)[0])


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), 3),
        (lambda cache: cache.batch_repeat_interleave(2), 6),
        (lambda cache: cache.crop(-2), 3),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), 1),
    ],
)
def test_rows_that_something_else_moves(change: Any, rows: int) -> None:
    plain, roomy = both(5)
    for cache in (plain, roomy):
        cache.update(*columns(1), 0)
        cache.update(*columns(1), 1)
        change(cache)
    for step in range(3):
        for layer in range(2):
            new = columns(1, rows, seed=step)
            for ours, theirs in zip(roomy.update(*new, layer), plain.update(*new, layer), strict=True):
                assert torch.equal(ours, theirs)


def test_rows_that_end_are_replaced_by_the_last_ones_without_a_copy_of_the_rest() -> None:
    """As transformers selects rows; the room is let go of once half of it is empty."""
    plain, roomy = both(5, rows=12)
    rows, stayed = 12, []
    for going in ([], [1, 2, 3, 4, 6, 7, 8, 9, 11], [0, 1, 2, 4, 5, 6, 7, 8], [0, 2, 3, 4, 5, 6, 7], [1, 5, 6], [0, 2]):
        if going:
            before = [layer.keys.data_ptr() for layer in roomy.layers]
            kept = close_up(roomy, going, torch.device("cpu"))
            assert sorted(kept) == going
            assert all(row == place for place, row in enumerate(kept) if place in going)
            plain.batch_select_indices(torch.tensor(kept))
            stayed.append(before == [layer.keys.data_ptr() for layer in roomy.layers])
            rows = len(going)
        for layer in range(2):
            new = columns(1, rows, seed=rows + layer)
            for ours, theirs in zip(roomy.update(*new, layer), plain.update(*new, layer), strict=True):
                assert torch.equal(ours, theirs)
    assert stayed == [True, True, True, False, True]


def test_other_layers_stay() -> None:
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=4)]
    assert not make_room(cache, whole=True)
    assert type(cache.layers[0]) is DynamicSlidingWindowLayer
