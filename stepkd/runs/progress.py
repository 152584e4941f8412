"""What a run is doing and how far it is: named, nested phases that a module opens, and the line of a long command.

A module needs nothing but its tracker: ``with module.phases.phase("rollout", total=128): ... advance(8)``.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(eq=False)
class Phase:
    """One thing being done: its name, and how far it is when it can be counted."""

    name: str
    """What is being done, one or two words ("rollout", "scoring", "micro-batch", "validation", "grading")."""
    total: int | None = None
    """Number of units to do (sequences, micro-batches, problems), or None when it is not known beforehand."""
    done: int = 0
    """Number of units done so far, at most ``total``."""

    def __str__(self) -> str:
        if self.total is None:
            return self.name if not self.done else f"{self.name} {self.done}"
        return f"{self.name} {self.done}/{self.total}"


Listener = Callable[[Literal["start", "advance", "end"], Phase], None]
"""Is called after a phase was opened, has advanced, or was closed (also by an exception)."""


class PhaseTracker:
    """The stack of open phases of one module, and who wants to hear about it."""

    def __init__(self) -> None:
        self._stack: list[Phase] = []
        self._listeners: list[Listener] = []
        self.interrupted: Phase | None = None
        """The innermost phase that the last exception ended; None once another one has begun."""

    @property
    def stack(self) -> tuple[Phase, ...]:
        """The open phases, outermost first."""
        return tuple(self._stack)

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Phase]:
        """Say what is being done while the block runs.

        Args:
            name: what is being done, one or two words.
            total: number of units to do, when known; at least 0.

        Yields:
            The phase; its ``total`` may be set later.
        """
        phase = Phase(name, total)
        self._stack.append(phase)
        self.interrupted = None
        try:
            self._tell("start", phase)
            yield phase
        except BaseException:
            self.interrupted = self.interrupted or phase
            raise
        finally:
            self._stack.remove(phase)
            self._tell("end", phase)

    def advance(self, n: int = 1) -> None:
        """Count ``n`` more units (at least 0) as done in the innermost phase; outside any phase it does nothing."""
        if self._stack:
            phase = self._stack[-1]
            phase.done += n if phase.total is None else min(n, max(phase.total - phase.done, 0))
            self._tell("advance", phase)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Tell ``listener`` about every later change.

        Returns:
            A function that ends the subscription, to be called once.
        """
        self._listeners.append(listener)

        return lambda: self._listeners.remove(listener)

    def _tell(self, event: Literal["start", "advance", "end"], phase: Phase) -> None:
        for listener in tuple(self._listeners):
            listener(event, phase)

    def __getstate__(self) -> dict[str, object]:
        """Neither open phases nor listeners go to a copy (of a module, a self-teacher) or to another process."""
        return {"_stack": [], "_listeners": [], "interrupted": None}


class Pace:
    """The time that work will still take, at its speed so far.

    Args:
        done: units that were done before the clock was started.
        clock: seconds.
    """

    def __init__(self, done: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.first = done
        self._clock = clock
        self._start = clock()

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return self._clock() - self._start

    def left(self, done: int, total: int) -> str:
        """``"  0:40 left"``, or nothing where no speed is known."""
        if total < done or done <= self.first:
            return ""
        return f"  {duration(self.seconds / (done - self.first) * (total - done))} left"


REDRAW_SECONDS, LINE_SECONDS = 0.1, 30.0
"""Shortest time between two drawings of a line in a terminal, and longest between two lines elsewhere."""


class Line:
    """One line that redraws in a terminal that is not a CI log; elsewhere lines that stay, few of them.

    A reader that goes away (a closed pipe, a hung-up terminal) ends the output and not the work.

    Args:
        console: the rich console to print on.
        redraw: False: lines that stay in a terminal, too (several processes share it).
        clock: seconds.
    """

    def __init__(self, console: Any, *, redraw: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
        self._redraws = redraw and console.is_terminal and not console.is_dumb_terminal and not in_ci
        self._console = console
        self._clock = clock
        self._shown = clock()

    def show(self, text: str, *, urgent: bool = False, stays: bool = False) -> None:
        """Show how things are, where it is due.

        Args:
            text: what the line says.
            urgent: redraw at once; elsewhere it makes no line.
            stays: due everywhere.
        """
        elapsed = self._clock() - self._shown
        if stays or (urgent and self._redraws) or elapsed >= (REDRAW_SECONDS if self._redraws else LINE_SECONDS):
            self._shown += elapsed
            self._write(text[: self._console.width - 1] + "\r" if self._redraws else f"{text}\n")

    def keep(self, text: str) -> None:
        """Write text that stays, in place of the line that was shown."""
        self._write(text)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._console.file.write(f"\x1b[2K{text}" if self._redraws else text)
            self._console.file.flush()


class WorkLine(Line):
    """A :class:`Line` of counted work, which stays for every tenth of it where it cannot be redrawn."""

    _what = ""
    _pace = Pace(0)
    _tenth = 0

    def work(self, what: str, done: int, total: int, facts: str = "") -> None:
        """Say how far the work is.

        Args:
            what: what is being done; the speed of another one is measured anew.
            done: units of it that are done.
            total: units in all, at least 1.
            facts: what stands behind the count, before the time left.
        """
        if what != self._what or not self._pace.first:  # what a resumed run found, and the first batch, took no time
            self._what, self._pace, self._tenth = what, Pace(done), 0
        left = self._pace.left(done, total) if total > done else ""
        text = f"{what} {done}/{total}{facts}{left}"
        if done == total:
            self.keep(f"{text}\n")
        else:
            before, self._tenth = self._tenth, done * 10 // total
            self.show(text, urgent=True, stays=self._tenth > before)


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
