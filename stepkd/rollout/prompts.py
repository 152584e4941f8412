"""Prompts of problem rows, and the fixed batches in which they are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepkd.data.encode import Encoder, Example
from stepkd.data.templates import PromptTemplate
from stepkd.errors import DataError
from stepkd.models import Policy
from stepkd.steps import get_segmenter


def encode_prompts(policy: Policy, template: PromptTemplate, rows: Sequence[dict[str, Any]]) -> list[Example]:
    """Prompt ids of every row, each with room for at least one token in the model's context.

    Raises:
        DataError: a prompt fills the context.
    """
    encoder = Encoder(policy.tokenizer, template, get_segmenter("newline"), max_length=10**9)
    prompts = [encoder.prompt_example(row) for row in rows]
    longest = max(prompts, key=lambda prompt: len(prompt.prompt_ids))
    if policy.max_length is not None and len(longest.prompt_ids) >= policy.max_length:
        raise DataError(
            f"the prompt has {len(longest.prompt_ids)} tokens and the model's context is {policy.max_length}: use "
            "fewer few-shot examples, a model with a longer context, or drop the row",
            path=longest.id,
            column="prompt",
        )
    return prompts


def fixed_batches(prompts: Sequence[Example], samples: int, max_rows: int) -> list[list[int]]:
    """Problems grouped by prompt length; depends on nothing but the problems and the two numbers."""
    size = max(1, max_rows // samples)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].prompt_ids), i))
    return [order[start : start + size] for start in range(0, len(order), size)]
