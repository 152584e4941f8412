"""Step labels (Monte-Carlo continuations, exact checkers, outcomes, judges), consensus of two, and preference data.

The names load on first use, because a model library comes with some of them.
"""

from __future__ import annotations

from typing import Any

from stepkd.lazy import lazily

_HOMES = {
    "consensus": "consensus_filter",
    "convert": (
        "Balanced Binary Converted ConverterConfig Demonstrations MathShepherd Preference Stepwise TRLStepwise "
        "Unpaired completion_of convert_rows even_pairs"
    ),
    "job": "JobParts job_parts run_label_job",
    "labellers": "LabellerConfig MonteCarlo Outcome Scored ScorerLabeller Sums TaskChecker",
    "monte_carlo": "MonteCarloLabeller",
    "pair_job": "run_pair_job",
    "quality": "LabelQuality label_quality",
    "settings": (
        "Cut Existing Fitted LabelConfig OwnSteps PAIR_JOBS Reject ContinuationShare Sampled SelfEvaluation "
        "StepPairConfig StepScore TreePairConfig"
    ),
    "step_labels": "Labeller Solution StepLabels reduce_values",
    "step_pairs": "StepPairBuilder step_pair_builder",
    "tree_pairs": "TreePairBuilder tree_pair_builder",
    "workbench": "PairBuilder Workbench pair_record",
}


def __getattr__(name: str) -> Any:
    return lazily(__name__, _HOMES, name)
