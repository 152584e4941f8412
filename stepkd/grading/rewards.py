"""Answer correctness as a reward function in TRL's signature."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from stepkd.errors import DataError
from stepkd.grading.pool import Grader, Verdict

_lock = threading.Lock()
_shared: Grader | None = None


def shared_grader() -> Grader:
    """The grader with default settings that all reward calls of this process share; made at the first call."""
    global _shared
    with _lock:
        if _shared is None:
            _shared = Grader()
        return _shared


def completion_text(completion: str | Sequence[Any] | None) -> str:
    """The text of a completion in either of TRL's forms.

    Args:
        completion: a string, or chat messages (the last one counts; ``content`` is text or a list of parts with a
            ``text`` key). ``None`` counts as empty.

    Returns:
        The text that holds the answer.

    Raises:
        DataError: the completion is of neither form.
    """
    if completion is None or isinstance(completion, str):
        return completion or ""
    if isinstance(completion, Sequence) and all(isinstance(message, Mapping) for message in completion):
        messages: list[Any] = list(completion)
        content = messages[-1].get("content") if messages else None
        if isinstance(content, Sequence) and not isinstance(content, str):
            return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
        if content is None or isinstance(content, str):
            return content or ""
    raise DataError(
        f"a completion of type {type(completion).__name__} is neither text nor a list of chat messages with 'content'",
        column="completions",
    )


def accuracy_reward(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any
) -> list[float]:
    """1.0 for each completion whose final answer equals the reference answer, else 0.0.

    Args:
        prompts: the prompts; not read (TRL passes them).
        completions: strings or lists of chat messages.
        answer: the reference answers, text or numbers; a GSM8K solution that ends in ``#### x`` counts as ``x``.
        **kwargs: the other columns; not read.

    Returns:
        One reward per completion. Unparsed answers and timeouts earn 0.0.

    Raises:
        DataError: lengths differ, or a column has the wrong type.
    """
    del prompts, kwargs
    golds = [str(a) if isinstance(a, int | float) and not isinstance(a, bool) else a for a in answer]
    grades = shared_grader().grade([completion_text(c) for c in completions], golds)
    return [1.0 if grade.verdict is Verdict.CORRECT else 0.0 for grade in grades]
