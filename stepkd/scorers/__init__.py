"""Step scorers: trained process reward models, published ones, prompted judges; and what to do with scores.

The names of scorers load on first use, because a model library comes with them.
"""

from __future__ import annotations

from stepkd.lazy import lazily

_HOMES = {
    "calibration": "fit_temperature scaled",
    "critic": "GenerativeVerifier",
    "critiques": "CritiqueForm Tags get_form",
    "implicit": "ImplicitPRM",
    "judge": "PromptedJudge",
    "load": "ASPRM Critic Implicit Judge MathShepherdPRM PRM QwenPRM TRLPRM load_scorer scorer_of",
    "prm": "PRMScorer",
    "rules": "Arithmetic Checker Gain",
    "scorer": (
        "Judged Meaning Reduction ScorerConfig Solutions StepScorer default_reduction reduce_scores reduce_solutions "
        "score_one score_rows"
    ),
}

__getattr__ = lazily(__name__, _HOMES)
