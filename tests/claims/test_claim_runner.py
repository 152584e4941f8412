"""Running a claim: rows, resuming after a kill, refusing other settings, and experiments that break their word."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import psutil
import pytest

from stepkd.claims import Measured, runner
from stepkd.claims.claim_file import load_claim
from stepkd.claims.jobs import run_job
from stepkd.claims.runner import run_claim, seed_values
from stepkd.errors import ConfigError, DataError, StepkdError

Write = Callable[..., Path]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def quiet(line: str) -> None:
    """Nothing is printed."""


def calls(out: Path) -> dict[str, int]:
    """Unit -> how often the function was called for it, over all arms."""
    found: dict[str, int] = {}
    for path in sorted((out / "units").rglob("calls.txt")):
        unit = "/".join(path.parent.parent.relative_to(out / "units").parts)
        found[unit] = found.get(unit, 0) + len(path.read_text().splitlines())
    return found


def test_rows_and_values(write_claim: Write, tmp_path: Path) -> None:
    claim = load_claim(write_claim(seeds=[3, 1], variants={"one": {}, "two": {"task": "two"}}))
    out = tmp_path / "out"
    lines: list[str] = []
    run_claim(claim, out, report=lines.append)
    rows = read_rows(out / "results.jsonl")
    assert sorted(row["id"] for row in rows) == sorted(
        f"{variant}/{seed}/{arm}" for variant in ("one", "two") for seed in (3, 1) for arm in ("plain", "better")
    )
    assert any("fake 1/4, one, seed 3: drawn (call)" in line for line in lines)
    assert any("4/4, two, seed 1: done" in line for line in lines)
    values = seed_values(claim, out, "two")
    assert values["better"]["correct"][0].shape == (30, 1, 2)
    assert values["better"]["steps"][0].tolist() == [[[100.0, 1.0]]]
    row = next(row for row in rows if row["id"] == "two/1/plain")
    assert values["plain"]["correct"][1][:, 0, 0].tolist() == row["metrics"]["correct"]  # the order of the file's seeds


def test_arms_with_the_same_settings_share_a_job(write_claim: Write, tmp_path: Path) -> None:
    arms = {"plain": {}, "better": {"gain": 0.3}, "again": {"gain": 0.3}}
    run_claim(load_claim(write_claim(seeds=[0], arms=arms)), tmp_path / "out", report=quiet)
    assert calls(tmp_path / "out") == {"main/seed-0": 2}


def test_a_job_finds_the_jobs_that_it_refers_to(write_claim: Write, tmp_path: Path) -> None:
    seen = {
        "call": {"function": "fake_claim_code.give", "columns": {"place": 1}, "problems": ["$drawn/calls.txt", "$arm"]}
    }
    claim = load_claim(
        write_claim(
            seeds=[4],
            jobs={**load_claim(write_claim()).jobs, "seen": seen},
            settings={"of": "$seen"},
            arms={"plain": {}, "better": {"gain": 0.3, "of": None}},
            metrics={"correct": "drawn", "place": "of.place"},
        )
    )
    run_claim(claim, tmp_path / "out", report=quiet)
    assert [sorted(row["metrics"]) for row in read_rows(tmp_path / "out" / "results.jsonl")] == [
        ["correct", "place"],
        ["correct"],  # a metric whose job is null is not measured
    ]
    (left,) = (tmp_path / "out" / "units" / "main" / "seed-4").glob("seen-*.json")
    file, arm = json.loads(left.read_text())["problems"]
    assert (Path(file).is_file(), arm) == (True, "plain")


def test_a_second_call_does_nothing_and_more_seeds_only_themselves(write_claim: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_claim(load_claim(write_claim(seeds=[0, 1])), out, report=quiet)
    written = (out / "results.jsonl").stat().st_mtime_ns
    run_claim(load_claim(write_claim(seeds=[0, 1])), out, report=quiet)
    assert (out / "results.jsonl").stat().st_mtime_ns == written, "a finished claim is only looked at"
    run_claim(load_claim(write_claim(seeds=[2, 1, 0])), out, report=quiet)
    assert [row["seed"] for row in read_rows(out / "results.jsonl")] == [0, 0, 1, 1, 2, 2]
    assert calls(out) == {f"main/seed-{seed}": 2 for seed in range(3)}


@pytest.mark.parametrize("sign", [pytest.param("SIGKILL", marks=pytest.mark.slow), "SIGTERM"])
def test_killed_and_resumed(write_claim: Write, code_folder: Path, tmp_path: Path, sign: str) -> None:
    """A signal in the second arm of the third seed: what was done before is not repeated, and the end is the same."""
    path = write_claim(settings={"kill_at": 2})
    words = ["claims", "run", str(path), "--out", str(tmp_path / "runs")]
    killed = forked.run(words, SIGN=sign, PYTHONPATH=str(code_folder))
    assert killed.returncode == -signal.Signals[sign]
    out = tmp_path / "runs" / "fake"
    assert sorted(path.name for path in (out / "parts" / "main").iterdir()) == ["seed-0.jsonl", "seed-1.jsonl"]
    again = forked.run(words, SIGN=sign, PYTHONPATH=str(code_folder), SPARE="1")
    assert again.returncode == 0, again.stderr
    assert calls(out) == {f"main/seed-{seed}": 2 + (seed == 2) for seed in range(5)}
    assert "fake 1/3, seed 2" in again.stdout
    unbroken = tmp_path / "unbroken"
    run_claim(load_claim(write_claim()), unbroken, report=quiet)
    assert (out / "results.jsonl").read_bytes() == (unbroken / "results.jsonl").read_bytes()


def test_two_processes_divide_the_seeds(
    write_claim: Write, tmp_path: Path, code_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first seed's job runs, the same command is given in another process: it does the second seed."""
    words = ["claims", "run", str(write_claim(seeds=[0, 1])), "--out", str(tmp_path / "runs")]
    found = []

    def meanwhile(kind: str, settings: Any, out: Path) -> Measured:
        if not found:
            found.append(forked.run(words, PYTHONPATH=str(code_folder)))
        return run_job(kind, settings, out)

    monkeypatch.setattr(runner, "run_job", meanwhile)
    lines: list[str] = []
    assert run_claim(load_claim(Path(words[2])), tmp_path / "runs" / "fake", report=lines.append) is not None
    (other,) = found
    assert other.returncode == 0, other.stderr
    assert "another process works at seed 0" in other.stdout
    assert "not reproduced" not in other.stdout
    assert calls(tmp_path / "runs" / "fake") == {"main/seed-0": 2, "main/seed-1": 2}
    assert not [*(tmp_path / "runs").rglob("running.json")]


def test_a_seed_that_another_process_works_at_is_not_deleted(write_claim: Write, tmp_path: Path) -> None:
    claim, out = load_claim(write_claim(seeds=[0])), tmp_path / "out"
    run_claim(claim, out, report=quiet)
    parent = psutil.Process(os.getppid())
    marker = {"host": socket.gethostname(), "pid": parent.pid, "pid_start": parent.create_time()}
    (out / "units" / "main" / "seed-0" / "running.json").write_text(json.dumps(marker))
    with pytest.raises(ConfigError, match=f"in use by process {parent.pid}"):
        run_claim(claim, out, report=quiet, overwrite=True)
    assert calls(out) == {"main/seed-0": 2}


def test_other_settings_are_refused_by_name(write_claim: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_claim(load_claim(write_claim(seeds=[0])), out, report=quiet)
    before = (out / "results.jsonl").read_bytes()
    changed = load_claim(write_claim(seeds=[0], settings={"base": 0.4}, arms={"plain": {}, "better": {"gain": 0.2}}))
    with pytest.raises(ConfigError) as caught:
        run_claim(changed, out, report=quiet)
    assert "variants.main.base: 0.5 then, 0.4 now" in str(caught.value)
    assert "arms.better.gain: 0.3 then, 0.2 now" in str(caught.value)
    assert (out / "results.jsonl").read_bytes() == before
    run_claim(changed, out, report=quiet, overwrite=True)
    assert (out / "results.jsonl").read_bytes() != before
    assert calls(out) == {"main/seed-0": 2}  # the old units are gone


def test_other_packages_are_refused_only_where_something_is_missing(write_claim: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_claim(load_claim(write_claim(seeds=[0])), out, report=quiet)
    manifest = json.loads((out / "settings.json").read_text())
    manifest["packages"]["torch"] = "1.0"
    (out / "settings.json").write_text(json.dumps(manifest))
    assert run_claim(load_claim(write_claim(seeds=[0])), out, report=quiet)["packages"]["torch"] == "1.0"
    with pytest.raises(ConfigError, match=r"packages\.torch: '1\.0' then"):
        run_claim(load_claim(write_claim(seeds=[0, 1])), out, report=quiet)


def test_folders_of_others_are_left_alone(write_claim: Write, tmp_path: Path) -> None:
    claim = load_claim(write_claim(seeds=[0]))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds no claim"):
            run_claim(claim, foreign, report=quiet, overwrite=overwrite)
    assert (foreign / "thesis.txt").read_text() == "years"
    out = tmp_path / "out"
    run_claim(claim, out, report=quiet)
    (out / "settings.json").write_text("{")
    with pytest.raises(DataError, match="not the settings of a job"):
        run_claim(claim, out, report=quiet)


def test_unequal_budgets_stop_the_run(write_claim: Write, tmp_path: Path) -> None:
    arms: dict[str, dict[str, Any]] = {"plain": {"steps": 100}, "better": {"steps": 120}, "free": {"steps": 0}}
    claim = load_claim(write_claim(arms=arms, equal={"steps": ["plain", "better"]}))
    with pytest.raises(DataError, match="wants equal steps, and the arms have plain 100, better 120"):
        run_claim(claim, tmp_path / "out", report=quiet)
    arms["better"]["steps"] = 100
    claim = load_claim(write_claim(arms=arms, equal={"steps": ["plain", "better"]}))
    run_claim(claim, tmp_path / "equal", report=quiet)
    with pytest.raises(DataError, match="free 0"):
        run_claim(load_claim(write_claim(arms=arms, equal={"steps": None})), tmp_path / "all", report=quiet)


def give(columns: Any, problems: Any = ()) -> dict[str, Any]:
    return {"call": {"function": "fake_claim_code.give", "columns": columns, "problems": problems}}


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (give({"share": 1}), "no arm has the metric 'correct': is there such a column"),
        (give({"correct": ["1", "nan"]}, ["p", "q"]), "the metric 'correct' holds a value that is not a finite number"),
        (give({"correct": [1]}, ["p", "q"]), "the metric 'correct' has 1 entries for 2 problems"),
        (give({"correct": ["yes", "no"]}, ["p", "q"]), "the metric 'correct'"),
        (give({"correct": [[1], [1, 2]]}, ["p", "q"]), "the metric 'correct'"),
        (give({"correct": [1, 0]}, ["p", "$arm"]), "arm 'better': the metric 'correct' is about other problems"),
        ({"call": {"function": "fake_claim_code.nothing"}}, "returned a int, not a stepkd.claims.Measured"),
        ({"call": {"function": "fake_claim_code.missing"}}, "no function fake_claim_code.missing"),
        ({"call": {"function": "no_such_module.x"}}, "no function no_such_module.x"),
        ({"label": {"labeler": "TaskChecker"}}, "'labeler' is not a setting; did you mean 'labeller'?"),
        (
            {"evaluate": {"model": "tiny-0.1m", "engine": {"max_rows": "many"}}},
            "evaluate: engine.max_rows: expected int, got 'many'",
        ),
        (
            {"draw": {"rows": "r", "count": "5", "seed": 0, "key": "a"}},
            "draw: count: Input should be a valid integer, ",
        ),
        (
            {"draw": {"rows": "r", "count": 2.5, "seed": 0, "key": "a"}},
            "draw: count: Input should be a valid integer, ",
        ),
        ({"draw": {"rows": "r", "count": 5, "seed": 0, "key": 1}}, "draw: key: Input should be a valid string, got 1"),
        ({"draw": {"rows": "r", "seed": 0, "key": "a"}}, "draw: missing a required .*'count'"),
        (
            {"best_of_n": {"scores": {"a": "x"}, "ks": [1], "extractors": "boxed", "seed": 0}},
            "best_of_n: extractors: .*got 'boxed'",
        ),
        ({"best_of_n": {"scores": {}, "ks": [1], "extractors": ["boxed"], "seed": 0}}, "needs at least one file"),
        ({"pairs": {"to": "stepp"}}, "pairs: to must be one of step, tree"),
        ({"fit": {"recipes": ["tiny/stf"]}}, "no recipe 'tiny/stf'"),
    ],
)
def test_jobs_that_cannot_be_used(job: Any, message: str, write_claim: Write, tmp_path: Path) -> None:
    claim = load_claim(write_claim(seeds=[0], jobs={"drawn": job}, metrics={"correct": "drawn"}))
    with pytest.raises(StepkdError, match=message):
        run_claim(claim, tmp_path / "out", report=quiet)
    assert not (tmp_path / "out" / "parts").exists()


def test_a_statement_needs_its_metric_from_its_arms(write_claim: Write, tmp_path: Path) -> None:
    arms = {"plain": {}, "better": {"of": None}}
    claim = load_claim(write_claim(seeds=[0], settings={"of": "$drawn"}, metrics={"correct": "of"}, arms=arms))
    with pytest.raises(DataError, match="the arm 'better' has no 'correct'"):
        run_claim(claim, tmp_path / "out", report=quiet)


def test_an_arm_may_not_lack_a_metric_for_some_seeds_only(write_claim: Write, tmp_path: Path) -> None:
    claim = load_claim(write_claim(seeds=[1, 2]))
    run_claim(claim, tmp_path / "out", report=quiet)
    part = tmp_path / "out" / "parts" / "main" / "seed-2.jsonl"
    part.write_text(part.read_text().replace('"share"', '"other"'))
    with pytest.raises(DataError, match="seed 2 has no 'share'"):
        seed_values(claim, tmp_path / "out", "main")


def test_safe_mode_calls_no_code_of_a_stranger(
    write_claim: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = load_claim(write_claim(seeds=[0]))
    monkeypatch.setenv("STEPKD_SAFE", "1")
    with pytest.raises(StepkdError, match="a claim names the code 'fake_claim_code', and --safe allows only"):
        run_claim(claim, tmp_path / "out", report=quiet)
    assert "fake_claim_code" not in sys.modules


def test_results_without_a_manifest_are_not_used(write_claim: Write, tmp_path: Path) -> None:
    claim, out = load_claim(write_claim(seeds=[0])), tmp_path / "out"
    run_claim(claim, out, report=quiet)
    (out / "settings.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no claim \(no settings\.json\)"):
        run_claim(claim, out, report=quiet)
