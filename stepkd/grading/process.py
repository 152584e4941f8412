"""The parent's handle on one grading worker process."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from typing import Any

_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from stepkd.grading.worker import main; main(int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))"
)


class WorkerGone(Exception):
    """The worker process ended or does not read; handled inside the package."""


class WorkerProcess:
    """A child interpreter with non-blocking pipes.

    It is a fresh interpreter (not a fork: the parent may hold torch's threads; not ``multiprocessing``: that would
    import the parent's main script again).

    Args:
        memory_mb: cap on the worker's address space, in MiB.
        deadline_s: seconds per item.
    """

    def __init__(self, *, memory_mb: int, deadline_s: float) -> None:
        arguments = [json.dumps([p for p in sys.path if isinstance(p, str)]), str(memory_mb), str(deadline_s)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, *arguments, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            # A fixed hash seed: the order of sympy's sets, and so a verdict, must not differ between runs.
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests = self._process.stdin.fileno()
        self._replies = self._process.stdout.fileno()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._replies, False)
        self._buffer = b""
        self.ready = False
        self.item: int | None = None
        self.limit = 0.0

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code, negative for a signal; ``None`` while running."""
        return self._process.poll()

    @property
    def idle(self) -> bool:
        """Whether it is ready and has no item."""
        return self.ready and self.item is None

    def fileno(self) -> int:
        """Descriptor that becomes readable when a reply, or the end of the worker, is there."""
        return self._replies

    def send(self, item: int, message: dict[str, Any], *, deadline_s: float) -> None:
        """Hand over one item; its clock starts when the worker has all of it.

        Args:
            item: the caller's number for the item.
            message: JSON-ready request.
            deadline_s: seconds allowed for the item, and for the hand-over.

        Raises:
            WorkerGone: the worker has ended or stopped reading.
        """
        data = memoryview(json.dumps(message).encode("ascii") + b"\n")
        give_up = time.monotonic() + deadline_s
        self.item = item
        poller = select.poll()
        poller.register(self._requests, select.POLLOUT)
        while data:
            if not poller.poll(max(0.0, give_up - time.monotonic()) * 1000):
                raise WorkerGone
            try:
                data = data[os.write(self._requests, data) :]
            except OSError:
                raise WorkerGone from None
        self.limit = time.monotonic() + deadline_s

    def receive(self) -> dict[str, Any] | None:
        """Read what has arrived.

        Returns:
            One reply, or ``None`` when it is not complete yet.

        Raises:
            WorkerGone: the worker has closed its pipe, or is past its limit.
        """
        while not self._buffer.endswith(b"\n"):
            try:
                block = os.read(self._replies, 1 << 20)
            except BlockingIOError:
                if time.monotonic() < self.limit:
                    return None
                raise WorkerGone from None
            except OSError:
                raise WorkerGone from None
            if not block:
                raise WorkerGone
            self._buffer += block
        line, self._buffer = self._buffer, b""
        reply: dict[str, Any] = json.loads(line)
        return reply

    def stop(self) -> None:
        """Kill the worker, reap it and close the pipes; safe to repeat."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process stuck in the kernel is reaped later
            self._process.wait(timeout=5.0)
        self.close_pipes()

    def close_pipes(self) -> None:
        """Close this process's ends only (after a fork: the worker belongs to the parent)."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def disown(self) -> None:
        """Let go of a worker that another process started."""
        self.close_pipes()
        self._process.returncode = 0  # nothing to reap here
