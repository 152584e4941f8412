"""Data: row contracts, sources, prompt templates, tokenisation, batches of one optimiser step.

Here are the names that a script needs; contracts, encoders and batches stand in their modules. :class:`StepData` and
its like need Lightning and load on first use.
"""

from __future__ import annotations

from stepkd.lazy import lazily

_HOMES = {
    "completion": "Completion",
    "config": "DataConfig check_training_use parse_spec",
    "datamodule": "StepData overlap_report",
    "encode": "LabelRule",
    "io": "read_rows",
    "load": "load_rows",
    "rows": "CONTRACTS validate",
    "templates": "PromptTemplate TEMPLATES get_template",
}

__getattr__ = lazily(__name__, _HOMES)
