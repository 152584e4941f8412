"""How a run starts and where it lives: launch guard, run folders, metric log, progress.

``launcher``, ``accelerate_env``, ``rundir`` and ``phases`` need only the standard library; ``logger`` and ``progress``
import lightning and are therefore not imported here.
"""

from __future__ import annotations

from stepkd.runs.launcher import LaunchInfo, check_launch, detect_launch, trainer_defaults
from stepkd.runs.progress import Phase, PhaseTracker
from stepkd.runs.rundir import RunDir

__all__ = ["LaunchInfo", "Phase", "PhaseTracker", "RunDir", "check_launch", "detect_launch", "trainer_defaults"]
