"""Scores for rows that carry a solution each: rollouts and step-labelled rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from stepkd.errors import DataError
from stepkd.scorers.scorer import Solutions, StepScorer
from stepkd.steps import SEGMENTERS, TokenizedText, get_segmenter, segment, spans_from_ends, text_from_ids


def problem_key(row: Mapping[str, Any]) -> str:
    """What rows of one problem have in common: their ``problem_id``, else their prompt."""
    if row.get("problem_id") is not None:
        return str(row["problem_id"])
    return json.dumps(row.get("prompt"), sort_keys=True)


def score_rows(scorer: StepScorer, rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Score the solution of every row; rows of one problem are scored together.

    A scorer with a ``score_rows`` of its own (a trained model, which reads sampled token ids as they are) is asked that
    way, any other gets step texts.

    Args:
        scorer: any step scorer.
        rows: rollouts or rows with ``completions``.

    Returns:
        For each row one number in [0, 1] per step, NaN where there is none. A rollout whose last step holds nothing but
        the end token has no score there; it is left out of the list.

    Raises:
        DataError: a row without steps, or whose step texts cannot be told.
    """
    own = getattr(scorer, "score_rows", None)
    if own is not None:
        return list(own(rows))
    tokenizer = getattr(scorer, "tokenizer", None)
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(problem_key(row), []).append(number)
    problems = [
        Solutions(rows[numbers[0]], [row_steps(rows[i], tokenizer) for i in numbers]) for numbers in groups.values()
    ]
    scores: list[list[float]] = [[] for _ in rows]
    for numbers, solutions in zip(groups.values(), scorer.score(problems), strict=True):
        for number, values in zip(numbers, solutions, strict=True):
            scores[number] = values
    return scores


def row_steps(row: Mapping[str, Any], tokenizer: Any | None = None, *, segmenter: str = "newline") -> list[str]:
    """Step texts of a row.

    Args:
        row: has ``completions`` or ``steps``; or ``token_ids`` with ``step_ends`` that the tokenizer decodes to the
            row's ``completion``; or else a ``completion`` (or ``solution``) text, which is cut into steps and must then
            have as many as there are ``step_ends``.
        tokenizer: tells the texts of ``token_ids``; None: they cannot be read.
        segmenter: cuts a row that comes as one text; the row's own ``segmenter`` goes before it.

    Raises:
        DataError: none of these, or another number of steps than ``step_ends``.
    """
    name = str(row.get("id", "?"))
    for column in ("completions", "steps"):
        if row.get(column) is not None:
            return list(row[column])
    ends = row.get("step_ends")
    if ends is not None and tokenizer is not None:
        completion = text_from_ids(tokenizer, row["token_ids"])
        if row.get("completion") in (None, completion.text):
            texts = [completion.span_text(*span) for span in spans_from_ends(ends, len(completion))]
            while texts and not texts[-1].strip():
                texts.pop()  # the end token alone
            return _some(texts, name)
    text = row.get("completion") if row.get("completion") is not None else row.get("solution")
    if not isinstance(text, str):
        raise DataError("the row has no steps: neither 'completions' nor a 'completion' text", path=name)
    cut_by = row["segmenter"] if row.get("segmenter") in SEGMENTERS else segmenter
    characters = TokenizedText(tuple(range(len(text))), text, tuple(range(1, len(text) + 1)))
    texts = _some([text[slice(*span)] for span in segment(get_segmenter(cut_by), characters)], name)
    if ends is not None and len(texts) != len(ends):
        raise DataError(
            f"the row's {len(ends)} steps cannot be told: its token ids are not of this scorer's tokenizer, and its "
            f"text has {len(texts)} steps (segmenter {cut_by!r}); give rows with the step texts in a column 'steps'",
            path=name,
            column="token_ids",
        )
    return texts


def _some(texts: list[str], name: str) -> list[str]:
    if not texts or any(not text.strip() for text in texts):
        raise DataError("the row's solution is empty, or one of its steps is: drop the row", path=name)
    return texts


def step_scores(row: Mapping[str, Any], scores: Sequence[float]) -> list[float | None]:
    """Scores as JSON: None for NaN, and for a last step of a rollout that holds nothing but the end token.

    Raises:
        DataError: the row declares fewer steps than were scored.
    """
    values = [None if math.isnan(score) else score for score in scores]
    declared = row.get("completions") if row.get("step_ends") is None else row["step_ends"]
    if declared is None:
        return values
    missing = len(declared) - len(values)
    if missing < 0 or (missing and row.get("step_ends") is None):
        raise DataError(
            f"the row has {len(declared)} steps and {len(values)} were scored: its 'steps' and 'step_ends' do not "
            "belong together",
            path=str(row.get("id", "?")),
        )
    return [*values, *[None] * missing]
