"""Claim files: what they resolve to, and every mistake in one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepkd.claims.claim_file import load_claim
from stepkd.claims.experiment import get_experiment
from stepkd.errors import DataError, StepkdError

Write = Callable[..., Path]


def test_a_claim(write_claim: Write) -> None:
    claim = load_claim(write_claim(settings={"base": "1e-1", "sizes": [1, 4]}))
    assert (claim.name, claim.seeds, claim.quick) == ("fake", (0, 1, 2, 3, 4), False)
    assert list(claim.variants) == ["main"]
    assert claim.variants["main"].base == 0.1  # YAML reads 1e-1 as text
    assert claim.variants["main"].sizes == (1, 4)
    assert claim.arms["better"].gain == 0.3  # the experiment's own
    assert claim.statements[0].paper == "0.8 against 0.5"


def test_quick_settings_come_last(write_claim: Write) -> None:
    path = write_claim(
        settings={"problems": 10, "base": 0.2},
        variants={"one": {"task": "one"}, "two": {"task": "two", "problems": 20}},
        quick={"seeds": [7], "settings": {"problems": 5}, "variants": ["two"]},
    )
    full, quick = load_claim(path), load_claim(path, quick=True)
    assert {name: settings.problems for name, settings in full.variants.items()} == {"one": 10, "two": 20}
    assert {name: settings.problems for name, settings in quick.variants.items()} == {"two": 5}
    assert (quick.variants["two"].task, quick.variants["two"].base) == ("two", 0.2)
    assert (quick.seeds, quick.quick) == ((7,), True)


def test_arms_of_the_file_replace_the_experiments(write_claim: Write) -> None:
    claim = load_claim(write_claim(arms={"plain": None, "better": {"gain": 0.1, "steps": 5}, "best": {"gain": 0.4}}))
    assert {name: (arm.gain, arm.steps) for name, arm in claim.arms.items()} == {
        "plain": (0.0, 100),
        "better": (0.1, 5),
        "best": (0.4, 100),
    }


def test_statements_belong_to_variants(write_claim: Write) -> None:
    two = {"metric": "right", "better": "better", "worse": "plain"}
    claim = load_claim(
        write_claim(variants={"one": {}, "two": {}}, statements=[two, {**two, "variants": ["two"], "at_least": 0.1}])
    )
    assert [len(claim.statements_of(variant)) for variant in ("one", "two")] == [1, 2]


def test_the_fingerprint_follows_what_decides(write_claim: Write) -> None:
    def fingerprint(**changes: Any) -> str:
        return load_claim(write_claim(**changes)).fingerprint()

    same = fingerprint()
    assert fingerprint(claim="Other words.", source="another paper") == same
    assert fingerprint(settings={"base": 0.5}) == same  # the default, written out
    others = {
        fingerprint(settings={"base": 0.6}),
        fingerprint(seeds=[0, 1]),
        fingerprint(arms={"plain": {}, "better": {"gain": 0.2}}),
        fingerprint(equal={"steps": None}),
        fingerprint(statements=[{"metric": "right", "better": "better", "worse": "plain", "at_least": 0.1}]),
    }
    assert len(others - {same}) == 5


TWO = {"metric": "right", "better": "better", "worse": "plain"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"claim": None}, "needs the key 'claim'"),
        ({"claim": "  "}, "claim: must be text"),
        ({"seed": [1]}, "no key 'seed'. Did you mean 'seeds'?"),
        ({"seeds": []}, "seeds: must be a list of different whole numbers"),
        ({"seeds": [1, 1]}, "seeds: must be a list of different whole numbers"),
        ({"seeds": [-1]}, "seeds: must be a list of different whole numbers"),
        ({"seeds": 5}, "seeds: must be a list of different whole numbers"),
        ({"settings": {"problem": 3}}, "settings: 'problem' is not a setting; did you mean 'problems'?"),
        ({"settings": {"problems": "many"}}, "settings: problems: expected int, got 'many'"),
        ({"settings": {"problems": 1.5}}, "settings: problems: expected int, got '1.5'"),
        ({"settings": {"problems": None}}, "settings: problems has no value"),
        ({"settings": {"problems": 0}}, "problems=0: must be at least 1"),
        ({"settings": [1]}, "settings: must be keys with values"),
        ({"quick": {"settings": {"problems": 0}}}, "problems=0: must be at least 1"),
        ({"quick": {"seed": [0]}}, "quick: no key 'seed'"),
        ({"quick": {"variants": ["three"]}}, "quick: no variant 'three'"),
        ({"experiment": "noisy_studnt"}, "Did you mean 'noisy_student'?"),
        ({"experiment": "no_such_module.X"}, "no module 'no_such_module'"),
        ({"experiment": "fake_claim_experiment.MISSING"}, "has no 'MISSING'"),
        ({"experiment": "fake_claim_experiment.NOT_ONE"}, "is a int, not a stepkd.claims.Experiment"),
        ({"experiment": "fake_claim_experiment.NEEDS_ARMS"}, "the claim must name them"),
        ({"arms": {"plain": {"gian": 1}, "better": {}}}, "arms: plain: 'gian' is not a setting; did you mean 'gain'?"),
        ({"arms": {"a/b": {}, "better": {}, "plain": {}}}, "'a/b' cannot be a name"),
        ({"variants": {"../up": {}}}, "'../up' cannot be a name"),
        ({"statements": []}, "at least one statement"),
        ({"statements": ["better"]}, "statement 1: must be keys with values"),
        (
            {"statements": [TWO, {**TWO, "at_lest": 1}]},
            "statement 2: 'at_lest' is not a setting; did you mean 'at_least'?",
        ),
        ({"statements": [TWO, {**TWO, "worse": "better"}]}, "statement 2: better and worse are the same arm"),
        (
            {"statements": [{**TWO, "direction": "highr"}]},
            "statement 1: direction: expected one of .*, got 'highr'; did you mean 'higher'?",
        ),
        (
            {"statements": [{**TWO, "measure": "quotient"}]},
            "statement 1: measure: expected one of .*'seed_ratio'], got 'quotient'",
        ),
        ({"statements": [{**TWO, "at_least": "much"}]}, "statement 1: at_least: expected float, got 'much'"),
        ({"statements": [{**TWO, "at_least": True}]}, "statement 1: at_least: expected float, got 'True'"),
        ({"statements": [{**TWO, "worse": "plian"}]}, "statement 1: no arm 'plian'. Did you mean 'plain'?"),
        ({"statements": [{**TWO, "metric": "rigth"}]}, "no metric 'rigth'. Did you mean 'right'?"),
        ({"statements": [{**TWO, "variants": ["x"]}]}, "statement 1: no variant 'x'"),
        ({"statements": [{"better": "better", "worse": "plain"}]}, "statement 1: .*metric"),
        ({"run": "../up"}, "run: '../up' cannot be a folder's name"),
        ({"equal": {"tokens": None}}, "equal: no fact 'tokens'. Known: steps"),
        ({"equal": {"steps": ["bettr"]}}, "equal: steps: no arm 'bettr'. Did you mean 'better'?"),
        ({"equal": {"steps": "all"}}, "equal: steps: must be a list of names"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str, write_claim: Write) -> None:
    path = write_claim(**changes)
    with pytest.raises(DataError, match=message) as caught:
        load_claim(path)
    assert str(path) in str(caught.value)


def test_fixed_arms_and_metrics_that_depend_on_settings(write_claim: Write) -> None:
    fixed: dict[str, Any] = {
        "experiment": "fake_claim_experiment.FIXED",
        "settings": {"sizes": [1, 4]},
        "statements": [{"metric": "best@4", "better": "a", "worse": "b"}],
        "quick": {"seeds": [0]},
    }
    assert load_claim(write_claim(**fixed)).arms == {"a": None, "b": None}
    with pytest.raises(DataError, match="have no settings of their own"):
        load_claim(write_claim(**fixed, arms={"a": {"gain": 1}, "b": {}}))
    with pytest.raises(DataError, match="no arm 'c'"):
        load_claim(write_claim(**fixed, arms={"a": {}, "b": {}, "c": {}}))
    with pytest.raises(DataError, match="no metric 'best@4'"):  # the quick version lacks what a statement names
        load_claim(write_claim(**{**fixed, "quick": {"settings": {"sizes": [1]}}}))


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("claim: a\nseeds: [1\nquick: {}\n")
    with pytest.raises(DataError, match="line 3: not valid YAML"):
        load_claim(path)
    path.write_bytes(b"claim: \xff\n")
    with pytest.raises(DataError, match="not UTF-8"):
        load_claim(path)
    path.write_text("- 1\n")
    with pytest.raises(DataError, match="the claim: must be keys with values"):
        load_claim(path)
    with pytest.raises(DataError, match="cannot read the claim"):
        load_claim(tmp_path / "absent.yaml")


def test_safe_mode_imports_no_experiment_of_a_stranger(
    write_claim: Write, experiment_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_claim()
    monkeypatch.setenv("STEPKD_SAFE", "1")
    monkeypatch.delitem(sys.modules, "fake_claim_experiment", raising=False)
    with pytest.raises(StepkdError, match="experiment names the code 'fake_claim_experiment', and --safe allows only"):
        load_claim(path)
    assert "fake_claim_experiment" not in sys.modules
    assert get_experiment("noisy_student")  # stepkd's own
