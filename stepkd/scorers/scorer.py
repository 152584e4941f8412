"""What a step scorer is, how rows are given to one, and how its step scores become one score per solution.

Which reduction suits which scores (Zhang et al. 2025, arXiv 2501.07301; core-methods 5.4): judged or human labels say
whether a step is correct, so a solution is as good as all its steps together (``product``, Lightman et al. 2023, or
``min``, Wang et al. 2023); Monte-Carlo labels estimate future success, so the ``last`` one already sums up the rest.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from stepkd.errors import DataError, check_choice
from stepkd.grading.judge import solution_steps
from stepkd.steps.format import Meaning
from stepkd.steps.segment import SEGMENTERS, spans_from_ends
from stepkd.steps.text import text_from_ids

__all__ = ["Meaning"]

Reduction = Literal["product", "min", "mean", "last"]
"""How step scores become one: their product (favours short solutions), lowest, mean, or last score."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Solutions:
    """One problem with the solutions to score; they share the prompt."""

    row: Row
    """Problem row: ``prompt``, and for checkers ``task`` and ``meta``; a judge may use ``answer`` or ``solution``."""
    solutions: Sequence[Sequence[str]]
    """Step texts of every solution, each with at least one step; separators at a step's end are optional."""


class Judged(list[float]):
    """Step scores of one solution, with what a scorer says beside them.

    Args:
        scores: one per step.
        facts: JSON values that rows keep: texts it wrote, tokens it generated, ...
        prediction: index of the first incorrect step, or -1, by the scorer's own rule; None: it names none.
    """

    def __init__(self, scores: Iterable[float], *, facts: Mapping[str, Any], prediction: int | None) -> None:
        super().__init__(scores)
        self.facts, self.prediction = facts, prediction


def facts_of(scores: Sequence[float]) -> Mapping[str, Any]:
    """The facts of :class:`Judged` scores; none of others."""
    return scores.facts if isinstance(scores, Judged) else {}


class StepScorer(Protocol):
    """Scores steps: a trained or published PRM, a judge, or a rule. Any class with these three members is one::

    scorer = load_scorer("runs/prm")
    scorer.score([Solutions({"id": "7", "prompt": "2 + 3 * 4 = ?"}, [["3 * 4 = 12", "2 + 12 = 14"]])])
    """

    meaning: Meaning
    """What the scores estimate; decides the default reduction."""

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        """Score every step.

        Args:
            problems: problems with their solutions.

        Returns:
            For each problem and solution one number in [0, 1] per step: the higher, the better. An outcome scorer
            gives its one number to the last step, and NaN to the steps before it. A solution that does not fit into
            the model's context gets NaN for the steps that were cut off.
        """
        ...

    def provenance(self) -> dict[str, Any]:
        """What the scores came from: model, format, settings.

        Returns:
            JSON values, which a job writes beside its results and compares when it is resumed.
        """
        ...


class ScorerConfig(ABC):
    """Settings of what scores steps: one of its subclasses (:mod:`stepkd.scorers.load`)."""

    def __str__(self) -> str:
        return str(getattr(self, "path", type(self).__name__.lower()))

    @abstractmethod
    def build(self, *, device: str = "auto", max_rows: int = 32) -> StepScorer:
        """Make the scorer.

        Args:
            device: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` takes a GPU when there is one.
            max_rows: most rows in one forward pass, at least 1.

        Raises:
            ConfigError: settings that the model cannot be used under, or an impossible device.
            ModelError: nothing loadable there, or a model without a step head.
        """


def score_one(scorer: StepScorer, prompt: str, steps: Sequence[str]) -> list[float]:
    """Scores of one solution's steps: the simplest use of a scorer.

    Args:
        scorer: any step scorer; for one that needs more of a problem than its prompt (a checker) call
            :meth:`StepScorer.score` with the problem's row.
        prompt: the problem.
        steps: step texts, at least one.

    Returns:
        One number in [0, 1] per step, NaN where there is none; see :meth:`StepScorer.score`.
    """
    return scorer.score([Solutions({"id": "0", "prompt": prompt}, [steps])])[0][0]


# --- rows that carry a solution each: completions and step-labelled rows ----------------------------------------------


def problem_key(row: Row) -> str:
    """What rows of one problem have in common.

    Args:
        row: a completion or a step-labelled row.

    Returns:
        Its ``problem_id`` as text, else its ``prompt`` as JSON.
    """
    if row.get("problem_id") is not None:
        return str(row["problem_id"])
    return json.dumps(row.get("prompt"), sort_keys=True)


def by_problem(rows: Sequence[Row]) -> list[list[int]]:
    """Group rows by problem (:func:`problem_key`).

    Args:
        rows: in any order.

    Returns:
        Numbers of the rows of each problem, in the order in which the problems first occur.
    """
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(problem_key(row), []).append(number)
    return list(groups.values())


def score_rows(scorer: StepScorer, rows: Sequence[Row]) -> list[list[float]]:
    """Score the solution of every row; rows of one problem are scored together.

    A scorer with a ``score_rows`` of its own (a trained model, which reads sampled token ids as they are) is asked that
    way, any other gets step texts.

    Args:
        scorer: any step scorer.
        rows: completions or rows with ``completions``.

    Returns:
        For each row one number in [0, 1] per step, NaN where there is none: behind the longest text that a model reads,
        and in a solution that it cannot read (which may hold the model's own step marker). A completion whose last step
        holds nothing but the end token has no score there; it is left out of the list.

    Raises:
        DataError: a row without steps, or whose step texts cannot be told.
    """
    own = getattr(scorer, "score_rows", None)
    if own is not None:
        return list(own(rows))
    tokenizer = getattr(scorer, "tokenizer", None)
    groups = by_problem(rows)
    problems = [Solutions(rows[numbers[0]], [row_steps(rows[i], tokenizer) for i in numbers]) for numbers in groups]
    scores: list[list[float]] = [[] for _ in rows]
    for numbers, solutions in zip(groups, scorer.score(problems), strict=True):
        for number, values in zip(numbers, solutions, strict=True):
            scores[number] = values
    return scores


def row_steps(row: Row, tokenizer: Any | None = None) -> list[str]:
    """Step texts of a row.

    Args:
        row: has ``completions`` or ``steps``; or ``token_ids`` with ``step_ends`` that the tokenizer decodes to the
            row's ``completion``; or else a ``completion`` (or ``solution``) text, which is cut into steps (by the row's
            ``segmenter``, else at newlines) and must then have as many as there are ``step_ends``.
        tokenizer: tells the texts of ``token_ids``; None: they cannot be read.

    Returns:
        The texts, at least one where they are cut here, none of them then without words.

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
    cut_by = row["segmenter"] if row.get("segmenter") in SEGMENTERS else "newline"
    texts = _some(solution_steps(text, cut_by), name)
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


def declared_steps(row: Row) -> Sequence[Any] | None:
    """Something for each step that a row says it has; its length is the number of steps.

    Args:
        row: a completion or a step-labelled row.

    Returns:
        ``step_ends``, else ``completions``; None: the steps are still to be cut.
    """
    steps: Sequence[Any] | None = row.get("completions") if row.get("step_ends") is None else row["step_ends"]
    return steps


def step_scores(row: Row, scores: Sequence[float]) -> list[float | None]:
    """Scores as JSON: None for NaN, and for a last step of a completion that holds nothing but the end token.

    Args:
        row: the row that was scored.
        scores: of its steps, from :func:`score_rows`.

    Returns:
        One number or None for each step that the row declares, else for each score.

    Raises:
        DataError: the row declares fewer steps than were scored.
    """
    values = [None if math.isnan(score) else score for score in scores]
    declared = declared_steps(row)
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


# --- one score per solution -------------------------------------------------------------------------------------------


def default_reduction(meaning: Meaning) -> Reduction:
    """The reduction that suits what the scores mean.

    Args:
        meaning: ``correctness``, ``value`` or ``outcome``.

    Returns:
        ``product`` for correctness (Lightman et al. 2023, arXiv 2305.20050), ``last`` for value and outcome.

    Raises:
        ConfigError: an unknown meaning.
    """
    check_choice("meaning of scores", meaning, get_args(Meaning))
    return "product" if meaning == "correctness" else "last"


def reduce_scores(scores: Sequence[float], reduction: Reduction | None = None, *, meaning: Meaning) -> float | None:
    """Reduce the step scores of one solution to one.

    Args:
        scores: (steps,) numbers in [0, 1], the higher the better; NaN where a step has no score.
        reduction: how; None for the one that suits ``meaning``.
        meaning: what the scores estimate. An ``outcome`` scorer judges only the last step: NaN before it is ignored.

    Returns:
        A score in [0, 1]; None (the solution is unscored) when a step is NaN, save those just named: half a solution's
        product or minimum is not comparable with a whole one's.

    Raises:
        DataError: no scores, or a score outside [0, 1].
        ConfigError: an unknown reduction or meaning.
    """
    default = default_reduction(meaning)
    reduction = default if reduction is None else reduction
    check_choice("reduction", reduction, get_args(Reduction))
    values = list(map(float, scores))
    if not values or not all(math.isnan(value) or 0.0 <= value <= 1.0 for value in values):
        raise DataError(f"step scores are probabilities in [0, 1], at least one; found {values}")
    if meaning == "outcome":
        values = [value for value in values[:-1] if not math.isnan(value)] + values[-1:]
    if any(map(math.isnan, values)):
        return None
    if reduction == "product":
        return 0.0 if 0.0 in values else math.exp(math.fsum(map(math.log, values)))
    if reduction == "min":
        return min(values)
    return math.fsum(values) / len(values) if reduction == "mean" else values[-1]


def reduce_solutions(
    scores: Sequence[Sequence[Sequence[float]]], reduction: Reduction | None = None, *, meaning: Meaning
) -> list[list[float | None]]:
    """Reduce what `StepScorer.score` returns.

    Args:
        scores: per problem and solution the step scores.
        reduction, meaning: as in `reduce_scores`.

    Returns:
        Per problem and solution a score in [0, 1], or None where the solution is unscored.

    Raises:
        DataError, ConfigError: as in `reduce_scores`.
    """
    return [[reduce_scores(steps, reduction, meaning=meaning) for steps in solutions] for solutions in scores]
