"""The overlap report, against a brute-force count and on GSM8K."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepkd.data.config import DataConfig
from stepkd.data.datamodule import normalised_words, overlap_report
from stepkd.data.load import load_rows

words = st.lists(st.sampled_from("abcd"), max_size=9).map(" ".join)


def numbered(*texts: str) -> dict[str, str]:
    return {str(i): text for i, text in enumerate(texts)}


@given(st.lists(words, max_size=4), st.lists(words, max_size=4), st.integers(1, 4))
def test_equals_brute_force(train: list[str], test: list[str], n: int) -> None:
    def grams(text: str) -> set[tuple[str, ...]]:
        tokens = text.split()
        if len(tokens) < n:
            return {("whole", *tokens)} if tokens else set()
        return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}

    seen = set().union(*(grams(text) for text in train)) | {("whole", *text.split()) for text in train}
    report = overlap_report(iter(train), numbered(*test), n)
    expected = [len(grams(text) & seen) / len(grams(text)) if grams(text) else 0.0 for text in test]
    assert list(report.shares.values()) == expected
    assert report.train_count == len(train)
    assert report.exact == [str(i) for i, text in enumerate(test) if text.split() in [t.split() for t in train]]


def test_case_punctuation_and_spacing_do_not_count() -> None:
    found = normalised_words("Ann\u2019s  caf\u00e9,\nSTRASSE: \uff11\uff12!")
    assert found == ("ann", "s", "caf\u00e9", "strasse", "12")
    report = overlap_report(["The cat sat, on the mat."], {"x": "the CAT sat on  the mat", "y": "the cat"}, n=3)
    assert report.shares == {"x": 1.0, "y": 0.0}
    assert report.exact == ["x"]


def test_operators_count() -> None:
    assert normalised_words("3 - 4 + x=(-2) well-known") == ("3", "-", "4", "+", "x", "=", "-", "2", "well", "known")
    assert overlap_report(["3+4*2="], numbered("3-4*2=", "3+4*2=", "3 \u2212 4")).exact == ["1"]


def test_short_texts_are_compared_whole() -> None:
    report = overlap_report(["a b c d e f g h i", "x y"], numbered("a b c", "X, y"), n=8)
    assert report.shares == {"0": 0.0, "1": 1.0}
    assert report.exact == ["1"]


def test_share_counts_distinct_grams_over_several_training_texts() -> None:
    report = overlap_report(["a b c", "c d e"], numbered("a b c d e f"), n=2)
    assert report.shares == {"0": pytest.approx(4 / 5)}
    assert report.exact == []


def test_text_form() -> None:
    text = str(overlap_report(["a b", "c d"], {"p": "a b", "q": "c x", "r": "y z"}, n=1))
    assert text == (
        "of 3 test texts 1 are one of 2 training texts, 2 have at least half of their 1-word n-grams in training, and "
        "2 at least one; largely seen: p, q"
    )
    assert str(overlap_report(["a"], {})).startswith("of 0 test texts 0 are one of 1 training texts")


def test_gsm8k_train_and_test(data_dir: Path) -> None:
    train, test = (
        load_rows(DataConfig(source="gsm8k", path=str(data_dir / "gsm8k"), split=s)) for s in ("train", "test")
    )
    texts = {row["id"]: row["prompt"] for row in test}
    report = overlap_report((row["prompt"] for row in train), texts)
    assert (report.train_count, len(report.shares)) == (7473, 1319)
    assert report.exact == []
    assert 0 < sum(share >= 0.5 for share in report.shares.values()) < 0.02 * len(report.shares)
    itself = overlap_report(texts.values(), texts)
    assert len(itself.exact) == 1319
    assert set(itself.shares.values()) == {1.0}
