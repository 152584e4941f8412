"""The transformers backend (completions of prompts, continuations of prefixes), and prompts of problem rows for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepkd.data.completion import Completion, Numbers
from stepkd.data.encode import Encoder, with_completion
from stepkd.data.templates import PromptTemplate, get_template
from stepkd.errors import DataError
from stepkd.losses.prm import label_token_logps
from stepkd.models.head import evaluation_mode
from stepkd.models.policy import Policy
from stepkd.models.source import trained_template
from stepkd.sampling.annotate import likeliest
from stepkd.sampling.branches import continued, gap_limit
from stepkd.sampling.cache import Prefixes, padded, state_of_weights
from stepkd.sampling.decode import Decoder, Row
from stepkd.sampling.engine import Branch, BranchContinuations, Engine, Progress, SamplingConfig, Scores, Wanted
from stepkd.steps.segment import get_segmenter


class TransformersEngine(Engine):
    """Batched sampling with a :class:`~stepkd.models.policy.Policy`.

    Args:
        policy: the model to sample from; switched to evaluation mode while sampling.
        max_rows: most completions decoded at once; memory grows with it. Results in exact arithmetic do not depend on
            it, but in bfloat16 rounding differs between batch shapes and may flip near-ties.
        breaks_off: asked before every token; once it says yes, completions end where they are (at one token or more).
    """

    def __init__(self, policy: Policy, *, max_rows: int = 64, breaks_off: Callable[[], bool] | None = None) -> None:
        self.policy, self.max_rows = policy, max_rows
        self._decoder = Decoder(policy, max_rows=max_rows, breaks_off=breaks_off)
        self._gap_limit: float | None = None
        self._prefixes, self._weights = Prefixes(), list[Any]()

    gives_entropies = True

    def forget(self) -> None:
        """See :meth:`~stepkd.sampling.engine.Engine.forget`."""
        self._prefixes.clear()

    def _send(self, version: int) -> None:
        self.forget()

    @torch.no_grad()
    def _draw(
        self, wanted: Sequence[Wanted], spec: SamplingConfig, on_progress: Progress | None
    ) -> list[list[Completion]]:
        rows_of = [
            [
                Row(p, j, limit, (*key[:-1], int(key[-1]) * spec.n + j), prompt, entropies=[] if entropies else None)
                for j in range(spec.n)
            ]
            for p, (prompt, limit, key, entropies) in enumerate(wanted)
        ]
        with evaluation_mode(self.policy):
            kept = self._kept()
            # Prompts that are read as a whole are not padded to those of which a few tokens are left to read.
            whole = [kept is None or 2 * kept.known(each.prompt) < len(each.prompt) for each in wanted]
            for alike in (True, False):
                numbers = [number for number, each in enumerate(whole) if each == alike]
                prompts, rows = [wanted[i].prompt for i in numbers], [rows_of[i] for i in numbers]
                self._decoder.decode_prompts(prompts, rows, spec, on_progress, kept)
        return [
            list(self._decoder.finished(rows, np.asarray(each.prompt), spec))
            for rows, each in zip(rows_of, wanted, strict=True)
        ]

    def _kept(self) -> Prefixes | None:
        """What is kept of earlier calls; None: nothing is, or the model cannot continue from it."""
        if not self.keeps_prefixes or self._gaps() < math.inf:
            return None
        weights = state_of_weights(self.policy)
        if weights != self._weights:
            self.forget()
            self._weights = weights
        return self._prefixes

    def _gaps(self) -> float:
        if self._gap_limit is None:
            self._gap_limit = gap_limit(self._decoder)
        return self._gap_limit

    @torch.no_grad()
    def _continue(
        self, branches: Sequence[Branch], spec: SamplingConfig, key: tuple[str, int], on_progress: Progress | None
    ) -> list[BranchContinuations]:
        """Every sequence is read once. Where the model cannot skip a part of its cache (a sliding window shorter than
        the sequence, recurrent layers), the prefixes of that sequence are read one by one: same noise, same result,
        more work, as ``prefill_tokens`` says."""
        with evaluation_mode(self.policy):
            return continued(self._decoder, branches, spec, key, self._gaps(), on_progress)

    def _score(self, completions: Sequence[Completion], top_k: int) -> list[Scores]:
        return likeliest(self.policy, completions, top_k)

    @torch.no_grad()
    def choice_logps(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Numbers:
        """See :meth:`~stepkd.sampling.engine.Engine.choice_logps`; no prefix is shared here."""
        found = [np.zeros((0, len(token_ids)))]
        with evaluation_mode(self.policy):
            for start in range(0, len(prompts), self.max_rows):
                rows = prompts[start : start + self.max_rows]
                hidden_PTH = self.policy.hidden(*padded(self.policy, rows))
                hidden_PH = torch.stack(
                    [hidden_H[len(row) - 1] for hidden_H, row in zip(hidden_PTH, rows, strict=True)]
                )
                found.append(label_token_logps(self.policy.head, hidden_PH, token_ids).double().cpu().numpy())
        return np.concatenate(found)


def sample(
    policy: Policy,
    prompts: Sequence[str | Sequence[Mapping[str, str]] | Mapping[str, Any]],
    sampling: SamplingConfig | None = None,
    *,
    template: str | Path | PromptTemplate | None = None,
    segmenter: str = "newline",
    max_rows: int = 64,
) -> list[list[Completion]]:
    """Sample completions of prompts, as training and evaluation do; equal arguments give equal completions.

    Args:
        policy: the model; it samples on the device that it is on, in evaluation mode.
        prompts: each a text, a list of chat messages, or a row with a ``prompt`` of either kind.
        sampling: how to draw; None: one completion at temperature 1.
        template: how a prompt becomes the text that the model is given: a name, a YAML file or settings; None: that
            which the policy was trained with, else the prompt as it is (in the chat template, where there is one).
        segmenter: how completions are cut into steps (``step_ends``), as in :class:`~stepkd.data.datamodule.StepData`.
        max_rows: most completions decoded at once, >= 1; memory grows with it.

    Returns:
        For each prompt its ``sampling.n`` completions, with the row that asked for them.

    Raises:
        DataError: prompts that are one text, an empty prompt, or one without room in the model's context.
        ConfigError: no such template or segmenter.
        ModelError: the model's logits are not numbers.
    """
    if isinstance(prompts, str) or not prompts:
        raise DataError(f"prompts is {prompts!r}: give a list of texts, of lists of chat messages, or of rows")
    given = [each if isinstance(each, Mapping) else {"prompt": each} for each in prompts]
    rows: list[dict[str, Any]] = [{"id": str(number), **each} for number, each in enumerate(given)]
    if template is None:
        template = (policy.spec and trained_template(policy.spec.path, policy.spec.revision)) or PromptTemplate()
    examples, cuts = encode_prompts(policy, get_template(template), rows), get_segmenter(segmenter)
    engine = TransformersEngine(policy, max_rows=max_rows)
    drawn = engine.generate([each.prompt_ids for each in examples], sampling or SamplingConfig(), purpose="script")

    def cut(example: Completion, drawn: Completion) -> Completion:
        ends = with_completion(example, drawn.token_ids, policy.tokenizer, cuts).step_ends
        return replace(drawn, id=example.id, row=example.row, step_ends=ends)

    return [[cut(example, each) for each in own] for example, own in zip(examples, drawn, strict=True)]


def encode_prompts(policy: Policy, template: PromptTemplate, rows: Sequence[dict[str, Any]]) -> list[Completion]:
    """Prompt ids of every row, each with room for at least one token in the model's context.

    Raises:
        DataError: a prompt fills the context.
    """
    encoder = Encoder(policy.tokenizer, template, get_segmenter("newline"), max_length=10**9)
    prompts = [encoder.prompt_example(row) for row in rows]
    longest = max(prompts, key=lambda prompt: len(prompt.prompt_ids))
    SamplingConfig().room(f"{longest.id}: the prompt", len(longest.prompt_ids), policy.max_length)
    return prompts


def fixed_batches(prompts: Sequence[Completion], samples: int, max_rows: int) -> list[list[int]]:
    """Problems grouped by prompt length; depends on nothing but the problems and the two numbers.

    Args:
        prompts: of the problems.
        samples: completions of each.
        max_rows: most rows decoded at once.

    Returns:
        Numbers of the problems of each batch, longest prompts first; a job that is resumed makes the same batches
        again.
    """
    size = max(1, max_rows // samples)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].prompt_ids), i))
    return [order[start : start + size] for start in range(0, len(order), size)]
