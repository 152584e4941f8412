"""The steps of completions, and what a step scorer thinks of them: for focus, step credit and rewards.

Focus is distillation where it is needed: a weight for every step, by its score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stepkd.data.completion import Completion
from stepkd.errors import ConfigError, check_bounds
from stepkd.scorers.load import load_scorer
from stepkd.scorers.scorer import ScorerConfig, Solutions, StepScorer
from stepkd.steps.labels import check_threshold, passes
from stepkd.steps.text import text_from_ids


def load_step_scorer(text: ScorerConfig | str, setting: str, *, device: str = "auto") -> StepScorer:
    """Load a scorer that knows of steps.

    Args:
        text, device: as for :func:`stepkd.scorers.load_scorer`.
        setting: where the recipe names it.

    Raises:
        ConfigError, ModelError: no such scorer, or one that scores whole solutions only.
    """
    loaded = load_scorer(text, device=device)
    if loaded.meaning == "outcome":
        raise ConfigError(f"{setting}={text} scores whole solutions and knows nothing of steps")
    return loaded


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


@dataclass(frozen=True)
class FocusConfig:
    """How much the steps of a completion count, by their scores."""

    scorer: ScorerConfig | str
    """What scores the steps: a word, such as ``checker`` (the tiny world), ``arithmetic`` (incorrect sums), a process
    reward model or ``judge:MODEL``; or a class with its settings, as for ``stepkd score --scorer``."""
    threshold: float = 0.5
    """A step with a lower score is incorrect, in (0, 1)."""
    correct: float = 0.0
    """Weight of the tokens of correct steps, and of steps without a score, in [0, 1]; those of incorrect steps have 1,
    and by default they alone count."""

    def __post_init__(self) -> None:
        check_threshold(self.threshold, "focus.threshold")
        check_bounds("focus.", self, correct="[0, 1]")

    def weights(self, scores: Sequence[float]) -> tuple[float, ...]:
        """Weight of every step of a completion by its score.

        Args:
            scores: one for each step, in [0, 1]; NaN for a step without one.

        Returns:
            One weight for each step, 0 or more.
        """
        return tuple(1.0 if passes(score, self.threshold) is False else self.correct for score in scores)


def focused(examples: Sequence[Completion], spec: FocusConfig, scorer: StepScorer, tokenizer: Any) -> list[Completion]:
    """The examples with a weight for each of their steps; trailing ones of nothing but space and end tokens have no
    score.

    Raises:
        DataError: a row that the scorer cannot judge.
    """
    written = []
    for example in examples:
        text = text_from_ids(tokenizer, example.token_ids)
        written.append(without_blank_end([text.span_text(*span) for span in example.spans]))
    scores = step_scores(scorer, [example.row for example in examples], written)
    return [
        replace(each, step_weights=spec.weights([*known, *[math.nan] * (len(each.step_ends) - len(known))]))
        for each, known in zip(examples, scores, strict=True)
    ]


def without_blank_end(steps: list[str]) -> list[str]:
    """Texts of steps without trailing ones of nothing but space and end tokens, which say nothing to be scored."""
    while steps and not steps[-1].strip():
        steps.pop()
    return steps
