"""The results file: torn writes, full disks, two writers, resuming."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from stepkd.errors import DataError, StepkdError
from stepkd.evaluation import store as store_module
from stepkd.evaluation.store import ResultStore, read_rows


def row(index: int, **changes: Any) -> dict[str, Any]:
    base = {"id": f"p{index}", "index": index, "prompt": "1+1?", "answer": "2", "samples": [{"completion": "= 2\n"}]}
    return base | changes


def fill(path: Path, batches: int, size: int = 2) -> None:
    with ResultStore(path) as store:
        for batch in range(batches):
            store.append_batch(batch, [row(batch * size + i) for i in range(size)])


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, timeout=120
    )


def test_rows_come_back_sorted_and_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    with ResultStore(path) as store:
        store.append_batch(1, [row(2), row(3)])
        store.append_batch(0, [row(1), row(0)])
        in_memory = store.rows()
        assert store.finished_batches == {0, 1}
        assert len(store) == 4
    assert [r["index"] for r in in_memory] == [0, 1, 2, 3]
    assert read_rows(path) == in_memory
    with ResultStore(path) as store:
        assert store.rows() == in_memory
        assert store.finished_batches == {0, 1}
        assert store.dropped_bytes == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line["batch_rows"] == 2 and line["batch"] == line["index"] // 2 for line in lines)
    assert [p.name for p in path.parent.iterdir()] == ["results.jsonl"]  # no lock left behind


def test_killed_at_every_byte_of_the_last_batch(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    fill(whole, 2)
    first = tmp_path / "first.jsonl"
    fill(first, 1)
    data, start = whole.read_bytes(), first.stat().st_size
    path = tmp_path / "results.jsonl"
    for cut in range(start, len(data)):
        path.write_bytes(data[:cut])
        assert [r["index"] for r in read_rows(path)] == [0, 1]
        with ResultStore(path) as store:
            assert store.finished_batches == {0}
            assert store.dropped_bytes == cut - start
            assert path.read_bytes() == data[:start]
            store.append_batch(1, [row(2), row(3)])
        assert path.read_bytes() == data  # the resumed run ends with the same file


def test_killed_inside_the_very_first_batch(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    fill(whole, 1)
    data = whole.read_bytes()
    path = tmp_path / "results.jsonl"
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        with ResultStore(path) as store:
            assert store.finished_batches == frozenset()
        assert path.read_bytes() == b""


def test_power_cut_leaves_nul_blocks(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    fill(path, 2)
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    for tail in (b"\0" * 40, b"\0" * (len(lines[2]) - 1) + b"\n" + lines[3], lines[2] + b"\0" * 100):
        path.write_bytes(b"".join(lines[:2]) + tail)
        with ResultStore(path) as store:
            assert store.finished_batches == {0}
        assert path.read_bytes() == b"".join(lines[:2])


def test_damage_before_finished_results_is_reported_not_repaired(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    fill(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    cases = {
        "line 3: damaged line": [*lines[:2], lines[2][:30] + b"\n", *lines[3:]],
        "line 4: damaged line": [*lines[:3], lines[3][:30] + b"\n", *lines[4:]],
        "line 4: batch 2 starts while batch 1 lacks rows": [*lines[:3], *lines[4:]],
        "line 8: problem 'p0'": [*lines, *(line.replace(b'"batch": 0', b'"batch": 3') for line in lines[:2])],
        "line 8: batch 0 occurs twice": [*lines, *(x.replace(b'"p', b'"q') for x in lines[:2])],
    }
    for message, content in cases.items():
        path.write_bytes(b"".join(content))
        before = path.read_bytes()
        for reader in (ResultStore, read_rows):
            with pytest.raises(DataError, match=message):
                reader(path)
        assert path.read_bytes() == before


def test_damaged_single_row_batch_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    fill(path, 3, size=1)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:30] + b"\n" + lines[2])
    with pytest.raises(DataError, match="line 2: damaged line before other results; restore the file"):
        ResultStore(path)


@pytest.mark.parametrize("content", ["some notes\n", '{"id": "a"}\n', "[1, 2]\n", "no newline", '{"batch": 0}\n'])
def test_a_foreign_file_is_never_cut(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="line 1: not a row of stepkd results; give another output folder"):
        ResultStore(path)
    assert path.read_text() == content


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_failed_write_keeps_earlier_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    path = tmp_path / "results.jsonl"
    fill(path, 1)
    before = path.read_bytes()
    calls = []

    def nearly_full(fd: int, data: Any) -> int:
        calls.append(len(data))
        if len(calls) == 1:
            return real_write(fd, bytes(data)[:50])  # a short write first, as a filling disk does
        raise OSError(code, os.strerror(code))

    real_write = os.write
    with ResultStore(path) as store:
        monkeypatch.setattr(os, "write", nearly_full)
        with pytest.raises(StepkdError, match=r"results\.jsonl: .*\. Earlier results .*\(2 problems\)"):
            store.append_batch(1, [row(2), row(3)])
        monkeypatch.undo()
        assert len(calls) == 2
        assert path.read_bytes() == before
        assert store.finished_batches == {0}
        store.append_batch(1, [row(2), row(3)])  # room again: the same store goes on
    assert len(read_rows(path)) == 4


def test_failed_fsync_keeps_earlier_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    fill(path, 1)
    before = path.read_bytes()

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with ResultStore(path) as store:
        monkeypatch.setattr(os, "fsync", broken)
        with pytest.raises(StepkdError, match="Input/output error"):
            store.append_batch(1, [row(2)])
        monkeypatch.undo()
    assert path.read_bytes() == before


def test_interrupt_during_a_write_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    fill(path, 1)
    before = path.read_bytes()
    real_write = os.write

    def interrupted(fd: int, data: Any) -> int:
        real_write(fd, bytes(data)[:20])
        raise KeyboardInterrupt

    with ResultStore(path) as store:
        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.append_batch(1, [row(2)])
        monkeypatch.undo()
    assert path.read_bytes() == before


def test_really_out_of_room_then_resumed(tmp_path: Path) -> None:
    """The kernel refuses to grow the file (RLIMIT_FSIZE): a real failed write, in a process of its own."""
    path, reference = tmp_path / "results.jsonl", tmp_path / "reference.jsonl"
    code = """
        import resource, sys
        from stepkd.errors import StepkdError
        from stepkd.evaluation.store import ResultStore
        path, limit = sys.argv[1], int(sys.argv[2])
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with ResultStore(path) as store:
            for batch in range(8):
                if batch not in store.finished_batches:
                    try:
                        rows = [{"id": f"p{i}", "index": i, "text": "x" * 500} for i in (2 * batch, 2 * batch + 1)]
                        store.append_batch(batch, rows)
                    except StepkdError as error:
                        sys.exit(f"batch {batch}: {error}")
    """
    failed = run_python(code, str(path), "4000")
    assert failed.returncode == 1
    assert "batch 3: cannot write" in failed.stderr
    assert "File too large" in failed.stderr
    assert "same command again to resume" in failed.stderr
    assert [r["index"] for r in read_rows(path)] == list(range(6))
    assert path.read_bytes().endswith(b"}\n")
    assert run_python(code, str(path), "0").returncode == 0
    assert run_python(code, str(reference), "0").returncode == 0
    assert path.read_bytes() == reference.read_bytes()


def test_killed_process_frees_the_lock_even_with_forked_workers_alive(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    code = """
        import os, sys
        from stepkd.evaluation.store import ResultStore
        store = ResultStore(sys.argv[1])
        store.append_batch(0, [{"id": "a", "index": 0}])
        worker = os.fork()
        if worker == 0:
            sys.stdin.read()  # an orphan that lives until the test closes its end
            os._exit(0)
        print("ready", flush=True)
        sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(StepkdError, match=rf"written by another process \(process id {process.pid}\)"):
            ResultStore(path)
        assert [r["id"] for r in read_rows(path)] == ["a"]  # reading needs no lock
        process.kill()
        process.wait()
        with ResultStore(path) as store:
            assert store.finished_batches == {0}
    finally:
        process.stdin.close()
        process.stdout.close()
        process.kill()
        process.wait()


def test_second_store_in_this_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultStore(path), pytest.raises(StepkdError, match="already open in this process"):
        ResultStore(path)
    ResultStore(path).close()


def test_opening_failure_gives_the_lock_back(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("notes\n")
    for _ in range(2):  # the second try must fail for the same reason, not for the lock
        with pytest.raises(DataError, match="not a row"):
            ResultStore(path)
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    with pytest.raises(StepkdError, match="Is a directory"):
        ResultStore(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(StepkdError, match=r"cannot write .*file/results\.jsonl"):
        ResultStore(tmp_path / "file" / "results.jsonl")


def test_refused_batches_leave_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    fill(path, 1)
    before = path.read_bytes()
    with ResultStore(path) as store:
        for batch, rows, message in [
            (0, [row(5)], "batch 0 is finished already"),
            (1, [], "batch 1 has no rows"),
            (-1, [row(5)], "batch -1 has no rows or is not a whole number"),
            (1, [row(0)], r"'p0' \(index 0\) has results already"),
            (1, [row(5), row(5)], r"'p5' \(index 5\) has results already"),
            (1, [row(5), row(6, id="p5")], r"'p5' \(index 6\) has results already"),
            (1, [row(5, id=7)], "needs id"),
            (1, [{"id": "z"}], "needs id"),
            (1, [row(5, score=float("nan"))], "'p5' cannot be written as JSON"),
            (1, [row(5, score={1, 2})], "'p5' cannot be written as JSON"),
        ]:
            with pytest.raises(DataError, match=message):
                store.append_batch(batch, rows)
    with pytest.raises(StepkdError, match="is closed"):
        store.append_batch(1, [row(5)])
    assert path.read_bytes() == before


def test_hostile_text_survives(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    texts = ["lone \ud800 surrogate", "NUL \0 byte", "line\u2028separator\r\n", "漢字 ≤ 2", "x" * 1_000_000]
    rows = [row(i, samples=[{"completion": text}]) for i, text in enumerate(texts)]
    with ResultStore(path) as store:
        store.append_batch(0, rows)
    assert [r["samples"][0]["completion"] for r in read_rows(path)] == texts
    assert "漢字" in path.read_bytes().decode()  # kept readable where it can be


def test_missing_file_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot read results: No such file"):
        read_rows(tmp_path / "gone.jsonl")


def test_lines_are_written_with_the_keys_the_repair_relies_on(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultStore(path) as store:
        store.append_batch(0, [{"id": "a", "index": 0, "batch": 99, "batch_rows": 99}])
    assert path.read_bytes().startswith(store_module._LINE_START)
    assert read_rows(path)[0]["batch"] == 0
