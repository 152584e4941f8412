"""Step labels (Monte-Carlo continuations, exact checkers, outcomes, judges), consensus of two, and preference data.

The names load on first use, because a model library comes with some of them.
"""

from __future__ import annotations

from stepkd.lazy import lazily

_HOMES = {
    "convert": (
        "Balanced Converted ConverterConfig Demonstrations MathShepherd Preference Stepwise TRLStepwise Unpaired "
        "consensus_filter convert_rows even_pairs"
    ),
    "curriculum": "Replay ThinkMode",
    "job": "run_label_job run_pair_job",
    "labellers": "Labeller LabellerConfig Outcome Scored ScorerLabeller Solution StepLabels Sums TaskChecker",
    "monte_carlo": "MonteCarlo MonteCarloLabeller",
    "quality": "LabelQuality label_quality",
    "refinements": "Refinements",
    "selection": "Selected WithinBudget k_centres row_cost uncertainty",
    "settings": (
        "Cut Existing Fitted LabelConfig OwnSteps PAIR_JOBS Reject ContinuationShare Sampled SelfEvaluation "
        "StepPairConfig StepScore TreePairConfig"
    ),
    "step_pairs": "StepPairBuilder",
    "tree_pairs": "TreePairBuilder",
    "workbench": "Workbench pair_record",
}

__getattr__ = lazily(__name__, _HOMES)
