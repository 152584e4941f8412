"""Step labels: Monte-Carlo rollouts, exact checkers, outcomes and judges; consensus between any two."""

from stepkd.labels import demonstrations as demonstrations  # registers its converters
from stepkd.labels.checker import CheckerLabeller
from stepkd.labels.consensus import Consensus, consensus_filter, report_on
from stepkd.labels.convert import CONVERTERS, Converted, Converter, ConvertOptions, convert_rows
from stepkd.labels.job import run_label_job
from stepkd.labels.judge import ScorerLabeller
from stepkd.labels.labeller import Labeller, Solution, StepLabels
from stepkd.labels.monte_carlo import MonteCarloLabeller
from stepkd.labels.outcome import OutcomeLabeller
from stepkd.labels.quality import LabelQuality, label_quality
from stepkd.labels.settings import LABELLERS, LabelSpec
from stepkd.labels.setup import JobParts, job_parts, make_labeller

__all__ = [
    "CONVERTERS",
    "LABELLERS",
    "CheckerLabeller",
    "Consensus",
    "ConvertOptions",
    "Converted",
    "Converter",
    "JobParts",
    "LabelQuality",
    "LabelSpec",
    "Labeller",
    "MonteCarloLabeller",
    "OutcomeLabeller",
    "ScorerLabeller",
    "Solution",
    "StepLabels",
    "consensus_filter",
    "convert_rows",
    "job_parts",
    "label_quality",
    "make_labeller",
    "report_on",
    "run_label_job",
]
