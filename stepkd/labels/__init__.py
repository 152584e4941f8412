"""Step labels (Monte-Carlo rollouts, exact checkers, outcomes, judges), consensus of two, and preference data.

The names load on first use, because a model library comes with some of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "consensus": ("Consensus", "consensus_filter", "report_on"),
    "convert": ("CONVERTERS", "Converter", "convert_rows"),
    "feedback": ("ConvertOptions", "Converted", "answered", "even_pairs"),
    "job": ("JobParts", "job_parts", "make_labeller", "run_label_job"),
    "labellers": ("CheckerLabeller", "Labeller", "OutcomeLabeller", "ScorerLabeller", "Solution", "StepLabels"),
    "monte_carlo": ("MonteCarloLabeller",),
    "pair_job": ("run_pair_job",),
    "quality": ("LabelQuality", "label_quality"),
    "settings": ("LABELLERS", "PAIR_JOBS", "JobSpec", "LabelSpec", "StepPairSpec", "TreePairSpec"),
    "step_pairs": ("StepPairBuilder", "step_pair_builder"),
    "tree_pairs": ("TreePairBuilder", "tree_pair_builder"),
    "workbench": ("PairBuilder", "Workbench", "pair_record"),
}
"""Modules and what is exported of each."""


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"stepkd.labels.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
