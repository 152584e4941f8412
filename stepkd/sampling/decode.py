"""The decode loop of the transformers backend: one draw per row and token, on the model's own cache with room to grow.

``generate`` repeats prompts before the prefill and draws from one global generator. Here a prompt is read once, its
cache is repeated for the rows that continue it, rows that are finished leave the batch, and every row draws from its
own stream by the inverse of the cumulative distribution. That needs a single number per token, so a row's draw depends
only on its own logits and its own stream: the same for any batch size, order or rank.

Axes: P sequences read, B rows decoded, T padded length (columns of the cache), H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from stepkd.data.completion import UNKNOWN, Completion, Ids
from stepkd.errors import ConfigError, ModelError
from stepkd.models.head import backbone_of, positions_from_mask
from stepkd.models.packed import is_worth_it, packed_weights, unpadded_hidden
from stepkd.models.policy import Policy
from stepkd.randomness import generator
from stepkd.sampling.cache import Prefixes, Reading, close_up, make_room, padded, room_for
from stepkd.sampling.draw import Draw, draw, entropies
from stepkd.sampling.engine import Progress, SamplingConfig, decode_text

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
    prompt: Sequence[int] = ()
    """Its prompt, where it may be kept."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    entropies: list[float] | None = None
    """None: they are not asked for."""
    finish: Literal["stop", "length"] | None = None


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
        kept: Prefixes | None = None,
    ) -> None:
        """Read each prompt once, then decode its rows, at most ``max_rows`` at a time.

        Args:
            prompts: ids of each.
            rows_of: for each prompt its rows without a token yet; filled in place.
            spec: how to draw.
            on_progress: called with the number of rows just finished.
            kept: reads prompts from where it knows them, and keeps what is read, and what is drawn without an end
                token.
        """
        size = max(1, self.max_rows // spec.n)
        for first in range(0, len(prompts), size):
            part_of = prompts[first : first + size]
            reading = self.read(part_of, padding="left") if kept is None else kept.read(self, part_of)
            hidden_PH = reading.hidden_PTH[:, -1]
            rows = [(row, p) for p, own in enumerate(rows_of[first : first + size]) for row in own]
            for start in range(0, len(rows), self.max_rows):
                part, sources = zip(*rows[start : start + self.max_rows], strict=True)
                last = start + self.max_rows >= len(rows)
                source_B = torch.tensor(sources, device=hidden_PH.device)
                cache = reading.cache if last else copy.deepcopy(reading.cache)
                cache.batch_select_indices(source_B)
                mask_BT = reading.mask_PT[source_B]
                self.decode(list(part), cache, hidden_PH[source_B], mask_BT, spec, on_progress, kept)

    def decode(
        self,
        rows: list[Row],
        cache: Any,
        hidden_BH: Tensor,
        mask_BT: Tensor,
        spec: SamplingConfig,
        on_progress: Progress | None,
        kept: Prefixes | None = None,
    ) -> None:
        """Decode rows to their ends.

        Args:
            rows: B rows without a token yet; filled in place.
            cache: what each row has read, T columns; used up.
            hidden_BH: hidden state of each row's last token read.
            mask_BT: the columns that belong to a row; their number is the position of its first new token.
            spec: how to draw.
            on_progress: called with the number of rows just finished.
            kept: keeps rows that are finished without an end token.
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
                logits_BV = head(hidden_BH)
                self.record(active, step := draw(logits_BV, uniform_B, spec), spec, eos)
                if active[0].entropies is not None:
                    for row, entropy in zip(active, entropies(logits_BV).tolist(), strict=True):
                        cast("list[float]", row.entropies).append(entropy)
                if self.breaks_off is not None and self.breaks_off():
                    for row in active:
                        row.finish = row.finish or "length"
                going = [i for i, row in enumerate(active) if row.finish is None]
                for place, row in enumerate(active):
                    if kept is not None and row.finish is not None and row.token_ids[-1] not in eos:
                        kept.add((*row.prompt, *row.token_ids[:-1]), len(row.prompt), cache, place, width)
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
                entropies=UNKNOWN if row.entropies is None else np.asarray(row.entropies),
                finish=row.finish or "length",
                text=spec.before_stop(decode_text(self.policy.tokenizer, row.token_ids)),
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

    def record(self, rows: list[Row], step: Draw, spec: SamplingConfig, eos: Collection[int]) -> None:
        """Write what was drawn into rows, and say of those that are finished how.

        Raises:
            ModelError: log-probabilities that are no numbers.
        """
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
