"""A labelling or pair job of an iteration as a process of its own: ``LAUNCHER -m stepkd.iteration.worker FILE``.

The file holds the kind of the job and its settings; every process that the launcher starts does its share.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from stepkd.errors import StepkdError


def main(path: str) -> int:
    """Run this process's share of the job that a file describes; returns the exit code."""
    from rich.console import Console

    from stepkd.iteration.stages import run_job
    from stepkd.labels.settings import PAIR_JOBS, LabelSpec
    from stepkd.runs import check_launch
    from stepkd.runs.process import quiet_libraries
    from stepkd.runs.progress import job_options
    from stepkd.yaml_files import build_settings

    content = json.loads(Path(path).read_text(encoding="utf-8"))
    quiet_libraries()
    try:
        launch = check_launch()
        kind = PAIR_JOBS.get(content["kind"], LabelSpec)
        run_job(content["kind"], build_settings(kind, content["settings"], "job"), job_options(Console(), launch))
    except StepkdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
