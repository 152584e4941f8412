"""``rows``: files, hub datasets and rows in memory, in contract form, in TRL's, or so through ``columns``.

TRL's types become contract rows:

* ``messages`` (or ``conversations`` with ``from`` and ``value``): the last assistant turn is the ``solution`` and all
  that stands before it the ``prompt``; earlier assistant turns are context and are not trained on.
* ``prompt`` and ``completion``: the completion is the ``solution``, unless there is a ``label`` or ``token_ids``.
* ``chosen`` and ``rejected`` without a prompt (or as whole conversations): their shared beginning is the ``prompt``.
* A completion, solution or side of a pair that is a list of messages: the last one, an assistant turn, is the text.
* ``instruction``, ``input``, ``output`` (Alpaca): instruction and input are the prompt, also where ``columns`` maps it.

Ids and answers written as numbers become texts (42 -> "42", 7.0 -> "7"); nothing else is touched. Other columns are
kept; one spelt nearly like a missing contract column is an error unless ``extra_columns: keep``.

The other way, :func:`to_stepwise` and :func:`trl_row` make step-labelled rows, and TRL's, of labelled completions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from stepkd.data.rows import COMPLETION, STEPWISE, Row, chat_message, passed_on, validate
from stepkd.data.sources.source import Options, RawRow
from stepkd.errors import DataError
from stepkd.steps.labels import THRESHOLD, Neutral, label_kind, verdicts

Messages = list[dict[str, Any]]

_KEYS = {"from": "role", "value": "content"}
_ROLES = {"human": "user", "gpt": "assistant"}


def contract_row(raw: RawRow, options: Options) -> Row:
    """A row in contract form."""
    row = dict(raw)
    _read_alpaca(row, raw.columns)
    _read_conversation(row, raw)
    for column in ("prompt", "solution", "completion"):
        if isinstance(row.get(column), list):
            turns = _messages(row[column], raw, column)
            row[column] = turns if column == "prompt" else _last_turn(row, column, turns, raw)
    if "chosen" in row and "rejected" in row:
        _read_pair(row, raw)
    if "completion" in row and not {"solution", "label", "token_ids"} & set(row):
        row["solution"] = row["completion"]
    return row


def _read_alpaca(row: Row, columns: Mapping[str, str]) -> None:
    if "instruction" in row and "prompt" not in row:
        row["prompt"] = row["instruction"]
        row |= {"solution": row["output"]} if "output" in row and "solution" not in row else {}
    elif columns.get("prompt") != "instruction":
        return
    more = row.get("input")
    if isinstance(more, str) and more.strip() and isinstance(row["prompt"], str):
        row["prompt"] = f"{row['prompt']}\n\n{more}"


def _read_conversation(row: Row, raw: RawRow) -> None:
    column = "messages" if "messages" in row else "conversations"
    taken = any(row.get(name) is not None for name in ("solution", "completion", "completions", "chosen"))
    if taken or not isinstance(row.get(column), list):
        return
    turns = _messages(row.pop(column), raw, column)
    if turns[-1]["role"] == "assistant":
        row["prompt"], row["solution"] = turns[:-1], turns[-1]["content"]
    elif row.get("prompt") is None:
        row["prompt"] = turns


def _read_pair(row: Row, raw: RawRow) -> None:
    """Texts of both sides, and their shared beginning as the prompt where there is none (TRL's ``extract_prompt``)."""
    for side in ("chosen", "rejected"):
        if isinstance(row[side], list):
            row[side] = _messages(row[side], raw, side)
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    implicit = prompt is None or (isinstance(chosen, list) and not isinstance(prompt, list))
    if implicit and isinstance(chosen, str | list) and type(chosen) is type(rejected):
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
        shared -= chosen[shared - 1 : shared] == " "  # belongs to the completion
        if shared or prompt is None:
            row["prompt"] = chosen[:shared]
        row |= {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    for side in ("chosen", "rejected"):
        if isinstance(turns := row[side], list):
            if len(turns) != 1:
                raise raw.error(f"has {len(turns)} messages behind the prompt; one assistant turn is read", column=side)
            row[side] = _last_turn(row, side, turns, raw)


def _last_turn(row: Row, column: str, turns: Messages, raw: RawRow) -> str:
    """The text of an assistant turn; turns before it go to the prompt."""
    if turns[-1]["role"] != "assistant":
        raise raw.error(f"ends with the role {turns[-1]['role']!r}; end it with the assistant's turn", column=column)
    if turns[:-1]:
        if not isinstance(row.get("prompt", []), list):
            raise raw.error("has several messages and the prompt is text; give messages in both", column=column)
        row["prompt"] = [*row.get("prompt", []), *turns[:-1]]
    return str(turns[-1]["content"])


def _messages(value: list[Any], raw: RawRow, column: str) -> Messages:
    """Chat messages with role and content; a content that is a list of text parts is joined."""
    turns: Messages = []
    for number, message in enumerate(value, start=1):
        if isinstance(message, Mapping):
            message = {_KEYS.get(key, key): each for key, each in message.items() if each is not None}
            parts = message.get("content")
            if isinstance(parts, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
                message["content"] = "".join(part["text"] for part in parts)
            if isinstance(role := message.get("role"), str):
                message["role"] = _ROLES.get(role, role)
        if (invalid := chat_message(message)) is not None:
            raise raw.error(f"message {number} of {len(value)} {invalid}", column=column)
        turns.append(message)
    if not turns:
        raise raw.error("must not be an empty list of messages", column=column)
    return turns


# --- labelled rows as others have them -----------------------------------------------------------------------------


def to_stepwise(row: Mapping[str, Any], *, keep: Sequence[str] = ()) -> Row:
    """Turn a labelled completion into a STEPWISE row; a row that is one already stays as it is.

    Args:
        row: a COMPLETION row with ``steps``, the text of every step (``step_ends`` counts tokens, so only the
            tokenizer's owner can cut the completion), and ``step_labels``.
        keep: further columns to copy where the row has them, for example where the labels came from.

    Returns:
        ``prompt``, ``completions``, ``labels`` and ``id``; ``outcome`` where the answer was graded, ``answer`` where
        the completion carries the gold answer.

    Raises:
        DataError: no labels or step texts, or another number of steps than labels.
    """
    if "completions" in row:
        return dict(row)
    name = row.get("id") or row.get("problem_id", "?")
    for column, lacks in (
        ("step_labels", "no step_labels: label it first (stepkd label)"),
        ("steps", "no steps as texts: label it first (stepkd label --solutions Existing)"),
    ):
        if row.get(column) is None:
            raise DataError(f"the completion has {lacks}", path=name, column=column)
    validate(dict(row), COMPLETION, extra="keep")
    found: Row = {"id": name, "prompt": row["prompt"], "completions": row["steps"], "labels": row["step_labels"]}
    found |= passed_on({**row, "outcome": row["correct"]}, "outcome", "answer", *keep)
    return validate(found, STEPWISE, path=name, extra="keep")


def trl_row(
    row: Mapping[str, Any],
    *,
    neutral: Neutral = "correct",
    threshold: float = THRESHOLD,
    counts: Counter[str] | None = None,
) -> Row | None:
    """Cast a STEPWISE row of any label kind to TRL's stepwise-supervision type, with a boolean at every step.

    A step without a label is joined to the next labelled step, whose label then stands behind both; unlabelled steps at
    the end are cut off. No text before a label is lost, no label is made up. (TRL had a trainer for the type until
    2026, huggingface/trl pull request 7133; the type lives on in its published data sets.)

    Args:
        row: a STEPWISE row.
        neutral: what a rating of 0 becomes; ``mask``: such a step counts as unlabelled.
        threshold: a chance is correct from here on, in (0, 1).
        counts: updated with the number of steps that became ``correct`` and ``incorrect``, among them ``neutral`` ones,
            that were ``joined`` or ``cut``, and of rows left ``empty``.

    Returns:
        The row with boolean labels and its other columns as they were; None when no label is left.

    Raises:
        ConfigError: a threshold outside (0, 1).
        DataError: the row breaks its contract.
    """
    validate(dict(row), STEPWISE, extra="keep")
    found: Counter[str] = Counter()
    if label_kind(row["labels"]) == "rating":
        found["neutral"] += row["labels"].count(0)
    steps: list[str] = []
    labels: list[bool] = []
    waiting: list[str] = []
    marks = verdicts(row["labels"], neutral=neutral, threshold=threshold)
    for step, label in zip(row["completions"], marks, strict=True):
        waiting.append(step)
        if label is not None:
            found["correct" if label else "incorrect"] += 1
            found["joined"] += len(waiting) - 1
            steps.append("\n".join(waiting))
            labels.append(label)
            waiting = []
    found["cut"] += len(waiting)
    found["empty"] += not labels
    if counts is not None:
        counts.update(found)
    return {**row, "completions": steps, "labels": labels} if labels else None
