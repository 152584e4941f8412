"""A cache of keys and values with room to grow.

transformers' own cache layer copies all columns for every new token. Here columns are written into a larger tensor, and
only when it is full are they copied into one a quarter larger.

Axes: B rows, K key-value heads, T columns, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

LEAST_ROOM = 32
"""Columns by which a room grows, or an eighth to a quarter of those it holds where that is more."""


def room_for(width: int) -> int:
    """Columns of the tensor in which so many are kept."""
    step = max(LEAST_ROOM, (1 << width.bit_length()) // 8)
    return math.ceil(width / step) * step


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer as views (B, K, T, D) of larger tensors.

    Args:
        layer: what is kept so far.
        whole: whether attention gets the larger tensors, of :func:`room_for` columns, the last of which are empty: a
            view of them would be copied in every matrix product.
    """

    def __init__(self, layer: DynamicLayer, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.keys, self.values = layer.keys, layer.values
        self._rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns; see ``DynamicLayer.update``."""
        seen = self.keys.shape[-2]
        width = seen + key_states.shape[-2]
        if self._rooms is None or width > self._rooms[0].shape[-2] or not self._is_in(self._rooms):
            size = room_for(width)
            self._rooms = (_roomy(self.keys, size), _roomy(self.values, size))
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., seen:width, :] = new
        self.keys, self.values = (room[..., :width, :] for room in self._rooms)
        return self._rooms if self.whole else (self.keys, self.values)

    def _is_in(self, rooms: tuple[Tensor, Tensor]) -> bool:
        """Whether the columns still lie in their rooms: rows may have been repeated, reordered or replaced."""
        return len(self.keys) == len(rooms[0]) and self.keys.data_ptr() == rooms[0].data_ptr()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows.

        Where they stay in their places, save those from behind that take the places of rows which are left out, only
        these are copied; the room of all is let go of once half of it is empty.
        """
        number = len(indices)
        holes = (indices != torch.arange(number, device=indices.device)).nonzero().squeeze(-1)
        fits = self._rooms is not None and self._is_in(self._rooms) and 2 * number > self._capacity(self._rooms[0])
        if self._rooms is None or not fits or bool((indices[holes] < number).any()):
            super().batch_select_indices(indices)
            self._rooms = None
            return
        for columns in (self.keys, self.values):
            columns[holes] = columns[indices[holes]]
        self.keys, self.values = self.keys[:number], self.values[:number]
        self._rooms = (self._rooms[0][:number], self._rooms[1][:number])

    @classmethod
    def within(cls, rooms: tuple[Tensor, Tensor], width: int) -> RoomyLayer:
        """A layer whose first ``width`` columns are kept already, in tensors of :func:`room_for` columns."""
        layer = DynamicLayer()
        layer.lazy_initialization(*rooms)
        layer.keys, layer.values = (room[..., :width, :] for room in rooms)
        roomy = cls(layer)
        roomy._rooms = rooms
        return roomy

    @staticmethod
    def _capacity(room: Tensor) -> int:
        """Rows that a room was made for."""
        return room.untyped_storage().nbytes() // (room.stride(0) * room.element_size())


def _roomy(columns: Tensor, size: int) -> Tensor:
    """The columns at the beginning of a tensor of ``size`` columns."""
    room = columns.new_zeros(*columns.shape[:-2], size, columns.shape[-1])  # attention multiplies empty ones by 0
    room[..., : columns.shape[-2], :] = columns
    return room


def make_room(cache: Any, whole: bool = False) -> bool:
    """Let the layers of a cache grow in place, where they are of transformers' plain growing kind; others stay.

    Args:
        cache: changed in place.
        whole: see :class:`RoomyLayer`; not where a layer stays.

    Returns:
        Whether attention gets whole rooms.
    """
    plain = [type(x) in (DynamicLayer, RoomyLayer) and x.is_initialized for x in cache.layers]
    whole = whole and all(plain)
    for number, own in enumerate(plain):
        if own and type(cache.layers[number]) is DynamicLayer:
            cache.layers[number] = RoomyLayer(cache.layers[number], whole)
        elif own:
            cache.layers[number].whole = whole
    return whole


def close_up(cache: Any, going: Sequence[int], device: torch.device) -> list[int]:
    """Keep some rows of a cache, copying as little as can be: the last of them take the places of those that leave.

    Args:
        cache: with room (:func:`make_room`), changed in place.
        going: numbers of the rows that are kept, increasing.
        device: of the cache.

    Returns:
        The rows that are kept, in their new order.
    """
    kept = list(range(len(going)))
    holes = sorted(set(kept).difference(going))
    for hole, row in zip(holes, (row for row in going if row >= len(going)), strict=True):
        kept[hole] = row
    cache.batch_select_indices(torch.tensor(kept, device=device))
    return kept
