"""Row files: streaming readers and a content fingerprint (:func:`stepkd.runs.files.write_jsonl` writes them).

Every problem with a file is a :class:`~stepkd.errors.DataError` that names the file and the line. ``line`` is the
1-based line of a JSON Lines file, and the 1-based row number of a JSON array or a Parquet file.

JSON is read by ``json``, not by ``datasets`` or ``pyarrow.json``. Those give a column one type, so that ratings 1 and 0
beside a 0.5 become 1.0 and 0.0, add null keys to objects, turn texts that look like dates into dates, refuse half
surrogate pairs, and name no line; on PRM800K they take four times as long.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stepkd.data.rows import Row, shown
from stepkd.errors import DataError

SAMPLES_FILE = "samples.jsonl"
"""Rollouts that a training kept, in its folder: an entry per line."""
READABLE_ENDINGS = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".parquet")
"""File endings that :func:`read_rows` understands."""

_TABLE = (
    "is it a table? For CSV: python -c \"import pandas; pandas.read_csv('in.csv').to_json('out.jsonl', "
    "orient='records', lines=True)\""
)


def read_rows(path: str | Path) -> Iterator[tuple[Row, int]]:
    """Stream the rows of a data file.

    JSON Lines and Parquet files are read piece by piece; a JSON array is read whole. Blank lines are skipped, a
    UTF-8 byte order mark is ignored, and a ``.json`` file may also hold one object per line.

    Args:
        path: a file ending in ``.jsonl``, ``.ndjson``, ``.jsonl.gz``, ``.json`` or ``.parquet``.

    Yields:
        ``(row, line)``: the row as a dict and its 1-based line (or row number).

    Raises:
        DataError: missing, empty or unreadable file, unknown ending, corrupt JSON, or a line that is not an object.
    """
    path = Path(path)
    ending = file_ending(path)
    if not path.exists():
        raise DataError("no such file; check the path", path=path)
    if path.is_dir():
        raise DataError("this is a folder; give a file in it", path=path)
    if ending is None:
        what = f"unknown file ending {''.join(path.suffixes[-2:])!r}; readable are {', '.join(READABLE_ENDINGS)}"
        raise DataError(what, path=path)
    reader = {".parquet": _read_parquet, ".json": _read_json}.get(ending, _read_json_lines)
    line = 0
    try:
        for row, line in reader(path):
            yield row, line
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror or error}", path=path) from error
    if not line:
        raise DataError("the file holds no rows; write at least one row, or take another file", path=path)


def file_ending(path: str | Path) -> str | None:
    """Return which of ``READABLE_ENDINGS`` a path has, or None.

    Args:
        path: a file path or name.

    Returns:
        The ending with its dot, in lower case; the longest one that fits.
    """
    name = Path(path).name.lower()
    fitting = [ending for ending in READABLE_ENDINGS if name.endswith(ending)]
    return max(fitting, key=len) if fitting else None


def stem(path: str | Path) -> str:
    """A file's name without its readable ending."""
    name = Path(path).name
    return name[: len(name) - len(file_ending(name) or "")]


def _read_json_lines(path: Path) -> Iterator[tuple[Row, int]]:
    opened: Any = gzip.open if path.name.lower().endswith(".gz") else open
    number = 0
    try:
        with opened(path, "rb") as handle:
            for number, raw in enumerate(handle, start=1):
                text = _decode(raw, path, number).rstrip()
                start = text.lstrip()[:1]
                if number == 1 and start == "[":
                    what = "a JSON array, and this ending means one object per line: let the name end in .json"
                    raise DataError(what, path=path, line=1)
                if start:
                    remedy = _TABLE if number == 1 and start != "{" else "mend or delete this line"
                    yield _as_object(_parse(text, path, number, remedy), path, number), number
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"the gzip data is damaged after line {number} ({error}); copy or download it again", path=path
        ) from error


def _decode(raw: bytes, path: Path, line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        what = f"byte {raw[error.start]:#04x} at position {error.start + 1} is not UTF-8; save the file as UTF-8"
        raise DataError(what, path=path, line=line) from error


def _parse(text: str, path: Path, line: int, remedy: str) -> Any:
    """JSON text that begins at a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = f"corrupt JSON at character {error.colno}: {error.msg}; {remedy}"
        raise DataError(what, path=path, line=line + error.lineno - 1) from error
    except (ValueError, RecursionError) as error:  # nested too deeply, or an integer of more digits than Python reads
        raise DataError(f"JSON that Python does not read ({error}); {remedy}", path=path, line=line) from error


def _as_object(value: object, path: Path, line: int) -> Row:
    if isinstance(value, dict):
        return value
    what = f'found {shown(value)}; a row must be an object such as {{"prompt": ..., "answer": ...}}'
    raise DataError(what, path=path, line=line)


def _read_json(path: Path) -> Iterator[tuple[Row, int]]:
    raw = path.read_bytes()
    if not raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):  # common in the wild: JSON Lines named .json
        yield from _read_json_lines(path)
        return
    for number, value in enumerate(_parse(_decode(raw, path, 1), path, 1, "mend the array"), start=1):
        yield _as_object(value, path, number), number


def _read_parquet(path: Path) -> Iterator[tuple[Row, int]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            yield from ((row, number) for number, row in enumerate(rows, start=1))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"not a readable Parquet file: {reason(error)}; copy or download it again", path=path
        ) from error


def reason(error: Exception) -> str:
    """Kind and first line of a library's error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a stable hash of the rows' content, for settings and resume checks.

    The order of the rows counts, the order of the keys does not.

    Args:
        rows: rows of JSON values; other values are hashed by their text.

    Returns:
        32 hexadecimal digits (the first half of a SHA-256).
    """
    digest = hashlib.sha256()
    for row in rows:
        text = json.dumps(dict(row), sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
        digest.update(text.encode("ascii") + b"\n")
    return digest.hexdigest()[:32]


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """Entries of a run's samples, by step; where a step was taken twice (after a crash), the newest.

    Args:
        path: ``samples.jsonl``, or the run folder that holds it.

    Raises:
        DataError: there is no such file, nothing whole in it, or it is of another program.
    """
    path = Path(path)
    path = path / SAMPLES_FILE if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"no samples here; GRPO and KDRL runs write {SAMPLES_FILE} into their --out", path=path)
    whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]  # a crash tears one
    try:
        entries = {entry["step"]: entry for entry in map(json.loads, whole) if "samples" in entry}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError("not the samples of a run, or damaged", path=path) from error
    if not entries:
        raise DataError("not one whole entry in this file", path=path)
    return [entries[step] for step in sorted(entries)]
