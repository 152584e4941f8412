"""Files that are whole: the new content or the old, whatever ends the process that writes."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader, also after a crash, sees the old or the new text and never a part.

    Args:
        path: the file; its folder must exist.
        value: anything ``json`` can write.

    Raises:
        OSError: the file could not be written; the old one is intact.
    """
    try:
        with replaced(path) as temporary:
            temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        error.filename = str(path)  # that of a write is not told, or is the temporary one
        raise
