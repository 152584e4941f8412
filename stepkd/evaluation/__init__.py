"""Evaluation: benchmarks, a resumable runner, and metrics with intervals."""

from stepkd.data.benchmarks import BENCHMARKS, Benchmark, get_benchmark
from stepkd.evaluation.metrics import Comparison, compare_runs, maj_at_k, pass_at_k, summarise
from stepkd.evaluation.runner import EvaluationSpec, evaluate

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Comparison",
    "EvaluationSpec",
    "compare_runs",
    "evaluate",
    "get_benchmark",
    "maj_at_k",
    "pass_at_k",
    "summarise",
]
