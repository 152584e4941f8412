"""Sources: where rows come from. Each file registers the sources that share its layout."""

from stepkd.data.sources import contract_rows, generated, math, math_shepherd, prm800k, processbench, word_problems
from stepkd.data.sources.registry import RawRow, Source, SourceOption, get_source, list_sources, register

__all__ = [
    "RawRow",
    "Source",
    "SourceOption",
    "contract_rows",
    "generated",
    "get_source",
    "list_sources",
    "math",
    "math_shepherd",
    "prm800k",
    "processbench",
    "register",
    "word_problems",
]
