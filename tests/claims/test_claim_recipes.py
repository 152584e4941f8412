"""The claims that come with stepkd: they fit their experiments, and committed results belong to them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepkd.claims.claim_file import load_claim
from stepkd.claims.experiment import experiment_names, get_experiment
from stepkd.claims.results import read_results, results_path
from stepkd.claims.statements import Statement, overall
from stepkd.cli import main
from stepkd.statistics import Interval, t_interval

ROOT = Path(__file__).resolve().parents[2] / "recipes" / "claims"
CLAIMS = sorted(ROOT.glob("*.yaml"))
RESULTS = sorted((ROOT / "results").glob("*.json"))


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_every_claim_fits_its_experiment(path: Path) -> None:
    full, quick = load_claim(path), load_claim(path, quick=True)
    assert len(full.seeds) >= 5
    assert len(quick.seeds) < len(full.seeds)
    assert full.identity() != quick.identity(), "quick is as large as the claim"
    assert all(full.statements_of(variant) for variant in full.variants), "a variant without a statement"


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_committed_results_belong_to_the_claim(path: Path) -> None:
    """Run the claim again with --save, or add a key "stale" with the reason to its results file."""
    claim = load_claim(path)
    results = read_results(claim)
    if results is None:
        pytest.skip("no results yet")
    if not results.get("stale"):
        assert results["fingerprint"] == claim.fingerprint()
        assert results["seeds"] == list(claim.seeds)
        assert {k: results[k] for k in ("experiment", "settings", "arms")} == {
            "experiment": claim.experiment_name,
            "settings": claim.identity()["variants"],
            "arms": claim.identity()["arms"],
        }


def test_claims_that_share_a_run_have_its_settings() -> None:
    for quick in (False, True):
        claims = [load_claim(path, quick=quick) for path in CLAIMS]
        for first in claims:
            for second in claims:
                if first.run == second.run:
                    assert first.identity() == second.identity(), (first.name, second.name)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_verdicts_follow_from_the_committed_numbers(path: Path) -> None:
    assert results_path(load_claim(ROOT / f"{path.stem}.yaml")) == path
    results = json.loads(path.read_text(encoding="utf-8"))
    for row in results["statements"]:
        assert verdict_again(row) == row["verdict"]
        if row.get("measure") != "ratio" and None not in row["per_seed"]:
            logarithms = row.get("measure") == "seed_ratio"
            interval = t_interval(np.log(row["per_seed"]) if logarithms else row["per_seed"])
            if logarithms:
                interval = Interval(interval.value, math.exp(interval.low), math.exp(interval.high), "log t")
            assert row["over_seeds"] == pytest.approx([interval.low, interval.high], abs=2e-5)
            assert row["low"] <= row["over_seeds"][0] + 1e-6
    assert overall([row["verdict"] for row in results["statements"]]) == results["verdict"]


def verdict_again(row: dict[str, Any]) -> str:
    low, high = (math.nan if row[name] is None else row[name] for name in ("low", "high"))
    bound = {"at_most" if row["below"] else "at_least": row["bound"]}
    return Statement("m", arm="any", **bound).verdict(Interval(0.0, low, high, "t"))


@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_is_used_and_declares_what_it_returns(name: str) -> None:
    experiment = get_experiment(name)
    assert experiment.metric_names(experiment.settings())
    assert any(load_claim(path).experiment_name == name for path in CLAIMS)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "list"]) == 0
    text = capsys.readouterr().out
    assert all(path.stem in text for path in CLAIMS)


def test_index_lists_every_claim() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in CLAIMS if f"`{path.name}`" not in text]
