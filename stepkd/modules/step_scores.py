"""The steps of completions, and what a step scorer thinks of them: for focus, step credit and rewards.

Focus is distillation where it is needed: a weight for every step, by its score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from stepkd.data.collate import Batch
from stepkd.data.completion import Completion
from stepkd.errors import ConfigError, check_bounds
from stepkd.scorers.load import load_scorer
from stepkd.scorers.scorer import ScorerConfig, Solutions, StepScorer
from stepkd.steps.labels import check_threshold, passes
from stepkd.steps.text import text_from_ids


def step_texts(tokenizer: Any, example: Completion) -> list[str]:
    """Texts of a completion's steps; trailing ones of nothing but space and end tokens are left out."""
    text = text_from_ids(tokenizer, example.token_ids)
    steps = [text.span_text(*span) for span in example.spans]
    while steps and not steps[-1].strip():
        steps.pop()
    return steps


def load_step_scorer(
    text: ScorerConfig | str, setting: str, *, device: str = "auto", scorer: StepScorer | None = None
) -> StepScorer:
    """Load a scorer that knows of steps.

    Args:
        text, device: as for :func:`stepkd.scorers.load_scorer`.
        setting: where the recipe names it.
        scorer: an already loaded one, to be checked only.

    Raises:
        ConfigError, ModelError: no such scorer, or one that scores whole solutions only.
    """
    loaded = scorer or load_scorer(text, device=device)
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
    """A step with a lower score is wrong, in (0, 1)."""
    wrong: float = 1.0
    """Weight of the tokens of wrong steps, >= 0."""
    right: float = 0.0
    """Weight of the tokens of right steps, and of steps without a score, >= 0."""
    after: float | None = None
    """Weight of everything behind the first wrong step, >= 0: it follows from a mistake, and right or wrong says little
    of it. null: as its own score says."""

    def __post_init__(self) -> None:
        check_threshold(self.threshold, "focus.threshold")
        check_bounds("focus.", self, wrong="[0, inf)", right="[0, inf)", after="[0, inf)")
        if not self.wrong and not self.right and not self.after:
            raise ConfigError("focus: no step would count; raise wrong, right or after")

    def weights(self, scores: Sequence[float]) -> tuple[float, ...]:
        """Weight of every step by its score (NaN for none)."""
        weights: list[float] = []
        behind = False
        for score in scores:
            wrong = passes(score, self.threshold) is False
            weight = self.wrong if wrong else self.right
            weights.append(self.after if behind and self.after is not None else weight)
            behind = behind or wrong
        return tuple(weights)


class Focus:
    """Scores what is distilled on, step by step.

    Args:
        spec: the settings; the scorer is loaded at once.
        device: where it runs.
        scorer: an already loaded one.

    Raises:
        ConfigError, ModelError: no such scorer, or one that scores whole solutions only.
    """

    def __init__(self, spec: FocusConfig, device: str = "auto", *, scorer: StepScorer | None = None) -> None:
        self.spec = spec
        self.scorer = load_step_scorer(spec.scorer, "focus.scorer", device=device, scorer=scorer)

    def __call__(self, tokenizer: Any, examples: Sequence[Completion]) -> list[Completion]:
        """The examples with a weight for each of their steps.

        Raises:
            DataError: a row that the scorer cannot judge.
        """
        written = [step_texts(tokenizer, example) for example in examples]
        scores = step_scores(self.scorer, [example.row for example in examples], written)
        return [
            replace(each, step_weights=self.spec.weights([*known, *[math.nan] * (len(each.step_ends) - len(known))]))
            for each, known in zip(examples, scores, strict=True)
        ]


def token_weights(batch: Batch) -> Tensor:
    """Weight (N,) of every target of a micro-batch, float64: its step's, or 1 where steps have none."""
    weights: list[float] = []
    for example in batch.examples:
        for (start, end), weight in zip(example.spans, example.step_weights or repeat(1.0), strict=False):
            weights += [weight] * (end - start)
    return torch.tensor(weights, dtype=torch.float64, device=batch.targets_N.device)
