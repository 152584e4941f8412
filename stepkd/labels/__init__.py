"""Step labels (Monte-Carlo rollouts, exact checkers, outcomes, judges), consensus of two, and preference data."""

from stepkd.labels import demonstrations as demonstrations  # registers its converters
from stepkd.labels.checker import CheckerLabeller
from stepkd.labels.consensus import Consensus, consensus_filter, report_on
from stepkd.labels.convert import CONVERTERS, Converted, Converter, ConvertOptions, convert_rows
from stepkd.labels.feedback import answered
from stepkd.labels.job import run_label_job
from stepkd.labels.judge import ScorerLabeller
from stepkd.labels.labeller import Labeller, Solution, StepLabels
from stepkd.labels.monte_carlo import MonteCarloLabeller
from stepkd.labels.outcome import OutcomeLabeller
from stepkd.labels.pair_job import PairBuilder, PairParts, pair_record, run_pair_job
from stepkd.labels.pair_settings import StepPairSpec
from stepkd.labels.preference_pairs import even_pairs
from stepkd.labels.quality import LabelQuality, label_quality
from stepkd.labels.settings import LABELLERS, JobSpec, LabelSpec
from stepkd.labels.setup import JobParts, job_parts, make_labeller
from stepkd.labels.step_pair_setup import step_pair_parts
from stepkd.labels.step_pairs import StepPairBuilder
from stepkd.labels.tree_pairs import TreePairBuilder, tree_pair_parts
from stepkd.labels.tree_settings import TreePairSpec

__all__ = [
    "CONVERTERS",
    "LABELLERS",
    "CheckerLabeller",
    "Consensus",
    "ConvertOptions",
    "Converted",
    "Converter",
    "JobParts",
    "JobSpec",
    "LabelQuality",
    "LabelSpec",
    "Labeller",
    "MonteCarloLabeller",
    "OutcomeLabeller",
    "PairBuilder",
    "PairParts",
    "ScorerLabeller",
    "Solution",
    "StepLabels",
    "StepPairBuilder",
    "StepPairSpec",
    "TreePairBuilder",
    "TreePairSpec",
    "answered",
    "consensus_filter",
    "convert_rows",
    "even_pairs",
    "job_parts",
    "label_quality",
    "make_labeller",
    "pair_record",
    "report_on",
    "run_label_job",
    "run_pair_job",
    "step_pair_parts",
    "tree_pair_parts",
]
