"""The overlap report, against a brute-force count and on GSM8K."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepkd.data.overlap import normalised_words, overlap_report
from stepkd.data.spec import DataConfig, load_rows
from stepkd.errors import ConfigError

words = st.lists(st.sampled_from("abcd"), max_size=9).map(" ".join)


@given(st.lists(words, max_size=4), st.lists(words, max_size=4), st.integers(1, 4))
def test_equals_brute_force(train: list[str], test: list[str], n: int) -> None:
    def grams(text: str) -> set[tuple[str, ...]]:
        tokens = text.split()
        if len(tokens) < n:
            return {("whole", *tokens)} if tokens else set()
        return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}

    seen = set().union(*(grams(text) for text in train)) | {("whole", *text.split()) for text in train}
    report = overlap_report(iter(train), iter(test), n)
    expected = [len(grams(text) & seen) / len(grams(text)) if grams(text) else 0.0 for text in test]
    assert list(report.shares) == expected
    assert report.train_count == len(train)
    assert report.exact_ids == tuple(
        str(i) for i, text in enumerate(test) if text.split() in [t.split() for t in train]
    )
    assert report.half_ids == tuple(str(i) for i, share in enumerate(expected) if share >= 0.5)


def test_case_punctuation_and_spacing_do_not_count() -> None:
    assert normalised_words("Ann\u2019s  caf\u00e9,\nSTRASSE: \uff11\uff12!") == [
        "ann",
        "s",
        "caf\u00e9",
        "strasse",
        "12",
    ]
    report = overlap_report(
        ["The cat sat, on the mat."], ["the CAT sat on  the mat", "the cat"], n=3, test_ids=["x", "y"]
    )
    assert report.shares == (1.0, 0.0)
    assert report.exact_ids == ("x",)


def test_operators_count() -> None:
    assert normalised_words("3 - 4 + x=(-2) well-known") == ["3", "-", "4", "+", "x", "=", "-", "2", "well", "known"]
    assert overlap_report(["3+4*2="], ["3-4*2=", "3+4*2=", "3 \u2212 4"]).exact_ids == ("1",)


def test_short_texts_are_compared_whole() -> None:
    report = overlap_report(["a b c d e f g h i", "x y"], ["a b c", "X, y"], n=8)
    assert report.shares == (0.0, 1.0)
    assert report.exact_ids == ("1",)


def test_share_counts_distinct_grams_over_several_training_texts() -> None:
    report = overlap_report(["a b c", "c d e"], ["a b c d e f"], n=2)
    assert report.shares == (pytest.approx(4 / 5),)
    assert report.exact_ids == ()


def test_text_form() -> None:
    text = str(overlap_report(["a b", "c d"], ["a b", "c x", "y z"], n=1, test_ids=["p", "q", "r"]))
    assert text == (
        "Overlap of 3 test texts with 2 training texts (1-word n-grams): 1 (33.33%) are exact duplicates, 2 (66.67%) "
        "have at least half of their n-grams in training, 2 (66.67%) share at least one; on average a test text "
        "shares 50.00% of its n-grams. Largely seen: p, q."
    )
    assert "Overlap of 0 test texts" in str(overlap_report(["a"], []))


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="n=0: an n-gram needs at least 1 word"):
        overlap_report([], [], n=0)
    with pytest.raises(ValueError, match="zip"):
        overlap_report([], ["a", "b"], test_ids=["x"])


def test_gsm8k_train_and_test(data_dir: Path) -> None:
    train, test = (
        load_rows(DataConfig(source="gsm8k", path=str(data_dir / "gsm8k"), split=s)) for s in ("train", "test")
    )
    report = overlap_report(
        (row["prompt"] for row in train), [row["prompt"] for row in test], test_ids=[row["id"] for row in test]
    )
    print(report)
    assert (report.train_count, len(report.shares)) == (7473, 1319)
    assert report.exact_ids == ()
    assert 0 < len(report.half_ids) < 0.02 * len(report.shares)
    itself = overlap_report([row["prompt"] for row in test], [row["prompt"] for row in test])
    assert len(itself.exact_ids) == 1319
    assert set(itself.shares) == {1.0}
