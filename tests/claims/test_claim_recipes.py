"""The claims that come with stepkd: what they run can be run, and committed results belong to them."""

from __future__ import annotations

import json
import math
from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepkd.claims import jobs
from stepkd.claims.claim_file import Arm, Claim, Statement, load_claim, overall
from stepkd.claims.jobs import training_settings
from stepkd.claims.results import read_results, results_path
from stepkd.cli import main
from stepkd.evaluation.config import SearchJobConfig
from stepkd.settings import build_settings
from stepkd.statistics import Interval, t_interval
from stepkd.training.fit import check_fit

ROOT = Path(__file__).resolve().parents[2] / "recipes" / "claims"
CLAIMS = sorted(ROOT.glob("*.yaml"))
RESULTS = sorted((ROOT / "results").glob("*.json"))


@cache
def claim_of(path: Path, quick: bool = False) -> Claim:
    """Read once for all tests: it takes a sixth of a second."""
    return load_claim(path, quick=quick)


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_every_claim_can_be_read(path: Path) -> None:
    full, quick = claim_of(path), claim_of(path, quick=True)
    assert len(full.seeds) >= 5
    assert len(quick.seeds) < len(full.seeds)
    assert full.identity() != quick.identity(), "quick is as large as the claim"
    assert all(full.statements_of(variant) for variant in full.variants), "a variant without a statement"


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_committed_results_belong_to_the_claim(path: Path) -> None:
    """Run the claim again with --save, or add a key "stale" with the reason to its results file."""
    claim = claim_of(path)
    results = read_results(claim)
    if results is None:
        pytest.skip("no results yet")
    if not results.get("stale"):
        assert results["fingerprint"] == claim.fingerprint()
        assert results["seeds"] == claim.seeds
        assert results["settings"] == claim.identity()["variants"]
        assert results["arms"] == claim.identity()["arms"]


def test_claims_of_one_run_share_jobs() -> None:
    """Each has a teacher, say, that another one has, too: else the run's name is a mistake."""
    for quick in (False, True):
        found = {path.stem: claim_of(path, quick=quick) for path in CLAIMS}
        jobs_of = {name: {json.dumps(job) for job in claim.wanted()} for name, claim in found.items() if claim.run}
        for name, own in jobs_of.items():
            others = [each for other, each in jobs_of.items() if other != name and found[other].run == found[name].run]
            assert any(own & each for each in others), name


def test_claims_on_chains_train_their_teacher_alike() -> None:
    """base/chains and the claims that cannot be based on it, too: else a seed's models are trained twice."""
    short, teachers = set[str](), dict[str, set[str]]()
    for claim in (claim_of(path) for path in CLAIMS if claim_of(path).run == "chains"):
        jobs_of: dict[str, dict[str, Any]] = {}
        asked = Arm(claim, "main", next(iter(claim.arms)), claim.seeds[0], partial(_noted, jobs_of))
        for metric in claim.metrics:
            asked.source(metric)
        short.add(json.dumps(jobs_of["short"]))
        teachers.setdefault(str(claim.variants["main"]["clean_task"]), set()).add(json.dumps(jobs_of["teacher"]))
    assert len(short) == 1
    assert {task: len(each) for task, each in teachers.items()} == {
        "modular:terms=2-8,modulus=10,operators=+-": 1,
        "modular:terms=2-16,modulus=10,operators=+-": 1,  # binary_search_labels
    }


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_the_two_arms_of_a_statement_have_different_numbers(path: Path) -> None:
    """Another job, or another column of it: else the difference is 0 on every seed. All metrics come from jobs."""
    claim = claim_of(path)
    for variant in claim.variants:
        source = {arm: Arm(claim, variant, arm, 0, lambda *job: json.dumps(job)).source for arm in claim.arms}
        found = [source[arm](metric) for arm in claim.arms for metric in claim.metrics]
        assert all(str(each[0]).startswith('["') for each in found if each is not None), "a setting hides a job"
        for statement in claim.statements_of(variant):
            sources = [source[arm](statement.metric) for arm in statement.arms]
            assert None not in sources, str(statement)
            assert len(set(sources)) == len(statement.arms), str(statement)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_verdicts_follow_from_the_committed_numbers(path: Path) -> None:
    assert results_path(claim_of(ROOT / f"{path.stem}.yaml")) == path
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
    direction = "lower" if row["below"] else "higher"
    return Statement("m", arm="any", direction=direction, bound=row["bound"]).verdict(Interval(0.0, low, high, "t"))


@cache
def taken(kind: str, settings: str) -> bool:
    """Claims that share a run share its jobs; an error if a command does not take one."""
    if kind == "fit":
        return bool(check_fit(*training_settings(**json.loads(settings))))
    return jobs.job_config(kind, json.loads(settings), Path("out")) is not None


@pytest.mark.slow
@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_commands_take_the_settings_of_every_job(path: Path) -> None:
    """In both versions; a fitted threshold must be there before steps can be cut by it."""
    checked = 0
    for quick in (False, True):
        for kind, settings in claim_of(path, quick=quick).wanted():
            if "config" not in signature(jobs.KINDS[kind]).parameters:
                jobs.check_arguments(kind, settings)
            elif "threshold.json" not in str(settings):
                assert taken(kind, json.dumps(settings))
                checked += 1
    assert checked


@pytest.mark.slow
@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_stepkd_fit_takes_the_training_of_every_arm(path: Path) -> None:
    """A teacher's cache must be there before a training can read it."""
    for quick in (False, True):
        for kind, settings in claim_of(path, quick=quick).wanted():
            if kind == "fit" and "Cached" not in str(settings):
                assert taken(kind, json.dumps(settings))


SEARCHES = [path for path in CLAIMS if any(kind == "search" for kind, _ in claim_of(path).wanted())]


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_arms_name_methods_of_the_search(path: Path) -> None:
    """By their names in rows and tables, which hold their settings."""
    for claim in (claim_of(path), claim_of(path, quick=True)):
        for arm in claim.arms:
            jobs_of: dict[str, dict[str, Any]] = {}
            do = partial(_noted, jobs_of)
            source = Arm(claim, next(iter(claim.variants)), arm, claim.seeds[-1], do).source("accuracy")
            assert source is not None
            assert source[1] in names_of(json.dumps(jobs_of["searched"] | {"out": "x"})), arm


@cache
def names_of(settings: str) -> list[str]:
    """Claims that share a run share its methods."""
    return [method.name for method in build_settings(SearchJobConfig, json.loads(settings), "search").all_methods]


def _noted(jobs_of: dict[str, dict[str, Any]], name: str, kind: str, settings: Any) -> str:
    jobs_of[name] = dict(settings)
    return f"folders/{name}"


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "list"]) == 0
    text = capsys.readouterr().out
    assert all(path.stem in text for path in CLAIMS)


def test_the_example_of_the_readme_can_be_read(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    path = tmp_path / "example.yaml"
    path.write_text(text.partition("```yaml\n")[2].partition("```")[0])
    assert list(claim_of(path).arms) == ["clean", "noisy"]
    assert claim_of(path, quick=True).variants["main"]["steps"] == 20


def test_index_lists_every_claim() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in CLAIMS if f"`{path.name}`" not in text]
