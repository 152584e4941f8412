r"""Make step preference pairs, sampling for it; a killed job is resumed by the same command.

  stepkd pairs step --completions runs/labels --check judge:MODEL --out runs/step-pairs                       (Step-DPO)
  stepkd pairs tree --problems gsm8k:split=train --model MODEL --value SelfEvaluation --out runs/tree-pairs  (MCTS-DPO)
  torchrun --standalone --nproc_per_node 8 -m stepkd pairs ...       (shards the work over 8 processes)

--out then holds pairs.jsonl, summary.json, settings.json and config.yaml. Pairs of whole solutions are made without
sampling: stepkd convert ROWS --to Preference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepkd.cli.label import dropped, facts
from stepkd.labels.settings import PAIR_JOBS, PairJobConfig
from stepkd.runs.job import JobOptions

ACTIONS = PAIR_JOBS


def run(config: PairJobConfig) -> int:
    """Run ``stepkd pairs``."""
    config, job = config.start({"pairs": "building pairs of"})
    from stepkd.labels.job import run_pair_job

    summary = run_pair_job(config, options=job)
    if summary is None:
        return job.share_is_done("pairs")
    print_summary(job, summary)
    job.say(f"\npairs, summary and settings: {config.out}")
    return 0


def print_summary(job: JobOptions, summary: Mapping[str, Any]) -> None:
    """Counts, what was left out and why, and where in the solutions the pairs are."""
    from rich.table import Table

    job.say(
        f"{summary['pairs']} pairs of {summary['problems']} problems, from {summary['items_with_pairs']} of "
        f"{summary['items']} items" + dropped(summary),
        facts(summary["facts"]),
    )
    table = Table("step", "pairs", "share")
    for part in summary["by_position"][:12]:
        table.add_row(str(part["position"] + 1), str(part["pairs"]), f"{part['share']:.1%}")
    job.console.print(table)
