"""Paired comparison of two run folders."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.compare import compare_runs
from stepkd.runs.files import write_json, write_jsonl


def write_run(folder: Path, right: dict[str, list[bool]], **changes: Any) -> Path:
    """A run folder with the given verdicts per problem id."""
    settings: dict[str, Any] = {
        "kind": "evaluation",
        "model": {"name": "acme/tiny"},
        "seed": 0,
        "device": "cpu",
        "benchmark": {"name": "gsm8k", "data": "d1", "limit": None},
    }
    write_json(folder / "settings.json", settings | changes)
    rows = [
        {"id": key, "index": i, "samples": [{"verdict": "correct" if good else "wrong"} for good in verdicts]}
        for i, (key, verdicts) in enumerate(right.items())
    ]
    write_jsonl(folder / "results.jsonl", rows)
    return folder


def test_numbers_against_brute_force(tmp_path: Path) -> None:
    a = {"p0": [True, False], "p1": [False, False], "p2": [True, True], "p3": [False, True]}
    b = {"p0": [True, True], "p1": [True, False], "p2": [False, True], "p3": [True, True]}
    result = compare_runs(
        write_run(tmp_path / "a", a),
        write_run(tmp_path / "b", b, model={"name": "acme/new"}),
        n_resamples=20_000,
        level=0.8,
    )
    gaps = np.array([0.5, 0.5, -0.5, 0.5])
    resampled = sorted(np.mean(draw) for draw in itertools.product(gaps, repeat=4))
    assert result.difference.value == pytest.approx(0.25)
    # All 4^4 resamples: the 10% and 90% points of their means.
    assert result.difference.low == pytest.approx(np.quantile(resampled, 0.1))
    assert result.difference.high == pytest.approx(np.quantile(resampled, 0.9))
    assert (result.pass1_a.value, result.pass1_b.value) == (0.5, 0.75)
    assert (result.fixed, result.broken) == (("p1", "p3"), ("p2",))
    assert result.p_value == 1.0  # 2 against 1 of 3
    assert result.mid_p_value == pytest.approx(1 - 3 / 8)
    assert dict(result.settings) == {"model.name": ("acme/tiny", "acme/new")}
    assert result.warnings == ()


def test_swapping_the_runs_mirrors_the_result(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a = write_run(tmp_path / "a", {f"p{i}": [bool(rng.random() < 0.4)] for i in range(60)})
    b = write_run(tmp_path / "b", {f"p{i}": [bool(rng.random() < 0.7)] for i in range(60)})
    there, back = compare_runs(a, b), compare_runs(b, a)
    assert there.difference.value == -back.difference.value
    assert (there.difference.low, there.difference.high) == pytest.approx((-back.difference.high, -back.difference.low))
    assert (there.fixed, there.broken, there.p_value) == (back.broken, back.fixed, back.p_value)
    assert there.pass1_a.method == "wilson"


def test_pairs_by_id_and_warns_of_the_rest(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"x": [True], "y": [False], "only": [True]})
    b = write_run(tmp_path / "b", {"y": [True], "x": [True]}, limit=2)
    result = compare_runs(a, b)
    assert (result.problems, result.fixed, result.broken) == (2, ("y",), ())
    assert result.warnings == ("1 problems only in A and 0 only in B are left out",)
    assert "warning: 1 problems only in A" in str(result)


def test_identical_runs_and_one_problem(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"x": [True], "y": [False]})
    same = compare_runs(a, a)
    assert (same.difference.value, same.difference.low, same.difference.high) == (0.0, 0.0, 0.0)
    assert same.p_value == 1.0
    single = compare_runs(write_run(tmp_path / "b", {"x": [True]}), write_run(tmp_path / "c", {"x": [False]}))
    assert "-1.000 [no interval]" in str(single)
    assert single.to_dict()["difference"]["low"] is None


def test_text_and_dict(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {f"p{i:02d}": [False] for i in range(14)})
    b = write_run(tmp_path / "b", {f"p{i:02d}": [i > 0] for i in range(14)}, seed=3)
    result = compare_runs(a, b)
    text = str(result)
    assert text.splitlines()[0] == "gsm8k: 14 problems in both runs, 95% intervals"
    assert "first sample: 13 fixed, 0 broken in B, exact McNemar p = 0.000244" in text
    assert "p09, p10, and 3 more" in text
    assert "seed: 0 -> 3" in text
    as_dict = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert len(as_dict["first_sample"]["fixed"]) == 13
    assert as_dict["difference"]["value"] == pytest.approx(13 / 14)
    assert as_dict["settings"] == {"seed": [0, 3]}


def test_refusals(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"x": [True]})
    other = write_run(tmp_path / "other", {"x": [True]}, benchmark={"name": "svamp", "data": "d1", "limit": None})
    with pytest.raises(ConfigError, match="different benchmarks: 'gsm8k' and 'svamp'"):
        compare_runs(a, other)
    changed = write_run(tmp_path / "changed", {"x": [True]}, benchmark={"name": "gsm8k", "data": "d2", "limit": None})
    with pytest.raises(ConfigError, match=r"different data \(fingerprints\): 'd1' and 'd2'"):
        compare_runs(a, changed)
    with pytest.raises(DataError, match=r"no finished problem in common \(1 and 1\)"):
        compare_runs(a, write_run(tmp_path / "later", {"y": [True]}))
    with pytest.raises(DataError, match="no settings of a job there"):
        compare_runs(a, tmp_path / "nowhere")
    (a / "results.jsonl").unlink()
    with pytest.raises(DataError, match=r"no results there: .*is it finished"):
        compare_runs(a, tmp_path / "later")
    with pytest.raises(DataError, match="'x' has no samples"):
        compare_runs(write_run(tmp_path / "none", {"x": []}), write_run(tmp_path / "d", {"x": [True]}))
