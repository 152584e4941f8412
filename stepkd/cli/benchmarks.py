"""List the benchmarks of stepkd evaluate."""

from __future__ import annotations

from dataclasses import dataclass

from stepkd.data.sources import BENCHMARKS


@dataclass(frozen=True)
class BenchmarksConfig:
    """Settings of ``stepkd benchmarks``: none."""


def run(config: BenchmarksConfig) -> int:
    """Run ``stepkd benchmarks``."""
    for benchmark in BENCHMARKS.values():
        several = f", n = {benchmark.samples}" if benchmark.samples > 1 else ""
        print(f"{benchmark.name:<14} {benchmark.help}{several}")
    print("\nn (1 where none is shown): completions of a problem under --config eval/sampled")
    print("Step scorers: stepkd evaluate-prm, on ProcessBench (arXiv 2412.06559) or any step-labelled set (--sets)")
    return 0
