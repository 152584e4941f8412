"""Row files: what is read, what is refused and with which message, and that writing is all or nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.io import file_ending, fingerprint, read_rows
from stepkd.errors import DataError

ROWS = [{"prompt": "1+1", "answer": "2"}, {"prompt": "caf\u00e9 \u2028 x", "answer": "3"}]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "A.JSONL", "a.json"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_json_lines_with_and_without_byte_order_mark(tmp_path: Path, name: str, bom: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(bom + lines(ROWS).encode())
    assert list(read_rows(path)) == [(ROWS[0], 1), (ROWS[1], 2)]


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"a": 1}\n   \n{"a": 2}')
    assert list(read_rows(path)) == [({"a": 1}, 2), ({"a": 2}, 4)]


def test_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\r\n{"a": 2}\r\n')
    assert [row["a"] for row, _ in read_rows(path)] == [1, 2]


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(ROWS).encode()))
    assert [row for row, _ in read_rows(path)] == ROWS


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_json_array(tmp_path: Path, bom: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(bom + json.dumps(ROWS, indent=1).encode())
    assert list(read_rows(path)) == [(ROWS[0], 1), (ROWS[1], 2)]


def test_parquet_in_several_batches(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"i": list(range(3000)), "labels": [[True, None]] * 3000}), path)
    rows = list(read_rows(path))
    assert [row["i"] for row, _ in rows] == list(range(3000))
    assert [line for _, line in rows] == list(range(1, 3001))
    assert rows[0][0]["labels"] == [True, None]


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{broken\n')
    assert next(read_rows(path)) == ({"a": 1}, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl, line 2: corrupt JSON at character \d+: .*mend or delete"),
        ("a.jsonl", b'{"a": 1}\n\n[1, 2]\n', r"line 3: found list \[1, 2\]; a row must be an object"),
        ("a.jsonl", b'"text"\n', r"line 1: found str 'text'"),
        ("a.jsonl", b"true\n", r"line 1: found bool True"),
        ("a.jsonl", b"null\n", r"line 1: found NoneType None"),
        ("a.jsonl", b"[" * 200_000 + b"\n", r"line 1: a JSON array, .*end in \.json"),
        ("a.jsonl", b'[\n{"a": 1}\n]\n', r"line 1: a JSON array, and this ending means one object per line"),
        ("a.jsonl", b"a,b\n1,2\n", r"line 1: corrupt JSON .*is it a table\? For CSV: .*lines=True"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"line 2: byte 0xe9 at position 8 is not UTF-8"),
        (
            "a.jsonl",
            '{"a": 1}\n'.encode("utf-16"),
            r"line 1: byte 0xff at position 1 is not UTF-8; save the file as UTF-8",
        ),
        ("a.jsonl", b"", r"the file holds no rows"),
        ("a.jsonl", b"\n \n", r"the file holds no rows"),
        ("a.json", b"", r"the file holds no rows"),
        ("a.json", b"[]", r"the file holds no rows"),
        ("a.json", b'[{"a": 1},\n 3]', r"line 2: found int 3"),
        ("a.json", b'[{"a": 1},\n {"a" 2}]', r"a\.json, line 2: corrupt JSON at character 7"),
        ("a.csv", b"a,b\n", r"unknown file ending '\.csv'; readable are \.jsonl"),
        ("a.jsonl.gz", b"not gzip", r"gzip data is damaged after line 0"),
        # No time in the header: it would be in the test's name, and pytest-xdist wants one name for all workers.
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-12], r"gzip data is damaged"),
        ("a.parquet", b"PAR1 no", r"not a readable Parquet file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(path))
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.jsonl: no such file"):
        next(read_rows(tmp_path / "no.jsonl"))
    with pytest.raises(DataError, match="this is a folder"):
        next(read_rows(tmp_path))


def test_file_ending() -> None:
    assert file_ending("x/a.JSONL.GZ") == ".jsonl.gz"
    assert file_ending("a.b.json") == ".json"
    assert file_ending("json") is None


def test_fingerprint_sees_content_and_row_order_not_key_order() -> None:
    one = fingerprint([{"a": 1, "b": [True, "\ud83d"]}, {"a": 2}])
    assert one == fingerprint([{"b": [True, "\ud83d"], "a": 1}, {"a": 2}])
    assert one != fingerprint([{"a": 2}, {"a": 1, "b": [True, "\ud83d"]}])
    assert one != fingerprint([{"a": 1, "b": [1, "\ud83d"]}, {"a": 2}])
    assert fingerprint([{"a": 1}]) == "e346432021b04179518d9614f3560ccd"  # the same in every process and version


@pytest.mark.parametrize("value", ["7" * 5000, "[" * 100_000 + "]" * 100_000])
@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": "y", "answer": %s}\n', "a.jsonl, line 2"),
        ("a.json", "[%s]\n", "a.json, line 1"),
    ],
)
def test_json_that_python_does_not_read_is_told_with_its_line(
    tmp_path: Path, name: str, text: str, place: str, value: str
) -> None:
    (tmp_path / name).write_text(text % value)
    with pytest.raises(DataError, match=f"{place}: JSON that Python does not read"):
        list(read_rows(tmp_path / name))
