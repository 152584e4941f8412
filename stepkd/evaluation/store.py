"""Result rows on disk, appended batch by batch so that a killed run resumes where it stood.

One JSON line per problem. Every row starts with its batch number and the number of rows of that batch, so a reader
can tell a whole batch from one that was cut short; no end markers, so the file loads as plain JSON Lines.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stepkd.errors import DataError, StepkdError
from stepkd.evaluation.disk import sync_directory, write_all, write_failure
from stepkd.evaluation.lock import FileLock

_LINE_START = b'{"batch": '
_MEND = "restore the file from a copy, or delete it to start over"
_RESUME = "Earlier results are intact ({rows} problems); make room and give the same command again to resume."


class ResultStore:
    """An open results file: what is finished, and a way to add one whole batch at a time.

    Opening reads the file, cuts off a batch that was left incomplete, and locks the file against other writers.
    Use it as a context manager.

    Args:
        path: the JSON Lines file; made, with its folder, when missing.

    Raises:
        StepkdError: another process writes these results, or the file cannot be opened.
        DataError: the file is not a results file, or is damaged before its last finished batch.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.dropped_bytes = 0
        """Bytes of an incomplete batch cut off on opening."""
        self._fd = -1
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path.with_name(self.path.name + ".lock"), purpose=str(self.path))
        except OSError as error:
            raise write_failure(self.path, error, outcome="Check the folder and its permissions.") from error
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            self._contents = _read(self.path)
            size = os.fstat(self._fd).st_size
            if size > self._contents.end:
                self.dropped_bytes = size - self._contents.end
                os.ftruncate(self._fd, self._contents.end)
                os.fsync(self._fd)
            sync_directory(self.path.parent)
        except OSError as error:
            self.close()
            raise write_failure(self.path, error, outcome="Check the path and its permissions.") from error
        except BaseException:
            self.close()
            raise

    @property
    def finished_batches(self) -> frozenset[int]:
        """Numbers of the batches that are complete on disk."""
        return frozenset(self._contents.batches)

    def __len__(self) -> int:
        """Number of problems with results."""
        return len(self._contents.rows)

    def rows(self) -> list[dict[str, Any]]:
        """All rows, sorted by ``index``: the same for every order in which batches were finished."""
        return self._contents.sorted_rows()

    def append_batch(self, batch_index: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds all rows of one batch durably, or none of them.

        Args:
            batch_index: number of the batch, >= 0 and not yet finished.
            rows: at least one row; ``id`` (str) and ``index`` (int) are required, ``batch`` and ``batch_rows`` are set.

        Raises:
            DataError: batch already finished, no rows, a repeated index or id, or a value JSON cannot hold.
            StepkdError: the write failed (disk full, quota, I/O error); earlier results are intact.
        """
        if self._fd < 0:
            raise StepkdError(f"{self.path} is closed; open a ResultStore again to add results")
        if not rows or not _is_count(batch_index):
            raise DataError(f"batch {batch_index!r} has no rows or is not a whole number >= 0", path=self.path)
        if batch_index in self._contents.batches:
            raise DataError(f"batch {batch_index} is finished already", path=self.path)
        # The two keys come first, so that a line cut short is still known as one of ours.
        head = {"batch": batch_index, "batch_rows": len(rows)}
        stamped = [head | {key: value for key, value in row.items() if key not in head} for row in rows]
        new = self._contents.next_batch(stamped, self.path)
        self._append(b"".join(_encode(row, self.path) for row in stamped))
        self._contents.merge(new)

    def _append(self, data: bytes) -> None:
        start = self._contents.end
        try:
            write_all(self._fd, data)
            os.fsync(self._fd)
        except BaseException as error:
            # If even this fails, the next opening drops the incomplete batch.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, start)
                os.fsync(self._fd)
            if isinstance(error, OSError):
                outcome = _RESUME.format(rows=len(self._contents.rows))
                raise write_failure(self.path, error, outcome=outcome) from error
            raise
        self._contents.end = start + len(data)

    def close(self) -> None:
        """Closes the file and lets other writers in; harmless when repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of the finished batches, sorted by ``index``, without locking or changing the file.

    Raises:
        DataError: no such file, not a results file, or damaged before its last finished batch.
    """
    try:
        return _read(Path(path)).sorted_rows()
    except OSError as error:
        raise DataError(f"cannot read results: {error.strerror}", path=path) from error


@dataclass
class _Contents:
    """What a results file holds, up to the end of its last finished batch."""

    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    batches: set[int] = field(default_factory=set)
    end: int = 0

    def next_batch(self, rows: Sequence[dict[str, Any]], path: Path, line: int | None = None) -> _Contents:
        """The rows of one more batch, checked against each other and against what is here."""
        new = _Contents()
        for row in rows:
            if not isinstance(row.get("id"), str) or not _is_count(row.get("index")):
                raise DataError("a result row needs id (text) and index (a whole number >= 0)", path=path, line=line)
            index, problem_id = row["index"], row["id"]
            if any(index in other.rows or problem_id in other.ids for other in (self, new)):
                raise DataError(f"problem {problem_id!r} (index {index}) has results already", path=path, line=line)
            new.rows[index] = row
            new.ids.add(problem_id)
            new.batches.add(row["batch"])
        return new

    def merge(self, other: _Contents) -> None:
        self.rows |= other.rows
        self.ids |= other.ids
        self.batches |= other.batches

    def sorted_rows(self) -> list[dict[str, Any]]:
        return [self.rows[index] for index in sorted(self.rows)]


def _read(path: Path) -> _Contents:
    """Reads the finished batches; what follows the last of them must look like a batch cut short."""
    done, offset, torn_line = _Contents(), 0, 0
    pending: list[dict[str, Any]] = []
    with path.open("rb") as file:
        # No further than the file reached on opening: another process may be appending to it.
        size, number = os.fstat(file.fileno()).st_size, 0
        while line := file.readline(size - offset):
            number += 1
            offset += len(line)
            row = _decode(line, path, number)
            if row is None:
                torn_line = torn_line or number
                continue
            complete = len(pending) + 1 >= row["batch_rows"]
            if torn_line and (complete or (pending and row["batch"] != pending[0]["batch"])):
                raise DataError(f"damaged line before other results; {_MEND}", path=path, line=torn_line)
            if pending and row["batch"] != pending[0]["batch"]:
                message = f"batch {row['batch']} starts while batch {pending[0]['batch']} lacks rows; {_MEND}"
                raise DataError(message, path=path, line=number)
            pending.append(row)
            if complete:
                if row["batch"] in done.batches:
                    raise DataError(f"batch {row['batch']} occurs twice; {_MEND}", path=path, line=number)
                done.merge(done.next_batch(pending, path, number))
                done.end, pending = offset, []
    return done


def _decode(line: bytes, path: Path, number: int) -> dict[str, Any] | None:
    """The row on a line; None for a torn line; DataError for a line this class never writes, whole or in part."""
    row: Any = None
    whole = line.endswith(b"\n")
    if whole:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
    # A torn line is a beginning of one of ours; after a power cut, blocks that were never written read as NUL.
    torn = not (whole and row is not None) and (
        line.startswith(_LINE_START) or _LINE_START.startswith(line) or b"\0" in line
    )
    if torn:
        return None
    if not isinstance(row, dict) or not all(_is_count(row.get(key)) for key in ("batch", "batch_rows", "index")):
        raise DataError("not a row of stepkd results; give another output folder", path=path, line=number)
    return row


def _encode(row: Mapping[str, Any], path: Path) -> bytes:
    try:
        try:
            text = json.dumps(row, ensure_ascii=False, allow_nan=False)
            return text.encode() + b"\n"
        except UnicodeEncodeError:  # a lone surrogate in a completion: escape it
            return json.dumps(row, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise DataError(f"problem {row['id']!r} cannot be written as JSON: {error}", path=path) from error


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
