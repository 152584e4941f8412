"""Options that several commands share: those of a job."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepkd.runs.job import JobOptions
    from stepkd.runs.launcher import LaunchInfo

TEMPLATE_HELP = "gsm8k, math, plain, task, or a YAML file; default: the one the model was trained with, else the data's"
"""Help of ``--template``."""


def add_job_arguments(group: Any) -> None:
    """Arguments that :func:`start_job` and the scorers' and models' loaders read."""
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    group.add_argument(
        "--wait", type=float, default=1800.0, metavar="S", help="longest wait for other processes (default 1800)"
    )


def add_model_arguments(group: Any, batch_size: str) -> None:
    """How a model is loaded and run, besides :func:`add_job_arguments`; ``batch_size`` is the help of that option."""
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), help="default: as stored")
    group.add_argument("--attention", help="attention implementation (sdpa, eager, flash_attention_2)")
    group.add_argument("--batch-size", type=int, default=32, metavar="ROWS", dest="max_rows", help=batch_size)
    add_job_arguments(group)


def start_job(arguments: argparse.Namespace, verbs: Mapping[str, str]) -> tuple[Any, LaunchInfo, JobOptions]:
    """The console, the launch, and this process's part in a job; ``--device`` becomes this rank's.

    Args:
        arguments: a command line with ``--overwrite`` and :func:`add_job_arguments`.
        verbs: what the progress line says in every phase.
    """
    from rich.console import Console

    from stepkd.runs.job import job_options
    from stepkd.runs.launcher import check_launch, rank_device
    from stepkd.runs.process import quiet_libraries

    quiet_libraries()
    console, launch = Console(), check_launch()
    arguments.device = rank_device(arguments.device, launch)
    given = {"overwrite": arguments.overwrite, "wait_s": arguments.wait}
    return console, launch, replace(job_options(console, launch, verbs), **given)


def say_share_is_done(console: Any, launch: LaunchInfo, what: str) -> int:
    """Say that other ranks have work left, and give the exit code."""
    text = f"rank {launch.rank} has done its share; the last rank to finish writes the {what}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0
