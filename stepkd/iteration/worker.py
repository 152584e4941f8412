"""A labelling or pair job of an iteration as a process of its own: ``LAUNCHER -m stepkd iterate-job FILE``.

The file holds the kind of the job and its settings; every process that the launcher starts does its share. It goes
through :mod:`stepkd.cli`, as every command: ``--safe``, the report to torchrun's agent and the exit codes are its.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def run(path: str) -> int:
    """Run this process's share of the job that a file describes, on this rank's device; returns the exit code."""
    from stepkd.iteration.stages import run_job
    from stepkd.labels.settings import PAIR_JOBS, LabelConfig
    from stepkd.settings import build_settings

    content = json.loads(Path(path).read_text(encoding="utf-8"))
    kind: Any = PAIR_JOBS.get(content["kind"], LabelConfig)
    config, job = build_settings(kind, content["settings"], "job").start({})
    run_job(content["kind"], config, job.options)
    return 0
