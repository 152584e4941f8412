r"""Benchmark a model: sample solutions, grade their answers, and sum up with intervals.

  stepkd evaluate --model runs/sft --benchmark gsm8k --data data/gsm8k --limit 200 --out runs/sft-gsm8k
  stepkd evaluate --model HuggingFaceTB/SmolLM2-135M-Instruct --benchmark math500 \
      --sampling.n 8 --sampling.temperature 0.8 --out runs/smollm2-math500
  stepkd compare runs/base-gsm8k runs/sft-gsm8k
  stepkd evaluate --config parity/qwen2.5-0.5b-gsm8k --check_parity --out runs/parity

`stepkd benchmarks` lists the benchmarks. A killed run is resumed by the same command, with any number of processes
(torchrun, accelerate, srun), and ends with the same result. --out then holds results.jsonl, summary.json and
settings.json. Recipes of parity/ hold a published accuracy, with which the result is compared; --check_parity ends with
exit code 1 unless they agree.
"""

from __future__ import annotations

from typing import Any

from stepkd.evaluation.config import EvaluateConfig


def run(config: EvaluateConfig) -> int:
    """Run ``stepkd evaluate``."""
    from stepkd.evaluation.runner import PROBLEMS, evaluate

    config, job = config.start({PROBLEMS: "evaluating"})
    summary = evaluate(config, options=job)
    if not summary:
        return job.share_is_done("results")
    print_summary(job.console, summary)
    job.say(f"\nper-problem rows, settings and summary: {config.out}")
    return config.parity(summary["metrics"]["pass@1"], job.say)


def print_summary(console: Any, summary: dict[str, Any]) -> None:
    """Table of metrics with their intervals."""
    from rich.table import Table

    from stepkd.statistics import percent, shown

    title = f"{summary['model']} on {summary['benchmark']}: {summary['problems']} problems"
    console.print(title, highlight=False, markup=False)
    table = Table()
    table.add_column("metric")
    table.add_column("value, 95% interval", justify="right")
    for name, metric in summary["metrics"].items():
        if name == "mean_tokens":
            table.add_row(name, shown(metric, ".1f"))
        else:
            table.add_row(f"{name} (%)", percent(metric))
    console.print(table)
