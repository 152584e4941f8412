"""The transformers backend: a small decode loop on the model's own cache.

``generate`` repeats prompts before the prefill and draws from one global generator. Here a prompt is read once, its
cache is repeated for the n samples, rows that are finished leave the batch, and every row draws from its own stream.

Axes: P prompts, B = P * n rows, T prompt length, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from stepkd.errors import ConfigError, DataError, ModelError
from stepkd.models.head import backbone_of
from stepkd.models.policy import Policy, positions_from_mask
from stepkd.randomness import generator
from stepkd.rollout.draw import draw
from stepkd.rollout.sampler import Rollout, SamplingSpec

_STOP_WINDOW = 8  # tokens looked at beyond the longest stop string's bytes


@dataclass
class _Row:
    """A completion in the making."""

    prompt_index: int
    sample_index: int
    uniforms: Any
    limit: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None


class TransformersSampler:
    """Batched sampling with a :class:`~stepkd.models.policy.Policy`.

    Args:
        policy: the model to sample from; switched to evaluation mode while sampling.
        max_rows: most completions decoded at once; memory grows with it. Results in exact arithmetic do not depend on
            it, but in bfloat16 rounding differs between batch shapes and may flip near-ties.
    """

    def __init__(self, policy: Policy, *, max_rows: int = 64) -> None:
        if max_rows < 1:
            raise ConfigError(f"max_rows={max_rows}: must be at least 1")
        self.policy = policy
        self.max_rows = max_rows

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        spec: SamplingSpec,
        *,
        purpose: str = "rollout",
        step: int = 0,
        indices: Sequence[int] | None = None,
        on_progress: Callable[[int], Any] | None = None,
    ) -> list[list[Rollout]]:
        """Draw completions; see :class:`~stepkd.rollout.sampler.Sampler`.

        Raises:
            DataError: an empty prompt, or one that leaves no room for a single token in the model's context.
            ModelError: the model's logits are not numbers.
        """
        indices = range(len(prompts)) if indices is None else indices
        if len(indices) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(indices)} indices")
        limits = [self._limit(prompt, index, spec) for prompt, index in zip(prompts, indices, strict=True)]
        results: list[list[Rollout]] = [[] for _ in prompts]
        was_training = [module for module in self.policy.modules() if module.training]
        self.policy.eval()
        try:
            per_prefill = max(1, self.max_rows // spec.n)
            for start in range(0, len(prompts), per_prefill):
                block = range(start, min(start + per_prefill, len(prompts)))
                rows = [
                    _Row(p, j, self._uniforms(spec, purpose, step, indices[p] * spec.n + j, limits[p]), limits[p])
                    for p in block
                    for j in range(spec.n)
                ]
                self._decode_block([prompts[p] for p in block], rows, spec, on_progress)
                for row in rows:
                    results[row.prompt_index].append(self._finish(row, spec))
        finally:
            for module in was_training:  # one by one: frozen parts may be in evaluation mode for good
                module.training = True
        return results

    def _limit(self, prompt: Sequence[int], index: int, spec: SamplingSpec) -> int:
        if len(prompt) == 0:
            raise DataError(f"prompt {index} has no tokens: a model needs at least one token to start from")
        context = self.policy.max_length
        if context is not None and len(prompt) >= context:
            raise DataError(
                f"prompt {index} has {len(prompt)} tokens and the model's context is {context}: shorten the prompt "
                "(fewer few-shot examples) or drop the row"
            )
        return spec.max_new_tokens if context is None else min(spec.max_new_tokens, context - len(prompt))

    @staticmethod
    def _uniforms(spec: SamplingSpec, purpose: str, step: int, index: int, count: int) -> Any:
        return None if spec.temperature == 0 else generator(spec.seed, purpose, step, index).random(count)

    def _decode_block(
        self,
        prompts: list[Sequence[int]],
        rows: list[_Row],
        spec: SamplingSpec,
        on_progress: Callable[[int], Any] | None,
    ) -> None:
        """Prefill the prompts once, then decode their rows, at most ``max_rows`` at a time."""
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths)
        pad = int(self.policy.tokenizer.pad_token_id or 0)
        ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - length) + [1] * length for length in lengths]
        input_ids_PT = torch.tensor(ids, device=self.policy.device)
        mask_PT = torch.tensor(mask, device=self.policy.device)
        output = self._forward(input_ids_PT, mask_PT, positions_from_mask(mask_PT), None)
        hidden_PH, cache = output.last_hidden_state[:, -1], output.past_key_values
        for start in range(0, len(rows), self.max_rows):
            part = rows[start : start + self.max_rows]
            last = start + self.max_rows >= len(rows)
            source_B = torch.tensor([row.prompt_index - rows[0].prompt_index for row in part], device=mask_PT.device)
            part_cache = cache if last else copy.deepcopy(cache)
            part_cache.batch_select_indices(source_B)
            self._decode_rows(part, part_cache, hidden_PH[source_B], mask_PT[source_B], spec, on_progress)

    def _forward(self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Any:
        return backbone_of(self.policy.causal_lm)(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )

    def _decode_rows(
        self,
        rows: list[_Row],
        cache: Any,
        hidden_BH: Tensor,
        mask_BT: Tensor,
        spec: SamplingSpec,
        on_progress: Callable[[int], Any] | None,
    ) -> None:
        head, device = self.policy.head, mask_BT.device
        position_B = mask_BT.sum(-1)
        active = rows
        for t in range(max(row.limit for row in rows)):
            uniform_B = torch.tensor(
                [0.0 if row.uniforms is None else row.uniforms[t] for row in active], dtype=torch.float64, device=device
            )
            step = draw(head(hidden_BH), uniform_B, spec)
            self._record(active, step.tokens_B, step.logprobs_B, step.raw_logprobs_B, spec)
            going = [i for i, row in enumerate(active) if row.finish is None]
            if on_progress is not None and len(going) < len(active):
                on_progress(len(active) - len(going))
            if not going:
                return
            tokens_B = step.tokens_B
            if len(going) < len(active):
                kept = torch.tensor(going, device=device)
                cache.batch_select_indices(kept)
                tokens_B, mask_BT, position_B = tokens_B[kept], mask_BT[kept], position_B[kept]
                active = [active[i] for i in going]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(active), 1)], dim=1)
            output = self._forward(tokens_B.unsqueeze(1), mask_BT, position_B.unsqueeze(1), cache)
            hidden_BH, cache = output.last_hidden_state[:, -1], output.past_key_values
            position_B = position_B + 1

    def _record(
        self, rows: list[_Row], tokens_B: Tensor, logprobs_B: Tensor, raw_logprobs_B: Tensor, spec: SamplingSpec
    ) -> None:
        eos = self.policy.eos_ids
        for row, token, logprob, raw in zip(
            rows, tokens_B.tolist(), logprobs_B.tolist(), raw_logprobs_B.tolist(), strict=True
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

    def _text(self, token_ids: Sequence[int]) -> str:
        decoded = self.policy.tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(decoded)

    def _ends_in_stop(self, token_ids: list[int], spec: SamplingSpec) -> bool:
        window = max(len(text.encode()) for text in spec.stop) + _STOP_WINDOW
        tail = self._text(token_ids[-window:])
        return any(text in tail for text in spec.stop)

    def _finish(self, row: _Row, spec: SamplingSpec) -> Rollout:
        assert row.finish is not None
        text = self._text(row.token_ids)
        cuts = [text.find(stop) for stop in spec.stop if stop in text]
        return Rollout(
            row.prompt_index,
            row.sample_index,
            tuple(row.token_ids),
            tuple(row.logprobs),
            tuple(row.raw_logprobs),
            row.finish,
            text[: min(cuts)] if cuts else text,
        )
