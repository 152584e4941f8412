"""A key-value cache with room to grow.

transformers' own layer copies all columns for every new token. Here columns are written into a larger tensor, and only
when it is full are they copied into one a quarter larger.

Axes: B rows, K key-value heads, T columns, D head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

LEAST_ROOM = 32
"""Columns of a new room beyond those that are needed at once."""


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer as views (B, K, T, D) of larger tensors."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.keys, self.values = layer.keys, layer.values
        self._rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns; see ``DynamicLayer.update``."""
        if not self.is_initialized:  # it was reset
            self._rooms = None
            return super().update(key_states, value_states, *args, **kwargs)
        seen = self.keys.shape[-2]
        width = seen + key_states.shape[-2]
        if self._rooms is None or width > self._rooms[0].shape[-2] or not self._is_in(self._rooms):
            size = _larger(width)
            self._rooms = (_roomy(self.keys, size), _roomy(self.values, size))
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., seen:width, :] = new
        self.keys, self.values = (room[..., :width, :] for room in self._rooms)
        return self.keys, self.values

    def _is_in(self, rooms: tuple[Tensor, Tensor]) -> bool:
        """Whether the columns still lie in their rooms: rows may have been repeated, reordered or replaced."""
        return len(self.keys) == len(rooms[0]) and self.keys.data_ptr() == rooms[0].data_ptr()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, and let go of the room of all at once."""
        super().batch_select_indices(indices)
        self._rooms = None


def _larger(width: int) -> int:
    """Columns of a new room for so many."""
    return width + max(LEAST_ROOM, width // 4)


def room_columns(prompt: int, total: int) -> int:
    """Columns of the room that a cache of ``prompt`` columns has once there are ``total``."""
    room = prompt
    while room < total:
        room = _larger(room + 1)
    return room


def _roomy(columns: Tensor, size: int) -> Tensor:
    """The columns at the beginning of a tensor of ``size`` columns."""
    room = columns.new_empty(*columns.shape[:-2], size, columns.shape[-1])
    room[..., : columns.shape[-2], :] = columns
    return room


def make_room(cache: Any) -> None:
    """Let the layers of a cache grow in place, where they are of transformers' plain growing kind; others stay."""
    cache.layers = [RoomyLayer(x) if type(x) is DynamicLayer and x.is_initialized else x for x in cache.layers]
