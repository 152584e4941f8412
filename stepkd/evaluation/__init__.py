"""Evaluation: benchmarks, a resumable runner, and metrics with intervals."""

from __future__ import annotations

from typing import Any

from stepkd.lazy import lazily

_HOMES = {
    "metrics": "Comparison compare_runs maj_at_k pass_at_k summarise",
    "config": "EvaluateConfig EvaluatePRMConfig ScoreConfig",
    "runner": "evaluate",
}


def __getattr__(name: str) -> Any:
    return lazily(__name__, _HOMES, name)
