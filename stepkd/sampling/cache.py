"""A cache of keys and values with room to grow.

transformers' own cache layer copies all columns for every new token. Here columns are written into a larger tensor, and
only when it is full are they copied into one a quarter larger.

Kept prefixes (:class:`Prefixes`) are what the transformers backend has read and drawn. Searches ask for continuations
of continuations. A tree over token ids knows of every token that was read where its keys and values lie, so that a
prompt is read from the first token that differs, or from its last one, whose hidden state is needed. Siblings share the
columns of what they have in common. Rows of a batch continue prefixes of different lengths: their columns are laid out
with padding before and between them, which the mask hides (the model must be one that can skip a part of its cache,
:func:`~stepkd.sampling.branches.gap_limit`).

Axes: B rows, P sequences read, K key-value heads, T columns, D head size, H hidden size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from stepkd.models.head import positions_from_mask
from stepkd.models.policy import Policy

logger = logging.getLogger(__name__)

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


def padded(
    policy: Policy, sequences: Sequence[Sequence[int]], side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:
    """Ids of sequences, padded on one side, and their mask.

    Args:
        policy: whose tokenizer says the padding's id (0 without one), and on whose device the tensors are.
        sequences: ids of each, at least one.
        side: where the padding goes.

    Returns:
        int64 ids (B, T) and mask (B, T): 1 for tokens, 0 for padding.
    """
    width, pad = max(map(len, sequences)), int(policy.tokenizer.pad_token_id or 0)

    def rows(sequence: Sequence[int]) -> list[list[int]]:
        parts = [([*sequence], [pad] * (width - len(sequence))), ([1] * len(sequence), [0] * (width - len(sequence)))]
        return [own + gap if side == "right" else gap + own for own, gap in parts]

    ids_BT, mask_BT = torch.tensor([rows(each) for each in sequences], device=policy.device).unbind(1)
    return ids_BT, mask_BT


class Reading(NamedTuple):
    """Sequences that the model has read, padded on one side."""

    hidden_PTH: Tensor
    """Last hidden states."""
    mask_PT: Tensor
    """1 for tokens, 0 for padding."""
    cache: Any
    """Keys and values of every layer."""


# --- kept prefixes ----------------------------------------------------------------------------------------------------

KEPT_BYTES = 2**30
"""Most bytes of keys and values that are kept; the tree over them takes about 350 more a token. Beyond it all are
cleared, and what continues them is read anew."""

_LOOKED_AT = 1024
"""About how many numbers of every weight are looked at, to see whether weights have changed."""

Segment: TypeAlias = list[tuple[Tensor, Tensor]]
"""Keys and values (K, T, D) of each layer, for the columns of tokens that were kept together."""


@dataclass(slots=True, eq=False)
class _Token:
    """A token behind those on the way to it."""

    segment: Segment
    column: int
    following: dict[int, _Token] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Run:
    """Columns of a segment, one after the other."""

    segment: Segment
    start: int
    end: int


@torch.no_grad()
def state_of_weights(policy: Policy) -> list[Any]:
    """What is compared to see whether a model's weights, buffers or active adapters have changed.

    torch's count of changes in place knows nothing of fused optimisers, of ``.data`` and of weights that are replaced,
    so numbers all over each weight are read, too. What ``.data`` changes between them is not seen.
    """
    state: list[Any] = [
        (each._version, float(each.flatten()[:: each.numel() // _LOOKED_AT | 1].sum(dtype=torch.float32)))
        for each in (*policy.parameters(), *policy.buffers())
    ]
    adapted = [each for each in policy.modules() if hasattr(each, "active_adapters")]
    return [*state, *((str(each.active_adapters), getattr(each, "disable_adapters", None)) for each in adapted)]


class Prefixes:
    """Keys and values of one model's tokens, found by the ids up to them.

    Args:
        most_bytes: bound of what is kept, > 0.
    """

    def __init__(self, most_bytes: int = KEPT_BYTES) -> None:
        self.most_bytes = most_bytes
        self.clear()

    def clear(self) -> None:
        """Keep nothing of what was read."""
        self._first: dict[int, _Token] = {}
        self.bytes = 0

    def known(self, ids: Sequence[int]) -> int:
        """How many of a prompt's tokens need not be read; never its last one."""
        return sum(run.end - run.start for run in self._runs(ids))

    def add(self, ids: Sequence[int], start: int, cache: Any, row: int, end: int) -> None:
        """Keep columns of a cache.

        Args:
            ids: from the beginning of the prompt on.
            start: the columns are those of ``ids[start:]``; where what comes before is not kept, neither are they.
            cache: whose layers have ``keys`` and ``values``, which are copied.
            row: of the cache.
            end: the last column's number, and one.
        """
        following, known = self._first, 0
        while known < len(ids) and (token := following.get(ids[known])) is not None:
            following, known = token.following, known + 1
        if known < start or known == len(ids):
            return
        columns = slice(end - len(ids) + known, end)
        shown = [(x.keys[row, :, columns], x.values[row, :, columns]) for x in cache.layers]
        size = sum(each.nbytes for layer in shown for each in layer)
        if self.bytes + size > self.most_bytes:
            logger.info("%d bytes of kept prefixes are cleared: with the next they are more than allowed", self.bytes)
            self.clear()
            return
        segment = [(keys.clone(), values.clone()) for keys, values in shown]
        self.bytes += size
        for column, token_id in enumerate(ids[known:]):
            following[token_id] = token = _Token(segment, column)
            following = token.following

    @torch.no_grad()
    def read(self, decoder: Any, sequences: Sequence[Sequence[int]]) -> Reading:
        """Read what is not known of sequences in one forward pass, and keep it.

        Args:
            decoder: of the model that everything here was read with, in evaluation mode.
            sequences: ids of each, at least one.

        Returns:
            The hidden states of what was read, the mask of all columns, and the cache; every sequence ends in the last
            column.
        """
        places = {ids: place for place, ids in enumerate(dict.fromkeys(map(tuple, sequences)))}
        distinct = list(places)  # several trials may continue one text
        runs = [self._runs(ids) for ids in distinct]
        known = [sum(run.end - run.start for run in own) for own in runs]
        if any(known):
            reading = self._read_on(decoder, distinct, runs, known)
        else:
            reading = decoder.read(distinct, padding="left")
        for row, (ids, start) in enumerate(zip(distinct, known, strict=True)):
            self.add(ids, start, reading.cache, row, reading.mask_PT.shape[1])
        if len(distinct) == len(sequences):
            return reading
        rows_P = torch.tensor([places[tuple(ids)] for ids in sequences], device=reading.mask_PT.device)
        reading.cache.batch_select_indices(rows_P)
        return Reading(reading.hidden_PTH[rows_P], reading.mask_PT[rows_P], reading.cache)

    def _runs(self, ids: Sequence[int]) -> list[_Run]:
        runs: list[_Run] = []
        following = self._first
        for token_id in ids[:-1]:
            if (token := following.get(token_id)) is None:
                break
            if runs and runs[-1].segment is token.segment and runs[-1].end == token.column:
                runs[-1].end += 1
            else:
                runs.append(_Run(token.segment, token.column, token.column + 1))
            following = token.following
        return runs

    @staticmethod
    def _read_on(
        decoder: Any, sequences: Sequence[Sequence[int]], runs: Sequence[Sequence[_Run]], known: Sequence[int]
    ) -> Reading:
        width = max(known)
        ids_PT, new_PT = padded(
            decoder.policy, [ids[start:] for ids, start in zip(sequences, known, strict=True)], "left"
        )
        decoder.policy.check_ids(ids_PT)
        columns = torch.arange(width, device=ids_PT.device)
        kept_PT = columns >= width - torch.tensor(known, device=ids_PT.device)[:, None]
        mask_PT = torch.cat([kept_PT.to(new_PT.dtype), new_PT], 1)
        cache = DynamicCache()
        segment = next(run.segment for own in runs for run in own)
        cache.layers = [
            RoomyLayer.within(_laid_out(runs, known, layer, width, room_for(mask_PT.shape[1])), width)
            for layer in range(len(segment))
        ]
        output = decoder.forward(ids_PT, mask_PT, positions_from_mask(mask_PT)[:, width:], cache)
        return Reading(output.last_hidden_state, mask_PT, output.past_key_values)


def _laid_out(
    runs: Sequence[Sequence[_Run]], known: Sequence[int], layer: int, width: int, size: int
) -> tuple[Tensor, Tensor]:
    """Keys and values (P, K, size, D) of one layer: those of every row end at column ``width``; zeros elsewhere."""
    keys, values = (
        each.new_zeros(len(runs), each.shape[0], size, each.shape[2])
        for each in next(run.segment for own in runs for run in own)[layer]
    )
    for row, own in enumerate(runs):
        column = width - known[row]
        for run in own:
            end = column + run.end - run.start
            for room, kept in zip((keys, values), run.segment[layer], strict=True):
                room[row, :, column:end] = kept[:, run.start : run.end]
            column = end
    return keys, values
