"""The decode loop of the transformers backend: one draw per row and token, on the model's own cache with room to grow.

``generate`` repeats prompts before the prefill and draws from one global generator. Here a prompt is read once, its
cache is repeated for the rows that continue it, rows that are finished leave the batch, and every row draws from its
own stream by the inverse of the cumulative distribution. That needs a single number per token, so a row's draw depends
only on its own logits and its own stream: the same for any batch size, order or rank.

transformers' own cache layer copies all columns for every new token. Here columns are written into a larger tensor, and
only when it is full are they copied into one a quarter larger.

Axes: P sequences read, B rows decoded, T padded length (columns of the cache), H hidden size, V vocabulary,
K key-value heads, D head size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from stepkd.data.completion import Completion, Ids
from stepkd.errors import ConfigError, ModelError
from stepkd.models.head import backbone_of, positions_from_mask
from stepkd.models.packed import is_worth_it, packed_weights, unpadded_hidden
from stepkd.models.policy import Policy
from stepkd.randomness import generator
from stepkd.sampling.draw import Draw, draw
from stepkd.sampling.engine import Progress, SamplingConfig, before_stop, decode_text

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
    plain = [type(x) is DynamicLayer and x.is_initialized for x in cache.layers]
    whole = whole and all(plain)
    cache.layers = [RoomyLayer(x, whole) if own else x for x, own in zip(cache.layers, plain, strict=True)]
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


_STOP_WINDOW = 8  # tokens looked at beyond the longest stop string's bytes


@dataclass
class Row:
    """A completion in the making."""

    prompt_index: int
    """Position of its prompt in the call."""
    sample_index: int
    """Which of the prompt's samples."""
    limit: int
    """Most tokens, >= 1."""
    key: tuple[int | str, ...]
    """Purpose and numbers that key its noise."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None


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


@dataclass(eq=False)
class Decoder:
    """Reads sequences and decodes rows from them."""

    policy: Policy
    """The model; the caller puts it into evaluation mode and switches gradients off."""
    max_rows: int = field(kw_only=True)
    """Most rows decoded at once, >= 1."""
    breaks_off: Callable[[], bool] | None = field(default=None, kw_only=True)
    """Asked before every token; once it says yes, rows end where they are, as if cut off by their limit."""

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ConfigError(f"max_rows={self.max_rows}: must be at least 1")

    def read(self, sequences: Sequence[Sequence[int]], *, padding: Literal["left", "right"]) -> Reading:
        """Read sequences in one forward pass.

        Args:
            sequences: ids of each, at least one.
            padding: on the left every row's next token has the same column; on the right every column is a position.
        """
        input_ids_PT, mask_PT = padded(self.policy, sequences, padding)
        self.policy.check_ids(input_ids_PT)
        if self.policy.can_unpad and is_worth_it(mask_PT):
            cache = DynamicCache()
            hidden_PTH = unpadded_hidden(self.policy.causal_lm, input_ids_PT, mask_PT, cache=cache)
            return Reading(hidden_PTH, mask_PT, cache)
        output = self.forward(input_ids_PT, mask_PT, positions_from_mask(mask_PT), None)
        return Reading(output.last_hidden_state, mask_PT, output.past_key_values)

    def forward(self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, **attention: Any) -> Any:
        """One pass of the backbone; ``mask`` covers the cached columns and the new ones; ``attention`` is for its
        attention function."""
        return backbone_of(self.policy.causal_lm)(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **attention,
        )

    def decode_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        rows_of: Sequence[list[Row]],
        spec: SamplingConfig,
        on_progress: Progress | None,
    ) -> None:
        """Read each prompt once, then decode its rows, at most ``max_rows`` at a time.

        Args:
            prompts: ids of each.
            rows_of: for each prompt its rows without a token yet; filled in place.
            spec: how to draw.
            on_progress: called with the number of rows just finished.
        """
        size = max(1, self.max_rows // spec.n)
        for first in range(0, len(prompts), size):
            reading = self.read(prompts[first : first + size], padding="left")
            hidden_PH = reading.hidden_PTH[:, -1]
            rows = [(row, p) for p, own in enumerate(rows_of[first : first + size]) for row in own]
            for start in range(0, len(rows), self.max_rows):
                part, sources = zip(*rows[start : start + self.max_rows], strict=True)
                last = start + self.max_rows >= len(rows)
                source_B = torch.tensor(sources, device=hidden_PH.device)
                cache = reading.cache if last else copy.deepcopy(reading.cache)
                cache.batch_select_indices(source_B)
                self.decode(list(part), cache, hidden_PH[source_B], reading.mask_PT[source_B], spec, on_progress)

    def decode(
        self,
        rows: list[Row],
        cache: Any,
        hidden_BH: Tensor,
        mask_BT: Tensor,
        spec: SamplingConfig,
        on_progress: Progress | None,
    ) -> None:
        """Decode rows to their ends.

        Args:
            rows: B rows without a token yet; filled in place.
            cache: what each row has read, T columns; used up.
            hidden_BH: hidden state of each row's last token read.
            mask_BT: the columns that belong to a row; their number is the position of its first new token.
            spec: how to draw.
            on_progress: called with the number of rows just finished.
        """
        head, device, eos = self.policy.head, mask_BT.device, self.policy.eos_ids
        whole = make_room(cache, self.policy.can_unpad and device.type == "cpu")
        uniforms = {id(row): self._uniforms(row, spec) for row in rows}
        position_B = mask_BT.sum(-1)
        active = rows
        width, longest = mask_BT.shape[1], max(row.limit for row in rows)
        mask_BT = torch.nn.functional.pad(mask_BT, (0, longest), value=1)
        with packed_weights(self.policy.causal_lm, len(rows), longest):
            for t in range(longest):
                uniform_B = torch.tensor([uniforms[id(row)][t] for row in active], dtype=torch.float64, device=device)
                step = draw(head(hidden_BH), uniform_B, spec)
                self._record(active, step, spec, eos)
                if self.breaks_off is not None and self.breaks_off():
                    for row in active:
                        row.finish = row.finish or "length"
                going = [i for i, row in enumerate(active) if row.finish is None]
                if on_progress is not None and len(going) < len(active):
                    on_progress(len(active) - len(going))
                if not going:
                    return
                tokens_B = step.tokens_B
                if len(going) < len(active):
                    going = close_up(cache, going, device)
                    tokens_B, mask_BT, position_B = tokens_B[going], mask_BT[going], position_B[going]
                    active = [active[i] for i in going]
                width += 1
                seen_BT, attention = mask_BT[:, :width], {}
                if whole:  # a mask of four axes is taken as it is
                    seen_BT = torch.nn.functional.pad(seen_BT.bool(), (0, room_for(width) - width))[:, None, None]
                    attention = {"one_query": True}
                output = self.forward(tokens_B.unsqueeze(1), seen_BT, position_B.unsqueeze(1), cache, **attention)
                hidden_BH, cache = output.last_hidden_state[:, -1], output.past_key_values
                position_B = position_B + 1

    def finished(self, rows: Sequence[Row], prompt: Ids, spec: SamplingConfig) -> tuple[Completion, ...]:
        """The completions of a prompt, from rows that were decoded.

        Args:
            rows: of this prompt.
            prompt: its ids.
            spec: how they were drawn; its stop strings are cut off the texts.

        Returns:
            One completion for each row, with ids, both kinds of log-probabilities, text and finish.
        """
        return tuple(
            Completion(
                prompt,
                np.asarray(row.token_ids),
                logprobs=np.asarray(row.logprobs),
                raw_logprobs=np.asarray(row.raw_logprobs),
                finish=row.finish or "length",
                text=before_stop(decode_text(self.policy.tokenizer, row.token_ids), spec.stop),
                sample=row.sample_index,
            )
            for row in rows
        )

    @staticmethod
    def _uniforms(row: Row, spec: SamplingConfig) -> Sequence[float]:
        if spec.temperature == 0:
            return [0.0] * row.limit
        uniforms: list[float] = generator(spec.seed, str(row.key[0]), *row.key[1:]).random(row.limit).tolist()
        return uniforms

    def _record(self, rows: list[Row], step: Draw, spec: SamplingConfig, eos: Collection[int]) -> None:
        for row, token, logprob, raw in zip(
            rows, step.tokens_B.tolist(), step.logprobs_B.tolist(), step.raw_logprobs_B.tolist(), strict=True
        ):
            if math.isnan(raw):
                raise ModelError(
                    f"the model's logits are not numbers (NaN) at token {len(row.token_ids)} of a completion of prompt "
                    f"{row.prompt_index}: its weights have diverged, or float16 overflowed (use bfloat16 or float32)"
                )
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.raw_logprobs.append(raw)
            if token in eos or (spec.stop and self._ends_in_stop(row.token_ids, spec)):
                row.finish = "stop"
            elif len(row.token_ids) >= row.limit:
                row.finish = "length"

    def _ends_in_stop(self, token_ids: list[int], spec: SamplingConfig) -> bool:
        window = max(len(text.encode()) for text in spec.stop) + _STOP_WINDOW
        tail = decode_text(self.policy.tokenizer, token_ids[-window:])
        return any(text in tail for text in spec.stop)
