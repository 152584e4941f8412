"""Sources: where rows come from. Each file registers the sources that share its layout."""

from stepkd.data.sources import (  # noqa: F401  (they register their sources)
    contract_rows,
    generated,
    math_shepherd,
    prm800k,
    problems,
    processbench,
)
from stepkd.data.sources.registry import Benchmark, RawRow, Source, SourceOption, get_source, list_sources, register

__all__ = ["Benchmark", "RawRow", "Source", "SourceOption", "get_source", "list_sources", "register"]
