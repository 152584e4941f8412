"""Running a claim: rows, resuming after a kill, refusing other settings, and experiments that break their word."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepkd.claims.claim_file import Claim, load_claim
from stepkd.claims.experiment import ArmResult, Report, Unit
from stepkd.claims.runner import run_claim, seed_values
from stepkd.errors import ConfigError, DataError

Write = Callable[..., Path]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def quiet(line: str) -> None:
    """Nothing is printed."""


def calls(out: Path) -> dict[str, int]:
    """Unit -> how often the experiment was called for it."""
    return {
        "/".join(path.parent.relative_to(out / "units").parts): len(path.read_text().splitlines())
        for path in sorted((out / "units").rglob("calls.txt"))
    }


def test_rows_and_values(write_claim: Write, tmp_path: Path) -> None:
    claim = load_claim(write_claim(seeds=[3, 1], variants={"one": {}, "two": {"task": "two"}}))
    out = tmp_path / "out"
    lines: list[str] = []
    run_claim(claim, out, report=lines.append)
    rows = read_rows(out / "results.jsonl")
    assert sorted(row["id"] for row in rows) == sorted(
        f"{variant}/{seed}/{arm}" for variant in ("one", "two") for seed in (3, 1) for arm in ("plain", "better")
    )
    assert any("fake 1/4, one, seed 3: drawing" in line for line in lines)
    assert any("4/4, two, seed 1: done" in line for line in lines)
    values = seed_values(claim, out, "two")
    assert values["better"]["right"][0].shape == (30, 1, 2)
    assert values["better"]["steps"][0].tolist() == [[[100.0, 1.0]]]
    row = next(row for row in rows if row["id"] == "two/1/plain")
    assert values["plain"]["right"][1][:, 0, 0].tolist() == row["metrics"]["right"]  # the order of the file's seeds


def test_a_second_call_does_nothing_and_more_seeds_only_themselves(write_claim: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_claim(load_claim(write_claim(seeds=[0, 1])), out, report=quiet)
    written = (out / "results.jsonl").stat().st_mtime_ns
    run_claim(load_claim(write_claim(seeds=[0, 1])), out, report=quiet)
    assert (out / "results.jsonl").stat().st_mtime_ns == written, "a finished claim is only looked at"
    run_claim(load_claim(write_claim(seeds=[2, 1, 0])), out, report=quiet)
    assert [row["seed"] for row in read_rows(out / "results.jsonl")] == [0, 0, 1, 1, 2, 2]
    assert calls(out) == {"main/seed-0": 1, "main/seed-1": 1, "main/seed-2": 1}


@pytest.mark.parametrize("sign", ["SIGKILL", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_killed_and_resumed(write_claim: Write, experiment_folder: Path, tmp_path: Path, sign: str) -> None:
    """A signal in the third seed: the first two are not repeated and the end is that of an unbroken run."""
    path = write_claim(settings={"kill_at": 2})
    command = [sys.executable, "-m", "stepkd", "claims", "run", str(path), "--out", str(tmp_path / "runs")]
    environment = {**os.environ, "SIGN": sign, "PYTHONPATH": os.pathsep.join([str(experiment_folder), *sys.path])}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.Signals[sign]
    out = tmp_path / "runs" / "fake"
    assert sorted(path.name for path in (out / "parts" / "main").iterdir()) == ["seed-0.jsonl", "seed-1.jsonl"]
    again = subprocess.run(command, env={**environment, "SPARE": "1"}, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert calls(out) == {"main/seed-0": 1, "main/seed-1": 1, "main/seed-2": 2, "main/seed-3": 1, "main/seed-4": 1}
    assert "fake 1/3, seed 2" in again.stdout
    unbroken = tmp_path / "unbroken"
    run_claim(load_claim(write_claim()), unbroken, report=quiet)
    assert (out / "results.jsonl").read_bytes() == (unbroken / "results.jsonl").read_bytes()


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
    assert calls(out) == {"main/seed-0": 1}  # the old units are gone


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
    with pytest.raises(DataError, match="not valid JSON"):
        run_claim(claim, out, report=quiet)


def test_unequal_budgets_stop_the_run(write_claim: Write, tmp_path: Path) -> None:
    arms = {"plain": {"steps": 100}, "better": {"steps": 120}, "free": {"steps": 0}}
    claim = load_claim(write_claim(arms=arms, equal={"steps": ["plain", "better"]}))
    with pytest.raises(DataError, match="wants equal steps, and the arms have plain 100, better 120"):
        run_claim(claim, tmp_path / "out", report=quiet)
    arms["better"]["steps"] = 100
    claim = load_claim(write_claim(arms=arms, equal={"steps": ["plain", "better"]}))
    run_claim(claim, tmp_path / "equal", report=quiet)
    with pytest.raises(DataError, match="free 0"):
        run_claim(load_claim(write_claim(arms=arms, equal={"steps": None})), tmp_path / "all", report=quiet)


def test_values_of_a_seed_that_was_not_run(write_claim: Write, tmp_path: Path) -> None:
    run_claim(load_claim(write_claim(seeds=[0])), tmp_path / "out", report=quiet)
    with pytest.raises(DataError, match="seed 1, arm 'plain' has not been run"):
        seed_values(load_claim(write_claim(seeds=[0, 1])), tmp_path / "out", "main")


def good(arm: str, **changes: Any) -> ArmResult:
    fields: dict[str, Any] = {
        "arm": arm,
        "problems": ["p", "q"],
        "metrics": {"right": [1, 0], "share": 0.5},
        "facts": {"steps": 1},
    }
    return ArmResult(**{**fields, **changes})


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([good("plain")], r"returned the arms \['plain'\]"),
        ([good("plain"), good("plain")], "returned the arms"),
        ([good(arm, metrics={"share": 1}) for arm in ("plain", "better")], r"\['right', 'share'\] and .* \['share'\]"),
        (
            [good("plain"), good("better", facts={"steps": 1, "x": 2})],
            r"facts \['steps'\] and returned \['steps', 'x'\]",
        ),
        ([good("plain"), good("better", metrics={"share": 1})], "the arm 'better' returned no 'right'"),
        ([good("plain", metrics={"right": 1, "share": 1, "steps": 1}), good("better")], "declares the metrics"),
        ([good("plain"), good("better", facts={"steps": float("inf")})], "the fact 'steps' is inf"),
        ([good("plain"), good("better", problems=["p", "r"])], "other problems than arm 'plain'"),
        ([good("plain"), good("better", metrics={"right": [1], "share": 0.5})], "1 entries for 2 problems"),
        ([good("plain"), good("better", metrics={"right": [1, float("nan")], "share": 0})], "'right' holds a value"),
        ([good("plain"), good("better", metrics={"right": ["yes", "no"], "share": 0})], "metric 'right'"),
        ([good("plain"), good("better", metrics={"right": [[1], [1, 2]], "share": 0})], "metric 'right'"),
    ],
)
def test_an_experiment_that_breaks_its_word(
    results: Sequence[ArmResult], message: str, write_claim: Write, tmp_path: Path
) -> None:
    def run(unit: Unit, report: Report) -> Sequence[ArmResult]:
        return results

    with pytest.raises(DataError, match=message):
        run_claim(with_run(load_claim(write_claim(seeds=[0])), run), tmp_path / "out", report=quiet)
    assert not (tmp_path / "out" / "parts").exists()


def test_an_arm_may_lack_a_metric_but_not_for_some_seeds(write_claim: Write, tmp_path: Path) -> None:
    def run(unit: Unit, report: Report) -> Sequence[ArmResult]:
        lacks = {"right": 1} if unit.seed < 2 else {"right": 1, "share": 1}
        return [good("plain"), good("better", metrics=lacks, facts={})]

    claim = with_run(load_claim(write_claim(seeds=[0, 1])), run)
    run_claim(claim, tmp_path / "out", report=quiet)
    assert set(seed_values(claim, tmp_path / "out", "main")["better"]) == {"right"}
    uneven = with_run(load_claim(write_claim(seeds=[1, 2])), run)
    run_claim(uneven, tmp_path / "out", report=quiet)
    with pytest.raises(DataError, match="'share' is not there for every seed up to 2"):
        seed_values(uneven, tmp_path / "out", "main")


def test_a_name_may_not_be_metric_and_fact(write_claim: Write, tmp_path: Path) -> None:
    def run(unit: Unit, report: Report) -> Sequence[ArmResult]:
        return [good(arm, metrics={"right": 1, "steps": 1}) for arm in unit.arms]

    claim = with_run(load_claim(write_claim(seeds=[0])), run)
    experiment = dataclasses.replace(claim.experiment, metrics=("right", "steps"))
    with pytest.raises(DataError, match="'steps' is both a metric and a fact"):
        run_claim(dataclasses.replace(claim, experiment=experiment), tmp_path / "out", report=quiet)


def test_results_without_a_manifest_are_not_used(write_claim: Write, tmp_path: Path) -> None:
    claim, out = load_claim(write_claim(seeds=[0])), tmp_path / "out"
    run_claim(claim, out, report=quiet)
    (out / "settings.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no claim \(no settings\.json\)"):
        run_claim(claim, out, report=quiet)


def test_numpy_values_are_stored(write_claim: Write, tmp_path: Path) -> None:
    def run(unit: Unit, report: Report) -> Sequence[ArmResult]:
        metrics = {"right": np.array([True, False]), "share": np.float32(0.5)}
        return [good(arm, metrics=metrics, facts={"steps": 2}) for arm in unit.arms]

    run_claim(with_run(load_claim(write_claim(seeds=[0])), run), tmp_path / "out", report=quiet)
    row = read_rows(tmp_path / "out" / "results.jsonl")[0]
    assert row["metrics"] == {"right": [1.0, 0.0], "share": 0.5}


def with_run(claim: Claim, run: Callable[[Unit, Report], Sequence[ArmResult]]) -> Claim:
    return dataclasses.replace(claim, experiment=dataclasses.replace(claim.experiment, run=run))
