"""Sources by name: where rows come from. Each is an entry of ``stepkd/data/sources.yaml``, which is read here."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from stepkd.data.rows import CONTRACTS
from stepkd.data.sources.source import Benchmark, Source
from stepkd.errors import ConfigError, nearest
from stepkd.yaml_files import read_yaml


def _entry(name: str, settings: dict[str, Any]) -> Source:
    made: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    for key in {"map_row", "generate"} & set(settings):
        made[key] = resolve_name(f"{__name__}.{settings[key]}")
    if settings.get("contract"):
        made["contract"] = CONTRACTS[settings["contract"]]
    return (Benchmark if "template" in settings else Source)(name=name, **made)


_TABLE = read_yaml(Path(__file__).parent.with_suffix(".yaml"), "table of data sources")
SOURCES: dict[str, Source] = {name: _entry(name, _TABLE[name]) for name in sorted(_TABLE) if name != "shared"}
"""All sources by name."""
BENCHMARKS: dict[str, Benchmark] = {name: each for name, each in SOURCES.items() if isinstance(each, Benchmark)}
"""Those that models are evaluated on, by name."""


def get_source(name: str) -> Source:
    """Look a source up.

    Raises:
        ConfigError: unknown name, with the nearest known one.
    """
    if name not in SOURCES:
        raise ConfigError(
            f"no file, folder or data source named {name!r}.{nearest(name, SOURCES)} Known: {', '.join(SOURCES)}"
        )
    return SOURCES[name]


def get_benchmark(name: str) -> Benchmark:
    """Look a benchmark up.

    Raises:
        ConfigError: unknown name, with the nearest known one.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    file = name if Path(name).exists() else "FILE"
    raise ConfigError(
        f"unknown benchmark {name!r}.{nearest(name, BENCHMARKS)} Known: {', '.join(BENCHMARKS)}. Problems of your own: "
        f"--benchmark rows --data {file}. Step scorers (ProcessBench, ...): stepkd evaluate-prm"
    )


def asking(source: str, *, is_task: bool) -> Benchmark:
    """The benchmark whose template, extractors and length suit a data source.

    Args:
        source: name of the data source.
        is_task: whether the rows are of the tiny world, wherever they were read from.
    """
    return BENCHMARKS["task"] if is_task else BENCHMARKS.get(source, BENCHMARKS["rows"])
