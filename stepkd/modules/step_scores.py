"""The steps of completions, and what a step scorer thinks of them: for focus, step credit and rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepkd.data.encode import Example
from stepkd.errors import ConfigError
from stepkd.scorers import ScorerOptions, Solutions, StepScorer, load_scorer
from stepkd.steps import text_from_ids


def step_texts(tokenizer: Any, example: Example) -> list[str]:
    """Texts of a completion's steps; trailing ones of nothing but space and end tokens are left out."""
    text = text_from_ids(tokenizer, example.completion_ids)
    steps = [text.span_text(*span) for span in example.spans]
    while steps and not steps[-1].strip():
        steps.pop()
    return steps


def load_step_scorer(text: str, setting: str, options: ScorerOptions | None = None) -> StepScorer:
    """Load a scorer that knows of steps.

    Args:
        text, options: as for :func:`stepkd.scorers.load_scorer`.
        setting: where the recipe names it.

    Raises:
        ConfigError, ModelError: no such scorer, or one that scores whole solutions only.
    """
    return check_step_scorer(load_scorer(text, options), text, setting)


def check_step_scorer(scorer: StepScorer, text: str, setting: str) -> StepScorer:
    """The scorer, unless it scores whole solutions only.

    Raises:
        ConfigError: it does.
    """
    if scorer.meaning == "outcome":
        raise ConfigError(f"{setting}={text} scores whole solutions and knows nothing of steps")
    return scorer


def step_scores(
    scorer: StepScorer, rows: Sequence[Mapping[str, Any]], steps: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Scores of the steps of one solution per row; none for a solution without a step.

    Raises:
        DataError: a row that the scorer cannot judge.
    """
    asked = [Solutions(row, [each]) for row, each in zip(rows, steps, strict=True) if each]
    found = iter(scorer.score(asked) if asked else [])
    return [next(found)[0] if each else [] for each in steps]
