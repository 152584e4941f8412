"""What a run is doing right now: named, nested phases that a module opens and a progress display listens to.

The module side needs nothing but this file: ``with module.phases.phase("rollout", total=128): ... advance(8)``.
Imports only the standard library.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol


@dataclass(eq=False)
class Phase:
    """One thing being done: its name, and how far it is when it can be counted."""

    name: str
    """What is being done, one or two words ("rollout", "scoring", "micro-batch", "validation", "grading")."""
    total: int | None = None
    """Number of units to do (sequences, micro-batches, problems), or None when it is not known beforehand."""
    done: int = 0
    """Number of units done so far, at most ``total``."""
    seconds: float = 0.0
    """Wall time spent in the phase, nested phases included; set when it ends."""

    def __str__(self) -> str:
        if self.total is None:
            return self.name if not self.done else f"{self.name} {self.done}"
        return f"{self.name} {self.done}/{self.total}"


class PhaseListener(Protocol):
    """What a display implements to follow a :class:`PhaseTracker`."""

    def on_phase_start(self, tracker: PhaseTracker, phase: Phase) -> None:
        """A phase was opened; it is the last of ``tracker.stack``."""

    def on_phase_advance(self, tracker: PhaseTracker, phase: Phase) -> None:
        """``phase.done`` grew."""

    def on_phase_end(self, tracker: PhaseTracker, phase: Phase) -> None:
        """A phase was closed, also when an exception ended it; it has left ``tracker.stack``."""


class PhaseTracker:
    """The stack of open phases of one module, and who wants to hear about it."""

    def __init__(self) -> None:
        self._stack: list[Phase] = []
        self._listeners: list[PhaseListener] = []
        self.interrupted: Phase | None = None
        """The innermost phase that the last exception ended; None once another one has begun."""

    @property
    def stack(self) -> tuple[Phase, ...]:
        """The open phases, outermost first."""
        return tuple(self._stack)

    @property
    def current(self) -> Phase | None:
        """The innermost open phase, or None between phases."""
        return self._stack[-1] if self._stack else None

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Phase]:
        """Say what is being done while the block runs.

        Args:
            name: what is being done, one or two words.
            total: number of units to do, when known; at least 0.

        Yields:
            The phase; its ``total`` may be set later, and ``seconds`` is there to log after the block.
        """
        if total is not None and total < 0:
            raise ValueError(f"phase {name!r}: total must be at least 0, got {total}")
        phase = Phase(name, total)
        self._stack.append(phase)
        self.interrupted = None
        start = time.monotonic()
        try:
            for listener in tuple(self._listeners):
                listener.on_phase_start(self, phase)
            yield phase
        except BaseException:
            self.interrupted = self.interrupted or phase
            raise
        finally:
            phase.seconds = time.monotonic() - start
            self._stack.remove(phase)
            for listener in tuple(self._listeners):
                listener.on_phase_end(self, phase)

    def advance(self, n: int = 1) -> None:
        """Count ``n`` more units (at least 0) as done in the innermost phase; outside any phase it does nothing."""
        phase = self.current
        if phase is None:
            return
        phase.done += n if phase.total is None else min(n, max(phase.total - phase.done, 0))
        for listener in tuple(self._listeners):
            listener.on_phase_advance(self, phase)

    def subscribe(self, listener: PhaseListener) -> Callable[[], None]:
        """Tell ``listener`` about every later change.

        Returns:
            A function that ends the subscription; calling it twice is harmless.
        """
        self._listeners.append(listener)

        def unsubscribe() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return unsubscribe

    def __deepcopy__(self, memo: dict[int, object]) -> PhaseTracker:
        """A copied module (an EMA or self-teacher copy) gets a tracker of its own, without listeners."""
        return PhaseTracker()

    def __getstate__(self) -> dict[str, object]:
        """Neither open phases nor listeners travel to another process."""
        return {"_stack": [], "_listeners": [], "interrupted": None}
