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


def write_atomically(path: str | Path, data: bytes, *, outcome: str = "") -> None:
    """Replaces a file as a whole: readers see the old content or the new, never a part.

    Args:
        path: the file; its folder is made when missing.
        data: the new content.
        outcome: a sentence of the error message; empty: what is left.

    Raises:
        StepkdError: the write failed (disk full, quota, permissions); the previous file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_new(temporary, data)
        os.replace(temporary, path)
    except OSError as error:
        intact = "The previous file is intact." if path.exists() else "Nothing was left there."
        raise write_failure(path, error, outcome=outcome or intact) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    sync_directory(path.parent)


def _write_new(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
