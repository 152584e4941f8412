"""Writes that survive a full disk or a kill: all of it is there, or what was there before."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from stepkd.errors import StepkdError, disk_error


def write_all(fd: int, data: bytes) -> None:
    """Writes all of ``data``: a nearly full disk takes a part first and reports the error on the next call."""
    view = memoryview(data)
    while view:
        written = os.write(fd, view)
        if written == 0:
            raise OSError("the file system accepted no bytes")
        view = view[written:]


def sync_directory(path: Path) -> None:
    """Makes new names in a directory durable; some file systems do not offer this, and it is not essential."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_failure(path: Path, error: OSError, *, outcome: str) -> StepkdError:
    """The error to raise for a failed write: names the file, the cause, the free space, and what to do."""
    return disk_error(error, path, f"{outcome} ") or StepkdError(f"cannot write {path}: {error}. {outcome}")
