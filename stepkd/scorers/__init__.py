"""Step scorers: trained process reward models, published ones, prompted judges; and what to do with scores.

The names of scorers load on first use, because a model library comes with them.
"""

from __future__ import annotations

from importlib import import_module
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
    "calibration": ("TemperatureScaling", "fit_temperature"),
    "judge": ("PromptedJudge",),
    "load": ("ScorerOptions", "load_scorer"),
    "prm": ("PRMScorer",),
    "published": ("load_published",),
    "rules": ("ArithmeticScorer", "CheckerScorer", "GainScorer"),
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
    for module, names in _LAZY.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
