"""Files that are whole: the new content or the old, whatever ends the process that writes.

:func:`replaced` is the one place where a file is replaced; everything else here is built on it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stepkd.errors import DataError, disk_error


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A new file for a block to write, which takes the place of another one when the block ends.

    Args:
        path: the file to replace; its folder must exist.

    Yields:
        A temporary name beside it. It is flushed to the disk before it takes the file's place.

    Raises:
        OSError: the new file could not be written; the old one is intact, as after any other error in the block.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # hosts may share a disk and process ids
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        if os.path.exists(path):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # some file systems refuse to open folders; the new name is there
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        with contextlib.suppress(OSError):  # must not hide the error itself
            temporary.unlink(missing_ok=True)


def write_file(path: str | Path, content: bytes | Callable[[Path], object]) -> None:
    """Replace a file as a whole, and make its folder when it is missing.

    Args:
        path: the file.
        content: its bytes, or a function that writes them to the path it is given.

    Raises:
        MachineError: a failed write (disk full, quota, permissions), in words; the file that was there is intact.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            if isinstance(content, bytes):
                temporary.write_bytes(content)
            else:
                content(temporary)
    except Exception as error:  # safetensors and pyarrow have their own classes
        kept = "The previous file is intact." if path.exists() else "Nothing was written."
        if words := disk_error(error, path, f"{kept} "):
            raise words from error
        raise


def delete(path: Path) -> None:
    """Delete a file, a link or a folder; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, as :func:`write_file` does.

    Raises:
        DataError: JSON cannot hold the value.
        MachineError: a failed write.
    """
    write_file(path, (json_text(value, path=path, indent=2) + "\n").encode())


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSON Lines, as :func:`write_file` does.

    Args:
        path: a name that ends in ``.jsonl``.
        rows: rows of JSON values.

    Returns:
        The number of rows.

    Raises:
        DataError: another ending, or a row that JSON cannot hold, with its line.
        MachineError: a failed write.
    """
    path, number = Path(path), 0
    if path.suffix != ".jsonl":
        raise DataError(f"rows are written as JSON Lines; let the name end in .jsonl, not {path.suffix!r}", path=path)

    def write(temporary: Path) -> None:
        nonlocal number
        with open(temporary, "w", encoding="utf-8", newline="\n") as stream:
            for number, row in enumerate(rows, start=1):
                stream.write(json_text(dict(row), path=path, line=number) + "\n")

    write_file(path, write)
    return number


def json_text(value: Any, *, path: str | Path | None = None, line: int | None = None, indent: int | None = None) -> str:
    """A value as JSON text that UTF-8 can encode.

    Raises:
        DataError: not a JSON value (NaN and infinity are none), with the path and line given.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, indent=indent)  # a lone surrogate survives only as an escape
    except (TypeError, ValueError) as error:
        raise DataError(f"this cannot be written as JSON: {error}", path=path, line=line) from error
    return text
