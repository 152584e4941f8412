"""How work starts and where it lives: jobs, whole files, launch guard, run folders, metric log, progress.

Only ``logger`` imports lightning, and is therefore not imported here.
"""

from __future__ import annotations

from stepkd.runs.launcher import LaunchInfo, check_launch, detect_launch, trainer_defaults
from stepkd.runs.progress import Phase, PhaseTracker
from stepkd.runs.rundir import RunDir

__all__ = ["LaunchInfo", "Phase", "PhaseTracker", "RunDir", "check_launch", "detect_launch", "trainer_defaults"]
