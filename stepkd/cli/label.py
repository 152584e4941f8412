r"""Label the steps of solutions, sampled from problems or existing ones; a killed job is resumed by the same command.

  stepkd label --solutions Sampled --solutions.problems gsm8k:split=train --solutions.model MODEL \
      --solutions.sampling.n 8 --labeller MonteCarlo --labeller.sampling.n 8 --out runs/labels
  stepkd label --solutions Existing --solutions.completions runs/labels --labeller Scored \
      --labeller.scorer judge:MODEL --out runs/judged
  stepkd label --solutions Sampled --solutions.problems task:task=modular,n=500 --solutions.model MODEL \
      --labeller TaskChecker --out runs/true
  torchrun --standalone --nproc_per_node 8 -m stepkd label ...       (shards the work over 8 processes)

--out then holds labels.jsonl, summary.json, settings.json, config.yaml and, where one was fitted, threshold.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepkd.labels.settings import LabelConfig
from stepkd.runs.job import JobOptions


def run(config: LabelConfig) -> int:
    """Run ``stepkd label``."""
    config, job = config.start({"solutions": "preparing solutions", "labels": "labelling"})
    from stepkd.labels.job import run_label_job

    summary = run_label_job(config, options=job)
    if summary is None:
        return job.share_is_done("labels")
    print_summary(job, summary)
    job.say(f"\nlabels, summary and settings: {config.out}")
    return 0


def print_summary(job: JobOptions, summary: Mapping[str, Any]) -> None:
    """Counts, label balance per step, and what it cost."""
    from rich.table import Table

    job.say(
        f"{summary['labelled']} of {summary['solutions']} solutions of {summary['problems']} problems labelled"
        + dropped(summary),
        f"answers: {summary['correct_answers']} correct "
        f"({summary['correct_with_incorrect_step']} of them with an incorrect step), "
        f"{summary['incorrect_answers']} incorrect; {summary['cut_off']} solutions cut off",
        "" if summary["threshold"] is None else f"segmenter threshold: {summary['threshold']:.6g}",
        *(f"{name}: {found}" for name in ("sampling", "labelling") if (found := facts(summary[name]))),
    )
    table = Table(*("step", "solutions", "correct", "incorrect", "unlabelled", "share correct"))
    for row in [*summary["by_position"][:12], {"position": None} | summary["balance"]]:
        counts = [row[name] for name in ("correct", "incorrect", "unlabelled")]
        share = "-" if row["correct_share"] is None else f"{row['correct_share']:.1%}"
        position = "all" if row["position"] is None else row["position"] + 1
        table.add_row(*map(str, (position, sum(counts), *counts, share)))
    job.console.print(table)


def dropped(summary: Mapping[str, Any]) -> str:
    """What a job left out, by reason, in brackets."""
    reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in summary["dropped"].items())
    return f" (dropped: {reasons})" if reasons else ""


def facts(counts: Mapping[str, int]) -> str:
    """Counts by name, those of 0 left out."""
    return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items() if value)
