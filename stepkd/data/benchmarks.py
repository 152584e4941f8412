"""Benchmarks by name: which problems, how they are asked, and how the answer is read.

Each is one entry beside the other sources (:mod:`stepkd.data.sources.problems`); everything can be overridden on the
command line, and everything stands in the evaluation's settings.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepkd.data.sources import Benchmark, list_sources
from stepkd.data.spec import DataConfig, parse_spec
from stepkd.errors import ConfigError, nearest

BENCHMARKS: dict[str, Benchmark] = {each.name: each for each in list_sources() if isinstance(each, Benchmark)}
"""Benchmarks by name; each is a data source of that name."""


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


def benchmark_data(benchmark: Benchmark, data: str | None, limit: int | None) -> DataConfig:
    """Which rows to evaluate.

    Args:
        benchmark: the benchmark.
        data: None for its own hub data set; a file or folder; or settings as in ``parse_spec`` without the source's
            name (``path=x.jsonl,split=test`` or ``task=modular,n=200``).
        limit: number of problems, or None for all.
    """
    if data is None or (data and (Path(data).expanduser().exists() or "=" not in data)):
        spec = DataConfig(source=benchmark.name, path=data)
    else:
        spec = parse_spec(f"{benchmark.name}:{data}")
    single = spec.path is not None and Path(spec.path).expanduser().is_file()  # is evaluated whatever its name says
    split = spec.split if single else spec.split or benchmark.evaluated_split
    return dataclasses.replace(spec, split=split, limit=spec.limit if limit is None else limit)


def next_evaluation(spec: DataConfig | None, template: str, *, steps: bool = False) -> str:
    """Options of ``stepkd evaluate``, or of ``stepkd evaluate-prm``, for a model that was trained on such data.

    Args:
        spec: its held-out rows, else None.
        template: name of the prompt template it was trained with.
        steps: whether it scores steps; else it solves problems.
    """
    source = "rows" if spec is None else spec.source
    words = "" if spec is None else _data_words(spec)
    if steps:
        if spec is None or (source != "task" and spec.path is None):
            return "--sets gsm8k math"
        more = f"path={words}" if spec.path else f"{words},split={spec.split}" if spec.split else words
        return f"--sets {shlex.quote(words if source == 'rows' else f'{source}:{more}')}"
    name = source if source in BENCHMARKS else "rows"
    if name == "rows" and not words:
        name = {"task": "task", "math": "math500"}.get(template, "rows")
    words = words or "PROBLEMS.jsonl" * (name == "rows")
    return f"--benchmark {name} --data {shlex.quote(words)}" if words else f"--benchmark {name}"


def _data_words(spec: DataConfig) -> str:
    """A file, or what else distinguishes a data setting, as ``--data`` takes it."""

    def flat(options: Mapping[str, Any], start: str = "") -> list[str]:
        parts: list[str] = []
        for key, value in options.items():
            parts += flat(value, f"{start}{key}.") if isinstance(value, Mapping) else [f"{start}{key}={value}"]
        return parts

    hub = {} if spec.hub is None else {"hub": spec.hub, **({} if spec.split is None else {"split": spec.split})}
    return spec.path or ",".join(flat({**hub, **spec.options}))


def default_ks(samples: int) -> Sequence[int]:
    """The k of pass@k and maj@k that are reported: powers of two up to the number of samples, and that number."""
    return sorted({samples, *(2**i for i in range(samples.bit_length()))})
