"""Files are replaced as a whole."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from stepkd.errors import DataError, MachineError
from stepkd.runs.files import write_json, write_jsonl

ROWS = [{"prompt": "1+1", "answer": "2"}, {"prompt": "ünïcode \u2028", "answer": None}]


def read(path: Path) -> list[Any]:
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def test_write_then_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    rows: list[dict[str, Any]] = [*ROWS, {"prompt": "half \ud83d", "answer": None}]
    assert write_jsonl(path, rows) == 3
    assert read(path) == rows
    assert os.listdir(path.parent) == ["a.jsonl"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_write_keeps_the_old_file_when_a_row_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, ROWS)

    def rows() -> Any:
        yield {"a": 1}
        raise RuntimeError("sampler died")

    with pytest.raises(RuntimeError, match="sampler died"):
        write_jsonl(path, rows())
    assert read(path) == ROWS
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_write_refuses_what_is_not_json(tmp_path: Path, value: object) -> None:
    with pytest.raises(DataError, match="line 2: this cannot be written as JSON"):
        write_jsonl(tmp_path / "a.jsonl", [{"a": 1}, {"a": value}])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("existing", [True, False])
def test_full_disk_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool) -> None:
    path = tmp_path / "a.jsonl"
    if existing:
        write_jsonl(path, ROWS)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    kept = "The previous file is intact" if existing else "Nothing was written"
    with pytest.raises(MachineError, match=rf"cannot write {path}: No space left on device .*{kept}\. Free some space"):
        write_jsonl(path, [{"a": 1}])
    monkeypatch.undo()
    assert os.listdir(tmp_path) == (["a.jsonl"] if existing else [])
    if existing:
        assert read(path) == ROWS


def test_write_refuses_other_endings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"end in \.jsonl"):
        write_jsonl(tmp_path / "a.jsonl.gz", ROWS)


def test_json_is_replaced_as_a_whole_and_a_value_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(DataError, match="cannot be written as JSON"):
        write_json(path, {"a": {1}})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(path.parent) == ["a.json"]
