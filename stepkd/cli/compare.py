"""Compare two evaluations of one benchmark problem by problem, or those of two step scorers solution by solution.

stepkd compare runs/base-gsm8k runs/sft-gsm8k
stepkd compare runs/prm-a-processbench runs/prm-b-processbench
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Settings of ``stepkd compare``."""

    POSITIONAL: ClassVar = ("a", "b")

    a: str
    """Folder of the first evaluation (stepkd evaluate, or stepkd evaluate-prm)."""
    b: str
    """Folder of the second one, of the same benchmark and data."""
    seed: int = 0
    """Seed of the intervals."""
    out: str | None = None
    """Folder for comparison.json; without it the comparison is only shown."""


def run(config: CompareConfig) -> int:
    """Run ``stepkd compare``."""
    from stepkd.evaluation.metrics import COMPARISON_NAME, compare_runs
    from stepkd.evaluation.process import compare_process
    from stepkd.runs.files import write_json
    from stepkd.runs.job import SUMMARY_NAME
    from stepkd.statistics import percent

    folders = [Path(folder) / SUMMARY_NAME for folder in (config.a, config.b)]
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in folders if path.is_file()]
    if len(summaries) == 2 and all(summary.get("kind") == "process" for summary in summaries):
        differences = compare_process(config.a, config.b, (summaries[0], summaries[1]), seed=config.seed)
        print(f"F1 and accuracies, or PRMScore, of {config.b} minus {config.a}, paired by solution, 95% intervals:")
        for name, interval in differences.items():
            print(f"  {name:<36} {percent(interval.to_dict())}")
        found = {name: interval.to_dict() for name, interval in differences.items()}
    else:
        comparison = compare_runs(config.a, config.b, seed=config.seed)
        print(comparison)
        found = comparison.to_dict()
    if config.out:
        write_json(Path(config.out) / COMPARISON_NAME, found)
    return 0
