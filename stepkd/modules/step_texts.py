"""The steps of a completion as texts, for what scores them."""

from __future__ import annotations

from typing import Any

from stepkd.data.encode import Example
from stepkd.steps import text_from_ids


def step_texts(tokenizer: Any, example: Example) -> list[str]:
    """Texts of a completion's steps; trailing ones of nothing but space and end tokens are left out."""
    text = text_from_ids(tokenizer, example.completion_ids)
    steps = [text.span_text(*span) for span in example.spans]
    while steps and not steps[-1].strip():
        steps.pop()
    return steps
