"""A labelling or pair job of an iteration as a process of its own: ``LAUNCHER -m stepkd iterate-job FILE``.

The file holds the kind of the job and its settings; every process that the launcher starts does its share. It goes
through :mod:`stepkd.cli`, as every command: ``--safe``, the report to torchrun's agent and the exit codes are its.
"""

from __future__ import annotations

import json
from pathlib import Path


def run(path: str) -> int:
    """Run this process's share of the job that a file describes, on this rank's device; returns the exit code."""
    from rich.console import Console

    from stepkd.iteration.stages import run_job
    from stepkd.labels.settings import PAIR_JOBS, LabelConfig
    from stepkd.runs.job import job_options
    from stepkd.runs.launcher import check_launch, rank_device
    from stepkd.runs.process import quiet_libraries
    from stepkd.settings import build_settings

    content = json.loads(Path(path).read_text(encoding="utf-8"))
    quiet_libraries()
    launch, settings = check_launch(), content["settings"]
    settings["device"] = rank_device(settings["device"], launch)
    kind = PAIR_JOBS.get(content["kind"], LabelConfig)
    run_job(content["kind"], build_settings(kind, settings, "job"), job_options(Console(), launch))
    return 0
