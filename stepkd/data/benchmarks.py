"""Benchmarks by name: which problems, how they are asked, and how the answer is read.

One line each; everything can be overridden on the command line, and everything stands in the evaluation's settings.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepkd.data.spec import DataConfig, parse_spec
from stepkd.errors import ConfigError, nearest


@dataclass(frozen=True)
class Benchmark:
    """How a set of problems is evaluated by default."""

    name: str
    """Name on the command line and in results."""
    source: str
    """Data source (``stepkd.data.sources``)."""
    split: str | None
    """Split that is evaluated; None: the source's default."""
    template: str
    """Built-in prompt template."""
    extractors: tuple[str, ...]
    """How the final answer is found, in order."""
    max_new_tokens: int
    """Longest completion in tokens."""
    help: str
    """What it is, with the reference."""


_WORDS = ("hash", "boxed", "answer_phrase", "last_number")
_ANY = ("hash", "boxed", "answer_phrase", "latex", "last_number")
_LATEX = ("boxed", "hash", "answer_phrase", "latex")

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "gsm8k", "gsm8k", "test", "gsm8k", _WORDS, 1024, "GSM8K test, 1,319 word problems (arXiv 2110.14168)"
        ),
        Benchmark("math500", "math500", "test", "math", _LATEX, 2048, "MATH-500 (arXiv 2305.20050, appendix)"),
        Benchmark(
            "svamp", "svamp", None, "gsm8k", _WORDS, 1024, "SVAMP, one- and two-step word problems (arXiv 2103.07191)"
        ),
        Benchmark("multiarith", "multiarith", None, "gsm8k", _WORDS, 1024, "MultiArith, two-step word problems"),
        Benchmark("amc", "amc", None, "math", _LATEX, 2048, "AMC problems from a file or hub id"),
        Benchmark("aime", "aime", None, "math", _LATEX, 4096, "AIME problems from a file or hub id, integer answers"),
        Benchmark(
            "reasoning_gym", "reasoning_gym", "test", "gsm8k", _WORDS, 1024, "generated problems (reasoning-gym)"
        ),
        Benchmark("task", "task", "test", "task", ("hash",), 256, "the tiny world: every step has an exact checker"),
        Benchmark("rows", "rows", None, "gsm8k", _ANY, 1024, "any file or hub data set with prompt and answer"),
    )
}
"""Benchmarks by name."""


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


def benchmark_data(benchmark: Benchmark, data: str | None, limit: int | None) -> DataConfig:
    """Which rows to evaluate.

    Args:
        benchmark: the benchmark.
        data: None for its own hub data set; a file or folder; or settings as in ``parse_spec`` without the source's
            name (``path=x.jsonl,split=test`` or ``task=modular,n=200``).
        limit: number of problems, or None for all.
    """
    if data is None:
        spec = DataConfig(source=benchmark.source)
    elif Path(data).expanduser().exists() or "=" not in data:
        spec = DataConfig(source=benchmark.source, path=data)
    else:
        spec = parse_spec(f"{benchmark.source}:{data}")
    changes: dict[str, Any] = {}
    single = spec.path is not None and Path(spec.path).expanduser().is_file()  # is evaluated whatever its name says
    if spec.split is None and benchmark.split is not None and not single:
        changes["split"] = benchmark.split
    if limit is not None:
        changes["limit"] = limit
    return dataclasses.replace(spec, **changes)


def next_evaluation(spec: DataConfig | None, template: str, *, steps: bool = False) -> str:
    """Options of ``stepkd evaluate``, or of ``stepkd evaluate-prm``, for a model that was trained on such data.

    Args:
        spec: its held-out rows, else None.
        template: name of the prompt template it was trained with.
        steps: whether it scores steps; else it solves problems.
    """
    source = "rows" if spec is None else spec.source
    words = "" if spec is None else _data_words(spec)
    own = [benchmark for benchmark in BENCHMARKS.values() if benchmark.source == source != "rows"]
    if steps:
        if spec is None or (source != "task" and spec.path is None):
            return "--sets gsm8k math"
        more = f"path={words}" if spec.path else f"{words},split={spec.split}" if spec.split else words
        return f"--sets {shlex.quote(words if source == 'rows' else f'{source}:{more}')}"
    name = own[0].name if own else {"task": "task", "math": "math500"}.get(template, "rows") if not words else "rows"
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
