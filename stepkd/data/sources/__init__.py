"""Sources: where rows come from. Each file registers one source, or a family that shares its layout."""

from stepkd.data.sources import (
    contests,
    contract_rows,
    generated,
    gsm8k,
    math,
    math_shepherd,
    mistakes,
    prm800k,
    processbench,
    word_problems,
)
from stepkd.data.sources.registry import Option, RawRow, Source, get_source, list_sources, register

__all__ = [
    "Option",
    "RawRow",
    "Source",
    "contests",
    "contract_rows",
    "generated",
    "get_source",
    "gsm8k",
    "list_sources",
    "math",
    "math_shepherd",
    "mistakes",
    "prm800k",
    "processbench",
    "register",
    "word_problems",
]
