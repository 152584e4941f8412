"""Claim files: what they resolve to, and every mistake in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepkd.claims.claim_file import load_claim
from stepkd.errors import DataError

Write = Callable[..., Path]


def test_a_claim(write_claim: Write) -> None:
    claim = load_claim(write_claim(settings={"base": 0.1}))
    assert (claim.name, claim.seeds, claim.is_quick) == ("fake", [0, 1, 2, 3, 4], False)
    assert list(claim.variants) == ["main"]
    assert (claim.variants["main"]["base"], claim.variants["main"]["problems"]) == (0.1, 30)
    assert claim.arms == {"plain": {}, "better": {"gain": 0.3}}
    assert claim.statements[0].paper == "0.8 against 0.5"


def test_quick_settings_come_last(write_claim: Write) -> None:
    path = write_claim(
        settings={"problems": 10, "base": 0.2},
        variants={"one": {"task": "one"}, "two": {"task": "two", "problems": 20}},
        quick={"seeds": [7], "settings": {"problems": 5}, "variants": ["two"]},
    )
    full, quick = load_claim(path), load_claim(path, quick=True)
    assert {name: settings["problems"] for name, settings in full.variants.items()} == {"one": 10, "two": 20}
    assert {name: settings["problems"] for name, settings in quick.variants.items()} == {"two": 5}
    assert (quick.variants["two"]["task"], quick.variants["two"]["base"]) == ("two", 0.2)
    assert (quick.seeds, quick.is_quick) == ([7], True)


def test_statements_belong_to_variants(write_claim: Write) -> None:
    two = {"metric": "correct", "better": "better", "worse": "plain"}
    claim = load_claim(
        write_claim(variants={"one": {}, "two": {}}, statements=[two, {**two, "variants": ["two"], "bound": 0.1}])
    )
    assert [len(claim.statements_of(variant)) for variant in ("one", "two")] == [1, 2]


def test_the_fingerprint_follows_what_decides(write_claim: Write) -> None:
    def fingerprint(**changes: Any) -> str:
        return load_claim(write_claim(**changes)).fingerprint()

    same = fingerprint()
    assert fingerprint(claim="Other words.", source="another paper") == same
    others = {
        fingerprint(settings={"base": 0.6}),
        fingerprint(seeds=[0, 1]),
        fingerprint(arms={"plain": {}, "better": {"gain": 0.2}}),
        fingerprint(equal={"steps": None}),
        fingerprint(metrics={"correct": "drawn"}),
        fingerprint(jobs={"drawn": {"call": {"function": "fake_claim_code.give", "columns": {"correct": 1}}}}),
        fingerprint(statements=[{"metric": "correct", "better": "better", "worse": "plain", "bound": 0.1}]),
    }
    assert len(others - {same}) == 7


def test_a_claim_takes_what_it_lacks_from_its_base(write_claim: Write, tmp_path: Path) -> None:
    base = load_claim(write_claim().rename(tmp_path / "first.yaml"))
    own = {
        "claim": "Another one.",
        "source": "elsewhere",
        "base": "first",
        "settings": {"problems": 3},
        "jobs": {"drawn": {"call": {"task": "two"}}},
        "metrics": {"share": None, "rate": "drawn.share"},
        "statements": [{"metric": "rate", "arm": "plain", "direction": "lower", "bound": 0.5}],
    }
    path = tmp_path / "second.yaml"
    path.write_text(yaml.safe_dump(own))
    claim = load_claim(path)
    assert (claim.seeds, claim.arms, claim.folder) == (base.seeds, base.arms, "second")
    assert claim.variants["main"] == {**base.variants["main"], "problems": 3}
    assert claim.jobs["drawn"]["call"] == {**base.jobs["drawn"]["call"], "task": "two"}
    assert claim.metrics == {"correct": "drawn", "steps": "drawn.steps", "rate": "drawn.share"}
    path.write_text(yaml.safe_dump(own | {"base": "third"}))
    with pytest.raises(DataError, match="base: no claim 'third'"):
        load_claim(path)


def test_keys_without_a_value_change_nothing(write_claim: Write) -> None:
    claim = load_claim(write_claim())
    empty = {"arms": {"plain": None, "better": {"gain": 0.3}}, "equal": None}
    for variants in (None, {}, {"main": None}):
        given = load_claim(write_claim(**empty, variants=variants))
        assert (given.arms, given.variants, given.equal) == (claim.arms, claim.variants, {})
    plain = {"settings": None, "jobs": {"drawn": {"call": None}}, "quick": {"settings": None}}
    assert load_claim(write_claim(**plain, arms={"plain": None, "better": None})).settings == {}


TWO = {"metric": "correct", "better": "better", "worse": "plain"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"claim": None}, "needs the key 'claim'"),
        ({"claim": "  "}, "claim: String should have at least 1 character, got"),
        ({"seed": [1]}, "no key 'seed'. Did you mean 'seeds'?"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        ({"seeds": [1, 1]}, r"seeds: must differ, got \[1, 1\]"),
        ({"seeds": [-1]}, "seeds: 0: Input should be greater than or equal to 0, got -1"),
        ({"seeds": [True]}, "seeds: 0: Input should be a valid integer, got True"),
        ({"seeds": 5}, "seeds: Input should be a valid list, got 5"),
        ({"settings": [1]}, "settings: Input should be a valid dictionary"),
        ({"settings": {"seed": 1}}, "settings: 'seed' is the name of a job, or of the seed or arm"),
        ({"settings": {"drawn": 1}}, "settings: 'drawn' is the name of a job"),
        ({"settings": {"base": "$bas"}}, "drawn -> base -> bas: no setting or job 'bas'. Did you mean 'base'?"),
        ({"settings": {"base": "$gain", "gain": "$base"}}, "refers to itself"),
        ({"quick": {"settings": {"problem": 3}}}, "quick: settings: the claim has no setting 'problem'. Did you mean"),
        ({"variants": {"a": {"problem": 3}}}, "variants: a: the claim has no setting 'problem'. Did you mean"),
        ({"quick": {"seed": [0]}}, "quick: no key 'seed'"),
        ({"quick": {"variants": []}}, "quick: variants: List should have at least 1 item"),
        ({"quick": {"variants": ["three"]}}, "quick: no variant 'three'"),
        ({"jobs": {"drawn": {"fitt": {}}}}, "jobs: drawn: no kind of job 'fitt'. Did you mean 'fit'?"),
        (
            {"jobs": {"drawn": {"fit": {}, "call": {}}}},
            "jobs: drawn: Dictionary should have at most 1 item",
        ),
        ({"jobs": {"drawn": {"call": {"x": ["$sed"]}}}}, "drawn -> sed: no setting or job 'sed'. Did you mean 'seed'?"),
        ({"jobs": {"drawn": {"call": {"x": "$drawn"}}}}, "drawn -> drawn refers to itself"),
        ({"metrics": {"correct": None}}, "metrics: correct: Input should be a valid string"),
        ({"metrics": {"correct": ".share"}}, "metrics: correct: String should match pattern .*, got '.share'"),
        ({"metrics": {"correct": "drwn"}}, "drwn: no setting or job 'drwn'. Did you mean 'drawn'?"),
        ({"arms": {}}, "arms: Dictionary should have at least 1 item"),
        (
            {"arms": {"plain": {"gian": 1}, "better": {}}},
            "arms: plain: the claim has no setting 'gian'. Did you mean",
        ),
        ({"arms": {"a/b": {}, "better": {}, "plain": {}}}, "arms: a/b: .* should match pattern"),
        ({"variants": {"../up": {}}}, "variants: ../up: .* should match pattern"),
        ({"statements": []}, "statements: .* should have at least 1 item"),
        ({"statements": ["better"]}, "statement 1: must be keys with values, got 'better'"),
        (
            {"statements": [TWO, {**TWO, "bond": 1}]},
            "statement 2: 'bond' is not a setting; did you mean 'bound'?",
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
        ({"statements": [{**TWO, "bound": "much"}]}, "statement 1: bound: expected float, got 'much'"),
        ({"statements": [{**TWO, "bound": True}]}, "statement 1: bound: expected float, got 'True'"),
        ({"statements": [{**TWO, "worse": "plian"}]}, "statement 1: no arm 'plian'. Did you mean 'plain'?"),
        ({"statements": [{**TWO, "metric": "corect"}]}, "no metric 'corect'. Did you mean 'correct'?"),
        ({"statements": [{**TWO, "variants": ["x"]}]}, "statement 1: no variant 'x'"),
        ({"statements": [{"better": "better", "worse": "plain"}]}, "statement 1: .*metric"),
        ({"run": "../up"}, "run: String should match pattern .*, got '../up'"),
        ({"equal": {"tokens": None}}, "equal: tokens: no metric 'tokens'. Known: correct, share, steps"),
        ({"equal": {"steps": ["bettr"]}}, "equal: steps: no arm 'bettr'. Did you mean 'better'?"),
        ({"equal": {"steps": "all"}}, "equal: steps: Input should be a valid list, got 'all'"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str, write_claim: Write) -> None:
    path = write_claim(**changes)
    with pytest.raises(DataError, match=message) as caught:
        load_claim(path)
    assert str(path) in str(caught.value)


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
