"""Sources: where rows come from. Each file registers the sources that share its layout."""

from stepkd.data.sources import (  # noqa: F401  (they register their sources)
    contract_rows,
    generated,
    math,
    math_shepherd,
    prm800k,
    processbench,
    word_problems,
)
from stepkd.data.sources.registry import RawRow, Source, SourceOption, get_source, list_sources, register

__all__ = ["RawRow", "Source", "SourceOption", "get_source", "list_sources", "register"]
