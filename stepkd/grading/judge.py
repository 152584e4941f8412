"""Sampled completions to judged samples: verdict, vote, and, in the tiny world, a label for every step.

Evaluation, validation during training and completion files all judge through this one function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, TypeVar

import numpy as np

from stepkd.data.completion import Completion
from stepkd.grading.extract import extract_answer
from stepkd.grading.normalise import canonical_answer
from stepkd.grading.pool import Grader
from stepkd.steps.segment import get_segmenter, segment
from stepkd.steps.text import TokenizedText
from stepkd.tasks.rows import check_row, is_task_row

Row = Mapping[str, Any]
T = TypeVar("T")


def judge(
    rows: Sequence[Row], completions: Sequence[Sequence[Completion]], grader: Grader
) -> list[list[dict[str, Any]]]:
    """Grade every completion of every row.

    Args:
        rows: P problem rows with ``answer``; rows of the tiny world also carry ``task`` and ``meta``.
        completions: for each row its samples.
        grader: extracts and compares answers.

    Returns:
        For each row a list of sample records, the layout of :mod:`stepkd.evaluation.metrics`: ``completion``,
        ``extracted``, ``verdict``, ``tokens``, ``finish``, ``vote`` (:func:`vote_keys`), ``logprob`` (summed,
        temperature 1) and ``step_labels`` (None where no exact checker exists). A completion that was cut off counts
        by a closed box or a finished ``####`` line only.
    """
    flat = [(row, completion) for row, samples in zip(rows, completions, strict=True) for completion in samples]
    grades = grader.grade(
        [completion.text for _, completion in flat],
        [str(row["answer"]) for row, _ in flat],
        cut_off=[completion.finish == "length" for _, completion in flat],
        rows=[row for row, _ in flat],
    )
    votes = vote_keys(_grouped([grade.extracted for grade in grades], completions), grader)
    judged = [
        {
            "completion": completion.text,
            "extracted": grade.extracted,
            "verdict": str(grade.verdict),
            "tokens": len(completion.token_ids),
            "finish": completion.finish,
            "vote": vote,
            "logprob": None if completion.raw_logprobs is None else sum(completion.raw_logprobs.tolist()),
            "step_labels": step_labels(row, completion.text),
        }
        for (row, completion), grade, vote in zip(flat, grades, [key for keys in votes for key in keys], strict=True)
    ]
    return _grouped(judged, completions)


def _grouped(flat: Sequence[T], like: Sequence[Sequence[object]]) -> list[list[T]]:
    """A flat list in the groups of another."""
    remaining = iter(flat)
    return [[next(remaining) for _ in group] for group in like]


def vote_keys(answers: Sequence[Sequence[str | None]], grader: Grader) -> list[list[str | None]]:
    """Group the answers of each problem by what they say to each other; the reference answer has no part in it.

    Args:
        answers: for each problem the answers found, None where there is none.
        grader: compares two answers; they are one where each answers the other.

    Returns:
        In the same layout a key per answer: equal keys are equal answers, None stays None. A key is the plain form
        (:func:`~stepkd.grading.canonical_answer`) of the class's first answer.
    """
    plain = [[canonical_answer(answer) if answer else None for answer in row] for row in answers]
    spelled: list[dict[str, str]] = [{} for _ in answers]
    for forms, keys, row in zip(spelled, plain, answers, strict=True):
        for key, answer in zip(keys, row, strict=True):
            if key is not None and answer is not None:
                forms.setdefault(key, answer)
    pairs = [(number, *both) for number, forms in enumerate(spelled) for both in combinations(forms, 2)]
    texts = [(spelled[number][a], spelled[number][b]) for number, a, b in pairs]
    forth, back = grader.same(texts), grader.same([(b, a) for a, b in texts])
    first_of: dict[tuple[int, str], str] = {}
    for (number, first, second), *both in zip(pairs, forth, back, strict=True):
        if all(both) and (number, first) not in first_of:
            first_of.setdefault((number, second), first)
    return [
        [None if key is None else first_of.get((number, key), key) for key in keys] for number, keys in enumerate(plain)
    ]


def votes_of(rows: Sequence[Sequence[Row]], extractors: Sequence[str], grader: Grader) -> list[list[str | None]]:
    """:func:`vote_keys` of rows with ``completion`` and ``finish``, grouped by problem."""

    def found(row: Row) -> str | None:
        return extract_answer(str(row.get("completion", "")), extractors, cut_off=row.get("finish") == "length")

    return vote_keys([[found(row) for row in group] for group in rows], grader)


def step_labels(row: Row, completion: str, steps: Sequence[str] | None = None) -> list[bool] | None:
    """Exact label of every step of a completion.

    Args:
        row: the problem row.
        completion: the completion's text.
        steps: texts of its steps; None cuts the text with the ``newline`` segmenter, so that blank lines are no steps
            here any more than they are in training. A completion without text is one (incorrect) step.

    Returns:
        One label per step, or None for rows that no task generated.
    """
    if not is_task_row(row):
        return None
    return check_row(row, solution_steps(completion) if steps is None else steps)


def solution_steps(completion: str, segmenter: str = "newline") -> list[str]:
    """The steps of a text, a character at a time in place of tokens; one without words for an empty text."""
    length = len(completion)
    text = TokenizedText(tuple(range(length)), completion, tuple(range(1, length + 1)))
    return [text.span_text(*span) for span in segment(get_segmenter(segmenter), text)] or [""]


def completion_row(
    row: Row,
    completion: Completion,
    sample: Mapping[str, Any],
    step_ends: Sequence[int],
    steps: Sequence[str] | None = None,
) -> dict[str, Any]:
    """One line of a completion file (the COMPLETION contract of :mod:`stepkd.data.rows`), without provenance columns.

    Args:
        row: the problem row.
        completion: the sampled completion.
        sample: its record from :func:`judge`.
        step_ends: exclusive token ends of its steps.
        steps: texts of these steps, which are then judged one by one. None keeps the labels that ``sample`` has where
            there are as many as steps; else (another segmenter, a token across a line's end) the row has no labels.
    """
    result = {
        "problem_id": str(row["id"]),
        "prompt": row["prompt"],
        "completion": completion.text,
        "token_ids": completion.token_ids.tolist(),
        "logprobs": completion.logprobs.tolist(),
        "step_ends": list(step_ends),
        "finish": completion.finish,
        "correct": sample["verdict"] == "correct",
        "answer": row["answer"],
    }
    if completion.raw_logprobs is None:
        result["raw_logprobs"] = None  # unknown, and not those of ``logprobs``
    elif not np.array_equal(completion.raw_logprobs, completion.logprobs):
        result["raw_logprobs"] = completion.raw_logprobs.tolist()
    labels = sample["step_labels"] if steps is None else step_labels(row, completion.text, steps)
    if labels is not None and len(labels) == len(step_ends):
        result["step_labels"] = labels
    if steps is not None:
        result["steps"] = list(steps)
    result |= {name: row[name] for name in ("task", "meta") if name in row}
    return result
