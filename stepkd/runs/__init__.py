"""How work starts and where it lives: jobs, whole files, launch guard, run folders, metric log, progress.

Only ``logger`` imports lightning, and is therefore not imported here.
"""

from __future__ import annotations

from typing import Any

from stepkd.lazy import lazily

_HOMES = {
    "launcher": "LaunchInfo check_launch detect_launch trainer_defaults",
    "progress": "Phase PhaseTracker",
    "rundir": "RunDir",
}


def __getattr__(name: str) -> Any:
    return lazily(__name__, _HOMES, name)
