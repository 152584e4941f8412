"""Step scorers: trained process reward models, published ones, prompted judges; and what to do with scores.

The names of scorers load on first use, because a model library comes with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepkd.scorers.scorer import (
    Meaning,
    Reduction,
    Solutions,
    StepScorer,
    default_reduction,
    reduce_scores,
    reduce_solutions,
    score_one,
    score_rows,
)

if TYPE_CHECKING:
    from stepkd.scorers.calibration import TemperatureScaling, fit_temperature
    from stepkd.scorers.judge import PromptedJudge
    from stepkd.scorers.load import ScorerOptions, load_scorer
    from stepkd.scorers.prm import PRMScorer
    from stepkd.scorers.published import load_published
    from stepkd.scorers.rules import ArithmeticScorer, CheckerScorer, GainScorer

_LAZY = {
    "ArithmeticScorer": "rules",
    "CheckerScorer": "rules",
    "GainScorer": "rules",
    "PRMScorer": "prm",
    "PromptedJudge": "judge",
    "ScorerOptions": "load",
    "TemperatureScaling": "calibration",
    "fit_temperature": "calibration",
    "load_published": "published",
    "load_scorer": "load",
}

__all__ = [
    "ArithmeticScorer",
    "CheckerScorer",
    "GainScorer",
    "Meaning",
    "PRMScorer",
    "PromptedJudge",
    "Reduction",
    "ScorerOptions",
    "Solutions",
    "StepScorer",
    "TemperatureScaling",
    "default_reduction",
    "fit_temperature",
    "load_published",
    "load_scorer",
    "reduce_scores",
    "reduce_solutions",
    "score_one",
    "score_rows",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"stepkd.scorers.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
