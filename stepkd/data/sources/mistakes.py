"""Other sets with a human-marked first wrong step, in ProcessBench's layout; evaluation only.

``bigbench_mistake`` (Tyen et al. 2024, arXiv 2311.08516, github ``WHGTyen/BIG-Bench-Mistake``, Apache-2.0): PaLM 2
chains on BIG-Bench tasks. BIG-Bench asks that its tasks stay out of training data. The original files' ``input`` and
``mistake_index`` (0-based, null: no mistake) are read as well.
``mr_gsm8k`` (Zeng et al. 2024, arXiv 2312.17080, github ``dvlab-research/MR-GSM8K``, MIT): solutions of GSM8K *test*
problems and of variants of them. The original counts steps from 1; here ``label`` counts from 0.
"""

from __future__ import annotations

from stepkd.data.rows import STEPWISE
from stepkd.data.sources.processbench import FIRST_ERROR_READS, first_error_row
from stepkd.data.sources.registry import Options, RawRow, Row, Source, as_text, passed_on, register


def _map_bigbench(raw: RawRow, options: Options) -> Row:
    if raw["first_error"] is None:  # the original's way to say that no step is wrong
        raw["first_error"] = -1
    return first_error_row(raw) | _texts(raw, answer="gold", final_answer="stated")


def _map_mr_gsm8k(raw: RawRow, options: Options) -> Row:
    row = first_error_row(raw) | _texts(raw, answer="gold")
    return row | passed_on(raw, "question_type", "error_reason")


def _texts(raw: RawRow, **columns: str) -> Row:
    """Row column -> text of the raw column, where there is one."""
    return {name: as_text(raw[column]) for name, column in columns.items() if raw.get(column) is not None}


BIGBENCH_MISTAKE = register(
    Source(
        name="bigbench_mistake",
        help="BIG-Bench Mistake: first wrong steps marked by humans, for evaluation only",
        contract=STEPWISE,
        map_row=_map_bigbench,
        reads={
            **FIRST_ERROR_READS,
            "prompt": ("problem", "input"),
            "first_error": ("label", "mistake_index"),
            "gold": ("target",),
            "stated": ("answer",),
        },
        optional=frozenset({"outcome", "id", "gold", "stated"}),
        splits={"test": "test"},
        default_split="test",
        evaluation_only=frozenset({"*"}),
    )
)
"""The BIG-Bench Mistake source."""

MR_GSM8K = register(
    Source(
        name="mr_gsm8k",
        help="MR-GSM8K: first wrong steps marked by humans, for evaluation only",
        contract=STEPWISE,
        map_row=_map_mr_gsm8k,
        reads={**FIRST_ERROR_READS, "gold": ("gold_answer",)},
        optional=frozenset({"outcome", "id", "gold"}),
        keeps=("question_type", "error_reason"),
        splits={"test": "test"},
        default_split="test",
        evaluation_only=frozenset({"*"}),
    )
)
"""The MR-GSM8K source."""
