"""Train and evaluate tiny models on this machine in minutes, with nothing to download.

  stepkd quickstart
  stepkd quickstart --out runs/first --stages teacher student

The same command with --out resumes a killed quick start. Leaves report.html, figures, summary.json,
per-problem results and the models in --out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from stepkd.errors import check_bounds
from stepkd.quickstart import FIGURES, JOBS, STAGES, Context, StageName, next_commands, run_stages
from stepkd.runs.job import SUMMARY_NAME, Job, JobOptions
from stepkd.yaml_files import as_yaml


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Settings of ``stepkd quickstart``."""

    out: str | None = None
    """Run folder; a quick start in it is resumed. null: runs/quickstart, or the first free runs/quickstart-N."""
    overwrite: bool = False
    """Delete the quick start in ``out`` and start again."""
    stages: tuple[StageName, ...] | None = None
    """Stages to run, in the list's order whatever the order given; null: all. A stage needs those that make its models:
    teacher and student (training), evaluate and samples (what they answer), then the methods."""
    seed: int = 0
    """Seed of data, weights and sampling, 0 or more."""
    scale: float = 1.0
    """Factor on every stage's optimiser steps and problems, above 0; 1 takes minutes, 0.01 shows that all works."""

    def __post_init__(self) -> None:
        check_bounds("", self, scale="(0, inf)", seed="[0, inf)")


def run(config: QuickstartConfig) -> int:
    """Run ``stepkd quickstart``."""
    from rich.console import Console

    from stepkd.report.page import write_report
    from stepkd.runs.launcher import check_alone
    from stepkd.runs.process import quiet_libraries
    from stepkd.runs.rundir import free_path

    check_alone("the quick start")
    chosen = [stage for stage in STAGES if config.stages is None or stage.name in config.stages]
    out = Path(config.out) if config.out else free_path(Path("runs/quickstart"))
    outputs = [SUMMARY_NAME, "evaluations", FIGURES, *JOBS]
    job = Job(out, "quick start", outputs, JobOptions(overwrite=config.overwrite, config=as_yaml(config)))
    console = Console()
    context = Context(out, console, seed=config.seed, scale=config.scale)
    start = time.perf_counter()
    job.begin({"seed": context.seed, "scale": context.scale, "task": context.named["task"]})
    quiet_libraries()
    with job.alone():
        run_stages(context, chosen, job)
    console.print(f"[bold]done in {time.perf_counter() - start:.0f} s[/bold]; results in {out / SUMMARY_NAME}")
    console.print(f"report: {write_report([out])}", markup=False, highlight=False, soft_wrap=True)
    for command in next_commands(out):
        console.print(f"next: {command}", markup=False, highlight=False, soft_wrap=True)
    return 0
