"""How far a long command is, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from stepkd.runs.job import JobOptions
from stepkd.runs.launcher import LaunchInfo, launch_id


class WorkLine:
    """One line that redraws in a terminal; a line per tenth of the work elsewhere.

    Args:
        console: the rich console to print on.
        redraw: False: lines in a terminal, too (several processes share it).
    """

    def __init__(self, console: Any, *, redraw: bool = True) -> None:
        self._console = console
        self._redraws = redraw and console.is_terminal
        self._what = ""
        self._first = (0, 0.0)
        self._tenth = 0

    def show(self, what: str, done: int, total: int, facts: str = "") -> None:
        """Say how far the work is.

        Args:
            what: what is being done; the speed of another one is measured anew.
            done: units of it that are done.
            total: units in all, at least 1.
            facts: what stands behind the count, before the time left.
        """
        now = time.monotonic()
        if what != self._what or not self._first[0]:  # what a resumed run found, and the first batch, took no time
            self._what, self._first, self._tenth = what, (done, now), 0
        speed = (done - self._first[0]) / max(now - self._first[1], 1e-9)
        left = f"  {duration((total - done) / speed)} left" if total > done and speed else ""
        text = f"{what} {done}/{total}{facts}{left}"
        if self._redraws:
            end = "\n" if done == total else "\r"
            self._console.print(text.ljust(self._console.width - 1), end=end, highlight=False, markup=False)
        elif done * 10 // total > self._tenth or done == total:
            self._tenth = done * 10 // total
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def job_options(
    console: Any,
    launch: LaunchInfo,
    *,
    verbs: Mapping[str, str] | None = None,
    overwrite: bool = False,
    wait_s: float = 1800.0,
) -> JobOptions:
    """How this process of a launch takes part in a job, with one progress line on a console.

    Args:
        console: the rich console to print on.
        launch: which process this is (:func:`stepkd.runs.launcher.check_launch`).
        verbs: what is shown for a phase; its name where none is given.
        overwrite, wait_s: see :class:`~stepkd.runs.job.JobOptions`.
    """
    rank = f"rank {launch.rank}: " if launch.world_size > 1 else ""
    line = WorkLine(console, redraw=launch.world_size == 1)

    def report(phase: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        shown = "".join(
            f"  {metric(name, value)} {name}" if name.endswith("/s") else f"  {name} {value:.1%}"
            for name, value in figures.items()
        )
        line.show(f"{rank}{(verbs or {}).get(phase, phase)}", done, total, shown)

    return JobOptions(
        rank=launch.rank,
        world_size=launch.world_size,
        launch=launch_id(launch),
        overwrite=overwrite,
        wait_s=wait_s,
        report=report,
        say=lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
    )


def duration(seconds: float) -> str:
    """Write a time as m:ss, or h:mm:ss from one hour on."""
    whole = max(round(seconds), 0)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def metric(name: str, value: Any) -> str:
    """Write a metric for the eye: counts whole, rates (``tokens/s``, ``..._per_second``) short, the rest 4 digits."""
    number = value.item() if hasattr(value, "item") else value
    if not isinstance(number, (int, float)):
        return str(number)
    if name.endswith(("/s", "_per_second", "_per_s")) and abs(number) >= 1000:
        scaled, unit = (number / 1e6, "M") if abs(number) >= 1e6 else (number / 1e3, "k")
        return f"{scaled:.3g}{unit}"
    return str(number) if isinstance(number, int) else f"{number:.4g}"
