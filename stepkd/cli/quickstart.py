"""Train and evaluate tiny models on this machine in minutes, with nothing to download.

  stepkd quickstart
  stepkd quickstart --out runs/first --stages teacher student
  stepkd quickstart --out runs/first --resume

Writes summary.json, per-problem results and the models below --out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from stepkd.errors import ConfigError, nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``stepkd quickstart``."""
    parser.add_argument("--out", help="run folder (default: runs/quickstart, numbered when it exists)")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="only these, in the list's order (see --list)")
    parser.add_argument("--list", action="store_true", help="list the stages")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, weights and sampling (default: 0)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on every stage's steps and problems (default: 1)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the quick start in --out")
    parser.add_argument("--overwrite", action="store_true", help="delete the quick start in --out and start again")


def run(arguments: argparse.Namespace) -> int:
    """Run ``stepkd quickstart``."""
    from rich.console import Console

    from stepkd.quickstart import STAGES, Context, run_stages
    from stepkd.runs.job import SETTINGS_NAME, SUMMARY_NAME, Job, JobOptions
    from stepkd.runs.launcher import check_alone
    from stepkd.runs.process import quiet_libraries
    from stepkd.runs.rundir import free_path

    if arguments.list:
        for stage in STAGES:
            print(f"{stage.name:<10} {stage.title}")
        return 0
    if not arguments.scale > 0:
        raise ConfigError(f"--scale {arguments.scale}: must be positive")
    known = [stage.name for stage in STAGES]
    for name in arguments.stages or ():
        if name not in known:
            raise ConfigError(f"unknown stage {name!r}.{nearest(name, known)} Known: {', '.join(known)}")
    check_alone("the quick start")
    chosen = [stage for stage in STAGES if not arguments.stages or stage.name in arguments.stages]
    out = Path(arguments.out) if arguments.out else free_path(Path("runs/quickstart"))
    if (out / SETTINGS_NAME).exists() and not (arguments.resume or arguments.overwrite):
        raise ConfigError(
            f"{out} already holds a quick start. Add --resume to continue it, --overwrite to delete it and start "
            "again, or give another --out"
        )
    outputs = [SUMMARY_NAME, "evaluations", "labels", *known]
    job = Job(out, "quick start", outputs, JobOptions(overwrite=arguments.overwrite))
    console = Console()
    context = Context(out, console, seed=arguments.seed, scale=arguments.scale)
    start = time.perf_counter()
    job.begin({"seed": context.seed, "scale": context.scale, "task": context.task})
    quiet_libraries()
    with job.alone():
        run_stages(context, chosen, job)
    console.print(f"[bold]done in {time.perf_counter() - start:.0f} s[/bold]; results in {out / SUMMARY_NAME}")
    console.print(f"look closer:  stepkd compare {out}/evaluations/teacher-sampled {out}/evaluations/student-sampled")
    console.print("train on your own data:  stepkd recipes list")
    return 0
