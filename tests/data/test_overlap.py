"""The overlap report, against a brute-force count and on GSM8K."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepkd.data.config import DataConfig
from stepkd.data.datamodule import overlap_report
from stepkd.data.load import load_rows
from stepkd.errors import ConfigError

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

    seen = set().union(*(grams(text) for text in train))
    expected = [len(grams(text) & seen) / len(grams(text)) if grams(text) else 0.0 for text in test]
    assert list(overlap_report(iter(train), numbered(*test), n).values()) == expected


def test_bad_n() -> None:
    with pytest.raises(ConfigError, match="n=0: must be at least 1"):
        overlap_report(["a"], {"x": "b"}, n=0)


def test_case_punctuation_and_spacing_do_not_count() -> None:
    train = ["The cat sat, on the mat.", "Ann\u2019s  caf\u00e9,\nSTRASSE: \uff11\uff12!"]
    test = numbered("the CAT sat on  the mat", "the cat", "ann s caf\u00e9 strasse 12")
    assert list(overlap_report(train, test, n=3).values()) == [1.0, 0.0, 1.0]


def test_operators_count() -> None:
    test = numbered("3-4*2=", "3+4*2=", "3 \u2212 4", "3 - 4", "x=(-2) well-known", "x=-2 well known")
    assert list(overlap_report(["3+4*2="], test, n=6).values()) == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert list(overlap_report(["3-4", "x=(-2) well-known"], test, n=6).values()) == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]


def test_short_texts_are_compared_whole() -> None:
    report = overlap_report(["a b c d e f g h i", "x y"], numbered("a b c", "X, y"), n=8)
    assert report == {"0": 0.0, "1": 1.0}


def test_share_counts_distinct_grams_over_several_training_texts() -> None:
    report = overlap_report(["a b c", "c d e"], numbered("a b c d e f"), n=2)
    assert report == {"0": pytest.approx(4 / 5)}


def test_gsm8k_train_and_test(data_dir: Path) -> None:
    train, test = (
        load_rows(DataConfig(source="gsm8k", path=str(data_dir / "gsm8k"), split=s)) for s in ("train", "test")
    )
    texts = {row["id"]: row["prompt"] for row in test}
    report = overlap_report((row["prompt"] for row in train), texts)
    assert len(report) == 1319
    assert 1.0 not in report.values()
    assert 0 < sum(share >= 0.5 for share in report.values()) < 0.02 * len(report)
    assert set(overlap_report(texts.values(), texts).values()) == {1.0}
