"""Data: row contracts, sources, prompt templates, tokenisation, batches of one optimiser step.

Here are the names that a script needs; contracts, encoders and batches stand in their modules. :class:`StepData` and
its like need Lightning and load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepkd.data.io import read_rows
from stepkd.data.overlap import overlap_report
from stepkd.data.rows import CONTRACTS, validate
from stepkd.data.spec import DataSpec, check_training_use, load_rows, parse_spec
from stepkd.data.step_labels import LabelRule
from stepkd.data.templates import TEMPLATES, PromptTemplate, get_template

if TYPE_CHECKING:
    from stepkd.data.datamodule import StepData
    from stepkd.data.labelled_data import FeedbackData, PairData, StepLabelData

__all__ = [
    "CONTRACTS",
    "TEMPLATES",
    "DataSpec",
    "FeedbackData",
    "LabelRule",
    "PairData",
    "PromptTemplate",
    "StepData",
    "StepLabelData",
    "check_training_use",
    "get_template",
    "load_rows",
    "overlap_report",
    "parse_spec",
    "read_rows",
    "validate",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "StepData":
        return import_module("stepkd.data.datamodule").StepData
    if name in __all__:
        return getattr(import_module("stepkd.data.labelled_data"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
