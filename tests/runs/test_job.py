"""A job is done unit by unit, by any number of ranks, and ends with the same bytes whatever interrupted it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest

from stepkd.errors import ConfigError, DataError, MachineError, StepkdError
from stepkd.runs.job import (
    ABSENT,
    Job,
    JobOptions,
    check_same,
    differences,
    finished_rows,
    numbered,
    read_results,
    read_settings,
)

UNITS = numbered([[1, 2], [3], [4, 5]])
SETTINGS = {"model": {"name": "tiny"}, "seed": 0}


def listener(said: list[str]) -> Any:
    """A console that keeps its lines."""
    return SimpleNamespace(print=lambda line, **_: said.append(line))


def rows_of(unit: list[int]) -> list[dict[str, Any]]:
    return [{"index": number, "square": number * number} for number in reversed(unit)]


def start(out: Path, settings: dict[str, Any] | None = None, **options: Any) -> Job:
    job = Job(out, "test job", outputs=("squares.jsonl", "summary.json"), options=JobOptions(**options))
    job.begin(settings or SETTINGS)
    return job


def whole(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("settings.json", "squares.jsonl", "summary.json")}


def run(out: Path, **options: Any) -> Job:
    job = start(out, **options)
    job.work("squares", UNITS, rows_of)
    if (rows := job.rows("squares", UNITS)) is not None:
        job.finish("squares.jsonl", rows, {"rows": len(rows)})
    return job


def test_a_credential_among_the_settings_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAD_TOKEN", "<|endoftext|>")
    with pytest.raises(ConfigError, match=r"engine\.url holds a password or token"):
        start(tmp_path / "job", {"engine": {"url": "http://me:secret@host:8000"}})
    with pytest.raises(ConfigError, match=r"model holds a password or token"):
        start(tmp_path / "job", config={"model": "hf_" + "0123456789abcdefABCDEF" * 2})
    with pytest.raises(ConfigError, match=r"url holds a password or token"):
        start(tmp_path / "job", {"url": "https://0123456789abcdef01234567@host/v1"})
    assert not (tmp_path / "job").exists()
    plain = {"url": "http://host:8000/v1?a=b@c", "model": "org/hf_model", "git": "ssh://git@host/x"}
    start(tmp_path / "job", plain | {"stop": "<|endoftext|>", "path": "hf_transformersexport"})


def test_rows_are_merged_by_index_and_times_stand_in_the_log_only(tmp_path: Path) -> None:
    run(tmp_path / "a")
    lines = (tmp_path / "a" / "squares.jsonl").read_text().splitlines()
    assert [json.loads(line)["square"] for line in lines] == [1, 4, 9, 16, 25]
    assert json.loads((tmp_path / "a" / "summary.json").read_text()) == {"rows": 5}
    log = [json.loads(line) for line in (tmp_path / "a" / "log" / "rank-0.jsonl").read_text().splitlines()]
    assert [entry.get("unit") for entry in log] == [None, "000000", "000001", "000002"]
    assert all(entry["seconds"] >= 0 for entry in log[1:])
    time.sleep(0.01)
    run(tmp_path / "b")
    assert whole(tmp_path / "a") == whole(tmp_path / "b")


def test_two_ranks_share_the_units_and_the_last_one_merges(tmp_path: Path) -> None:
    run(tmp_path / "alone")
    done: list[list[int]] = []
    for rank in (1, 0):
        job = start(tmp_path / "two", rank=rank, world_size=2)
        job.work("squares", UNITS, lambda unit: done.append(unit) or rows_of(unit))
        rows = job.rows("squares", UNITS)
        assert (rows is None) == (rank == 1)
        if rows is not None:
            job.finish("squares.jsonl", rows, {"rows": len(rows)})
    assert done == [[3], [1, 2], [4, 5]]
    assert whole(tmp_path / "two") == whole(tmp_path / "alone")


def test_what_is_done_is_not_done_again_and_a_torn_part_does_not_count(tmp_path: Path) -> None:
    job = start(tmp_path / "a")
    with pytest.raises(RuntimeError):
        job.work("squares", UNITS, dies_at_the_second)
    (tmp_path / "a" / "parts" / "squares" / ".000001.jsonl.abc.tmp").write_text('{"index": 3')
    again = start(tmp_path / "a", world_size=1)
    assert again.missing("squares", UNITS) == ["000001", "000002"]
    assert again.rows("squares", UNITS) is None
    run(tmp_path / "a")
    run(tmp_path / "alone")
    assert whole(tmp_path / "a") == whole(tmp_path / "alone")
    assert sorted(os.listdir(tmp_path / "a" / "parts" / "squares")) == [f"00000{n}.jsonl" for n in range(3)]


def dies_at_the_second(unit: list[int]) -> list[dict[str, Any]]:
    if unit == [3]:
        raise RuntimeError("killed")
    return rows_of(unit)


def test_other_settings_are_refused_by_name_and_free_ones_may_change(tmp_path: Path) -> None:
    start(tmp_path)
    with pytest.raises(ConfigError, match=r"(?s)model.name: 'tiny' then, 'other' now.*seed: 0 then, 1 now"):
        start(tmp_path, {"model": {"name": "other"}, "seed": 1})
    job = Job(tmp_path, "test job")
    assert job.begin(SETTINGS | {"seed": 1}, free=["seed"])["seed"] == 0
    assert read_settings(tmp_path)["kind"] == "test job"


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"is not empty \(thesis.tex\) and holds no test job"):
        start(other, overwrite=True)
    Job(tmp_path / "kind", "other job").begin({})
    with pytest.raises(ConfigError, match=r"another kind of job \(other job\), not a test job"):
        start(tmp_path / "kind")
    with pytest.raises(ConfigError, match="is a file"):
        start(other / "thesis.tex")
    run(tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"holds more than a test job \(notes.txt\)"):
        start(tmp_path / "mine", overwrite=True)
    assert (other / "thesis.tex").read_text() == "x"


def test_overwrite_begins_anew(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / ".squares.jsonl.abc.tmp").write_text("of a process that was killed while it wrote")
    for rank in (0, 1):
        with pytest.raises(ConfigError, match="--overwrite is for one process, and 2 are started"):
            start(tmp_path, {"seed": 1}, rank=rank, overwrite=True, world_size=2)
    assert (tmp_path / "squares.jsonl").exists()
    start(tmp_path, {"seed": 1}, overwrite=True)
    assert not (tmp_path / "parts").exists()
    assert not (tmp_path / ".squares.jsonl.abc.tmp").exists()
    assert not (tmp_path / "squares.jsonl").exists()
    assert read_settings(tmp_path)["seed"] == 1


def test_a_rank_waits_for_the_others_and_says_for_whom(tmp_path: Path) -> None:
    said: list[str] = []
    first = start(tmp_path, rank=0, world_size=2, console=listener(said))
    first.work("squares", UNITS, rows_of)
    second = start(tmp_path, rank=1, world_size=2)
    thread = threading.Timer(0.2, lambda: second.work("squares", UNITS, rows_of))
    thread.start()
    assert len(first.wait("squares", UNITS)) == 5
    assert said == ["rank 0 has finished its squares and waits for rank 1"]
    impatient = start(tmp_path, rank=0, world_size=2, wait_s=0)
    with pytest.raises(StepkdError, match="nothing new came for 0 s"):
        impatient.wait("more", UNITS)


def test_a_stage_is_done_once_and_refused_when_its_inputs_have_changed(tmp_path: Path) -> None:
    job = start(tmp_path)
    assert job.facts("stages", "train") is None
    assert job.missing("stages", ["train"]), "asking writes nothing"
    assert job.once("stages", "train", lambda: {"loss": 1.5}, inputs={"rows": "ab"}) == {"loss": 1.5}
    assert job.once("stages", "train", lambda: {"loss": 9.9}, inputs={"rows": "ab"}) == {"loss": 1.5}
    with pytest.raises(ConfigError, match=r"(?s)train\.jsonl is finished.*rows: 'ab' then, 'cd' now"):
        job.once("stages", "train", lambda: {"loss": 9.9}, inputs={"rows": "cd"})
    assert job.facts("stages", "train") == {"loss": 1.5}


def test_a_job_that_trains_keeps_other_processes_out_and_a_dead_one_does_not(tmp_path: Path) -> None:
    job = start(tmp_path)
    code = (
        "import sys, time; from pathlib import Path; from stepkd.runs.job import Job\n"
        "with Job(Path(sys.argv[1]), 'test job').alone():\n    print('in', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "in\n"
    with pytest.raises(ConfigError, match=f"in use by process {other.pid}"):
        start(tmp_path, overwrite=True)
    other.kill()
    other.wait()
    with job.alone():
        start(tmp_path)
    assert not (tmp_path / "log" / "running.json").exists()


def test_a_damaged_part_and_damaged_settings_are_named(tmp_path: Path) -> None:
    job = run(tmp_path)
    part = job.part("squares", "000001")
    part.write_text('{"index": 3')
    with pytest.raises(DataError, match=r"000001\.jsonl: a damaged part .*: delete it"):
        job.rows("squares", UNITS)
    part.write_text("")
    with pytest.raises(DataError, match=r"000001\.jsonl: a damaged part \(it is empty\)"):
        job.rows("squares", UNITS)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(DataError, match="not the settings of a job"):
        start(tmp_path)
    with pytest.raises(DataError, match="no settings of a job"):
        read_settings(tmp_path / "nothing")


def test_a_unit_without_rows_is_refused_where_it_is_made(tmp_path: Path) -> None:
    job = start(tmp_path)
    with pytest.raises(AssertionError, match="left no row"):
        job.work("squares", UNITS, lambda unit: [])
    assert job.missing("squares", UNITS) == list(UNITS)


def test_a_full_disk_keeps_the_finished_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = start(tmp_path)

    def do(unit: list[int]) -> list[dict[str, Any]]:
        if unit == [3]:
            monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        return rows_of(unit)

    with pytest.raises(MachineError, match="No space left on device"):
        job.work("squares", UNITS, do)
    monkeypatch.undo()
    assert job.missing("squares", UNITS) == ["000001", "000002"]


def test_progress_counts_this_ranks_rows_and_sums_the_figures(tmp_path: Path) -> None:
    seen: list[Any] = []
    job = start(tmp_path, report=lambda *facts: seen.append(facts))
    job.work("squares", UNITS, rows_of, lambda rows: {"even": (sum(r["index"] % 2 == 0 for r in rows), len(rows))})
    assert seen == [
        ("squares", 2, 5, {"even": 0.5}),
        ("squares", 3, 5, {"even": 1 / 3}),
        ("squares", 5, 5, {"even": 2 / 5}),
    ]
    job.work("more", {"a": None, "b": None}, lambda unit: [{"index": 0}])
    assert seen[3:] == [("more", 1, 2, {}), ("more", 2, 2, {})]
    assert finished_rows(tmp_path, "squares") == job.rows("squares", UNITS)


def test_speeds_are_reported_and_logged_and_stand_in_no_result(tmp_path: Path) -> None:
    seen: list[Any] = []
    job = start(tmp_path, report=lambda *facts: seen.append(facts[-1]))
    job.work("squares", UNITS, rows_of, lambda rows: {"rows/s": (len(rows), None)})
    log = [json.loads(line) for line in (tmp_path / "log" / "rank-0.jsonl").read_text().splitlines()]
    assert all(entry["rows/s"] > 0 for entry in log[1:])
    assert seen[-1]["rows/s"] > 0
    assert all(set(row) == {"index", "square"} for row in job.rows("squares", UNITS) or [])


def test_results_are_read_when_finished_and_so_far(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no results there: is this the --out of a job"):
        read_results(tmp_path)
    job = Job(tmp_path, "test job", ("results.jsonl", "summary.json"))
    job.begin(SETTINGS)
    with pytest.raises(RuntimeError):
        job.work("squares", UNITS, dies_at_the_second)
    assert [row["index"] for row in read_results(tmp_path)] == [1, 2]
    job.work("squares", UNITS, rows_of)
    job.finish("results.jsonl", job.rows("squares", UNITS) or [], {})
    shutil.rmtree(tmp_path / "parts")
    assert [row["index"] for row in read_results(tmp_path)] == [1, 2, 3, 4, 5]


def test_differences_name_nested_settings_and_ignore_threads_on_accelerators() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "device": "cpu", "threads": 2}
    assert differences(old, {"a": {"b": 2, "c": [1, 2]}, "device": "cpu", "threads": 4, "new": None}) == {
        "a.b": (1, 2),
        "threads": (2, 4),
        "new": (ABSENT, None),
    }
    with pytest.raises(ConfigError, match=r"threads: 2 then, 4 now\n.*OMP_NUM_THREADS sets it"):
        check_same(old, old | {"threads": 4}, "x")
    gpu = {"device": "cuda", "threads": 2}
    assert differences(gpu, gpu | {"threads": 4}) == {}
    check_same(old, old | {"a": 7}, "x", free=["a"])
    assert differences({"x": True}, {"x": 1}) == {"x": (True, 1)}


WORKER = """
import sys, time
from pathlib import Path
from stepkd.runs.job import Job, JobOptions, numbered

out, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
job = Job(out, "test job", ("squares.jsonl", "summary.json"), JobOptions(rank=rank, world_size=world, wait_s=30))
job.begin({"seed": 0})
units = numbered([[n, n + 1] for n in range(0, 40, 2)])

def do(unit):
    with open(out.with_suffix(f".done.{rank}"), "a") as stream:
        print(unit[0], file=stream)
    time.sleep(0.01)
    return [{"index": n, "square": n * n} for n in unit]

job.work("squares", units, do)
rows = job.wait("squares", units)
job.work("sums", units, lambda unit: [{"index": n, "sum": sum(row["square"] for row in rows[: n + 1])} for n in unit])
if (sums := job.rows("sums", units)) is not None:
    job.finish("squares.jsonl", sums, {"rows": len(sums)})
"""


@pytest.mark.parametrize("sign", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_killed_at_random_moments_by_one_and_two_ranks_it_ends_with_the_same_bytes(
    tmp_path: Path, sign: signal.Signals
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    forked.run([str(tmp_path / "whole"), "0", "1"], script=script).check_returncode()
    moments, out = random.Random(f"{sign}"), tmp_path / "torn"
    kills = 0
    for attempt in range(30):
        world = 1 + attempt % 2
        ranks = [forked.Command([str(out), str(rank), str(world)], script=script) for rank in range(world)]
        if attempt < 6:
            while not out.exists() and ranks[0].poll() is None:
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.12))
            ranks[-1].send_signal(sign)
            if world == 2:  # a launcher ends the other ranks when one has died
                ranks[0].terminate()
        codes = [rank.wait(60) for rank in ranks]
        kills += any(codes)
        if not any(codes):
            break
    assert kills >= 3
    assert whole(out) == whole(tmp_path / "whole")
    done = [int(line) for path in tmp_path.glob("torn.done.*") for line in path.read_text().split()]
    assert sorted(set(done)) == list(range(0, 40, 2))
    assert len(done) - 20 <= 2 * kills, "only units in flight are done twice"
