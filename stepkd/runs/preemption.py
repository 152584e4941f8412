"""SIGTERM: a scheduler takes the machine back, and the run has a grace period to leave a state to go on from.

The signal only sets a flag. Sampling for training looks at it at every token and breaks off; the module looks at it
before every batch's first optimiser step, together with all other ranks, and gives up that batch, which a resumed run
draws again with the same noise. Nothing of the step before is lost, and no rank waits for another.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None

    def listen(self, signum: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
        """Take the signal as a request from now on; only the main thread can.

        Returns:
            A function that gives the signal its earlier meaning back, and forgets the request.
        """
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        before = signal.signal(signum, self._on_signal)

        def restore() -> None:
            signal.signal(signum, before)
            self.name = None

        return restore

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name = signal.Signals(signum).name
            os.write(2, f"\n{self.name}: stopping after this step\n".encode())  # print is not safe in a handler


STOP_REQUEST = StopRequest()
"""The request to this process."""


class Preempted(Exception):
    """The run was asked to stop, and every rank agreed to; its state is that of the last finished step."""
