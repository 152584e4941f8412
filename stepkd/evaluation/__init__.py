"""Evaluation: benchmarks, a resumable runner, and metrics with intervals."""

from __future__ import annotations

from stepkd.lazy import lazily

_HOMES = {
    "metrics": "Comparison compare_runs maj_at_k pass_at_k summarise",
    "config": "EvaluateConfig EvaluatePRMConfig ScoreConfig SearchJobConfig",
    "runner": "evaluate",
    "search": "search_benchmark",
}

__getattr__ = lazily(__name__, _HOMES)
