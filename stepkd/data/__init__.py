"""Data: row contracts, sources, prompt templates, tokenisation, batches of one optimiser step.

Light names (row contracts, specs, templates) load at once; :class:`StepData` needs Lightning and loads on first use.
The function ``collate`` is in the module of its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepkd.data.batching import BatchPlan, micro_batches, rank_share
from stepkd.data.io import read_rows
from stepkd.data.overlap import overlap_report
from stepkd.data.rows import (
    CONTRACTS,
    DEMONSTRATION,
    PREFERENCE,
    PROBLEM,
    ROLLOUT,
    STEP_PREFERENCE,
    STEPWISE,
    UNPAIRED,
    validate,
)
from stepkd.data.spec import DataSpec, check_training_use, load_rows, parse_spec
from stepkd.data.templates import TEMPLATES, PromptTemplate, get_template

if TYPE_CHECKING:
    from stepkd.data.batching import Position, StepBatch, StepLoader
    from stepkd.data.collate import MicroBatch
    from stepkd.data.datamodule import StepData
    from stepkd.data.encode import Encoder, Example
    from stepkd.data.feedback import FeedbackEncoder, FeedbackExample
    from stepkd.data.labelled_data import FeedbackData, PairData, StepLabelData
    from stepkd.data.pairs import PairEncoder, PairExample
    from stepkd.data.step_encode import StepEncoder, StepExample
    from stepkd.data.step_labels import LabelRule

_LAZY = {
    "Encoder": "encode",
    "Example": "encode",
    "FeedbackData": "labelled_data",
    "FeedbackEncoder": "feedback",
    "FeedbackExample": "feedback",
    "LabelRule": "step_labels",
    "MicroBatch": "collate",
    "PairData": "labelled_data",
    "PairEncoder": "pairs",
    "PairExample": "pairs",
    "Position": "batching",
    "StepBatch": "batching",
    "StepData": "datamodule",
    "StepEncoder": "step_encode",
    "StepExample": "step_encode",
    "StepLabelData": "labelled_data",
    "StepLoader": "batching",
}

__all__ = [
    "CONTRACTS",
    "DEMONSTRATION",
    "PREFERENCE",
    "PROBLEM",
    "ROLLOUT",
    "STEPWISE",
    "STEP_PREFERENCE",
    "TEMPLATES",
    "UNPAIRED",
    "BatchPlan",
    "DataSpec",
    "Encoder",
    "Example",
    "FeedbackData",
    "FeedbackEncoder",
    "FeedbackExample",
    "LabelRule",
    "MicroBatch",
    "PairData",
    "PairEncoder",
    "PairExample",
    "Position",
    "PromptTemplate",
    "StepBatch",
    "StepData",
    "StepEncoder",
    "StepExample",
    "StepLabelData",
    "StepLoader",
    "check_training_use",
    "get_template",
    "load_rows",
    "micro_batches",
    "overlap_report",
    "parse_spec",
    "rank_share",
    "read_rows",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"stepkd.data.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
