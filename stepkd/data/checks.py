"""Checks of row values, used by the contracts in :mod:`stepkd.data.rows`.

A value check takes one value and returns what is wrong with it and how to mend it, or None. A row check takes the
whole row and returns ``(column, message)`` or None. No check casts anything.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from stepkd.errors import DataError
from stepkd.steps.labels import label_kind

Check = Callable[[Any], str | None]
RowCheck = Callable[[Mapping[str, Any]], tuple[str, str] | None]

ROLES = ("system", "user", "assistant", "tool")
MAX_LOGPROB = 1e-3
"""Log-probabilities may exceed 0 by this much: low-precision softmax rounds."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint naming the closest known name, or else all of them.

    Args:
        name: what the user wrote.
        known: the names that would have been accepted.

    Returns:
        ``did you mean 'x'?`` or ``known are a, b, c``.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names) or 'none'}"


def shown(value: object) -> str:
    """Return a value's type and a short form of it, for messages."""
    try:
        form = repr(value)
    except (ValueError, RecursionError):  # integers of more than 4,300 digits, deep nesting
        form = "(too long to show)"
    return f"{type(value).__name__} {form if len(form) <= 60 else form[:57] + '...'}"


# --- texts, prompts, steps -----------------------------------------------------------------------------------------


def text(value: object) -> str | None:
    """Accept any text that can be encoded as UTF-8."""
    if not isinstance(value, str):
        return f"must be text, found {shown(value)}"
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"half of a surrogate pair at character {error.start + 1}; export the file again as valid UTF-8"
    return None


def filled_text(value: object) -> str | None:
    """Accept text that is more than white space."""
    message = text(value)
    if message is None and not str(value).strip():
        return "must not be empty"
    return message


def prompt(value: object) -> str | None:
    """Accept text, or chat messages that do not end with the assistant."""
    if isinstance(value, str):
        return filled_text(value)
    if not isinstance(value, list):
        return f"must be text or a list of chat messages, found {shown(value)}"
    if not value:
        return "must not be an empty list of messages"
    for index, message in enumerate(value, start=1):
        wrong = chat_message(message)
        if wrong is not None:
            return f"message {index} of {len(value)} {wrong}"
    if value[-1]["role"] == "assistant":
        return "ends with an assistant message; end a prompt with the user (a start of the answer is answer_prefix)"
    return None


def chat_message(message: object) -> str | None:
    """Accept an object with a known ``role`` and a text as ``content``."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        return f"must be an object with 'role' and 'content', found {shown(message)}"
    if message["role"] not in ROLES:
        return f"has role {message['role']!r}; {did_you_mean(str(message['role']), ROLES)}"
    wrong = text(message["content"])
    return None if wrong is None else f"has a content that is wrong: {wrong}"


def steps(value: object) -> str | None:
    """Accept a list of one or more step texts, none of them empty."""
    if isinstance(value, list) and not value:
        return "has zero steps; drop the row or segment the completion"
    return prefix_steps(value)


def prefix_steps(value: object) -> str | None:
    """As :func:`steps`, but the list may be empty: zero steps are the start of the solution."""
    if not isinstance(value, list):
        return f"must be a list of step texts, found {shown(value)}"
    for index, step in enumerate(value, start=1):
        wrong = filled_text(step)
        if wrong is not None:
            return f"step {index} of {len(value)} {wrong}"
    return None


# --- labels --------------------------------------------------------------------------------------------------------


def labels(value: object) -> str | None:
    """Accept one label per step, of one kind (see :func:`label_kind`), at least one of them not null."""
    if not isinstance(value, list):
        return f"must be a list with one label per step, found {shown(value)}"
    try:
        label_kind(value)
    except DataError as error:
        return str(error)
    return None


# --- other values --------------------------------------------------------------------------------------------------


def boolean(value: object) -> str | None:
    """Accept True and False only."""
    return None if isinstance(value, bool) else f"must be true or false, found {shown(value)}; nothing is cast"


def boolean_or_null(value: object) -> str | None:
    """Accept True, False, and None for "not known yet"."""
    return None if value is None else boolean(value)


def whole_number(value: object) -> str | None:
    """Accept integers, booleans excluded."""
    return None if is_whole_number(value) else f"must be a whole number, found {shown(value)}"


def mapping(value: object) -> str | None:
    """Accept objects (dicts)."""
    return None if isinstance(value, Mapping) else f"must be an object, found {shown(value)}"


def one_of(*allowed: str) -> Check:
    """Accept the given texts only."""

    def check(value: object) -> str | None:
        return None if value in allowed else f"must be one of {', '.join(allowed)}, found {shown(value)}"

    return check


def list_of(accepts: Callable[[Any], bool], what: str) -> Check:
    """Accept lists whose items all pass ``accepts``; ``what`` names the items in the message."""

    def check(value: object) -> str | None:
        if not isinstance(value, list):
            return f"must be a list of {what}, found {shown(value)}"
        for index, item in enumerate(value, start=1):
            if not accepts(item):
                return f"item {index} of {len(value)} does not fit a list of {what}: found {shown(item)}"
        return None

    return check


def is_whole_number(value: object) -> bool:
    """Whether a value is an integer and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_token_id(value: object) -> bool:
    """Whether a value can be a token id."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_logprob(value: object) -> bool:
    """Whether a value is a finite log-probability, up to rounding."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value <= MAX_LOGPROB


def is_probability_or_null(value: object) -> bool:
    """Whether a value is None or a number in [0, 1]."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1)


# --- checks of a whole row -----------------------------------------------------------------------------------------


def same_length(first: str, second: str) -> RowCheck:
    """Two list columns, where both are present, must have as many entries."""

    def check(row: Mapping[str, Any]) -> tuple[str, str] | None:
        left, right = row.get(first), row.get(second)
        if left is None or right is None or len(left) == len(right):
            return None
        return second, f"has {len(right)} entries for {len(left)} {first}; there must be as many"

    return check


def one_of_columns(names: Sequence[str], reason: str) -> RowCheck:
    """At least one of some columns must hold something, because somebody reads it."""

    def check(row: Mapping[str, Any]) -> tuple[str, str] | None:
        if any(row.get(name) is not None for name in names):
            return None
        return names[0], (
            f"missing column {' or '.join(map(repr, names))}: {reason}. The row has {', '.join(map(repr, row))}; if "
            f"another column holds it, say so with columns: {{{names[0]}: <that column>}}"
        )

    return check


def sides_differ(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The two sides of a pair must not be the same text."""
    if row["chosen"] == row["rejected"]:
        return "rejected", "is the same text as 'chosen'; such a pair teaches nothing, drop the row"
    return None


def ends_partition(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """``step_ends`` must cut ``token_ids`` into non-empty steps without a rest."""
    ends, length = row["step_ends"], len(row["token_ids"])
    if not ends:
        return "step_ends", "has zero steps; drop the rollout or segment its completion"
    if ends[0] < 1 or any(a >= b for a, b in itertools.pairwise(ends)):
        return "step_ends", f"must be positive and strictly increasing (no empty step), found {shown(ends)}"
    if ends[-1] != length:
        return "step_ends", f"must end at the number of token_ids, {length}, found {ends[-1]}"
    return None
