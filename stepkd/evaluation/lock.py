"""One writer per results file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import warnings
from pathlib import Path

from stepkd.errors import StepkdError

_held: set[Path] = set()


class FileLock:
    """An exclusive lock, taken at once or refused, that the system drops when the process dies.

    A POSIX record lock on a file of its own: unlike ``flock`` it is not inherited by forked workers, which could
    outlive a killed parent and block the resumed run. Such locks do not hold between two users in one process, so
    those are kept apart by a set.

    Args:
        path: the lock file; holds the owner's process id while locked and is removed on release.
        purpose: what is locked, for the error message.

    Raises:
        StepkdError: another process, or this one, holds the lock.
    """

    def __init__(self, path: Path, *, purpose: str) -> None:
        self._path = path.resolve()
        if self._path in _held:
            raise StepkdError(f"{purpose} is already open in this process; close it first")
        self._fd = self._acquire(purpose)
        _held.add(self._path)

    def _acquire(self, purpose: str) -> int:
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    owner = os.read(fd, 32).decode("ascii", "replace").strip()
                    os.close(fd)
                    raise StepkdError(
                        f"{purpose} is being written by another process{owner and f' (process id {owner})'}; "
                        "wait for it to end or give this run its own folder"
                    ) from None
                # Some network file systems offer no locks at all; evaluation must still run there.
                warnings.warn(f"{self._path}: no file locks here ({error.strerror}); start one run only", stacklevel=4)
                return fd
            # The previous owner may have removed the file between our open and our lock: then it guards nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                    with contextlib.suppress(OSError):  # the id is a courtesy; a full disk must not hide the lock
                        os.ftruncate(fd, 0)
                        os.write(fd, str(os.getpid()).encode())
                    return fd
            os.close(fd)

    def release(self) -> None:
        """Gives the lock up; harmless when repeated."""
        if self._fd < 0:
            return
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        os.close(self._fd)
        self._fd = -1
        _held.discard(self._path)
