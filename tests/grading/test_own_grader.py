"""A grader of the user's own, by dotted name: in the killable workers, with their limits, recorded by its file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from stepkd.errors import ConfigError, StepkdError
from stepkd.grading.judge import vote_keys
from stepkd.grading.pool import Grader, GradingConfig, Verdict, own_grader

CODE = """
limit = 3

def judge(text, reference, row):
    if text == "for ever":
        while True:
            pass
    if text == "too much":
        return len(bytearray(1 << 40)) > 0
    if text == "fault":
        raise ValueError("no such answer")
    if text == "half":
        return 0.5
    if not text:
        return None
    return not row.get("cut_off") and text == reference * row.get("times", 1)

def two(text, reference):
    return True
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A module ``graders_of_mine`` that can be imported."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "graders_of_mine.py").write_text(CODE)
    sys.path.append(str(folder))
    yield folder / "graders_of_mine.py"
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def grader(file: Path) -> Iterator[Grader]:
    with Grader(GradingConfig(grader="graders_of_mine.judge", deadline_s=1.0, workers=1)) as grader:
        yield grader


def test_it_sees_text_reference_and_row_and_its_verdict_counts(grader: Grader) -> None:
    texts = ["ab", "abab", "ab", "ab", "", None, "\\boxed{ab}"]
    rows = [{}, {"times": 2}, {"times": 2}, {}, {}, {}, {}]
    cut = [False, False, False, True, False, False, False]
    grades = grader.grade(texts, ["ab"] * 7, cut_off=cut, rows=rows)
    assert [str(grade.verdict) for grade in grades] == [
        *("correct", "correct", "incorrect", "incorrect", "unparsed", "unparsed", "incorrect")
    ]
    assert grades[-1].extracted == "ab", "votes need an answer"
    assert grader.grade_one("ab", "ab").verdict is Verdict.CORRECT, "without a row"


def test_votes_still_compare_answers(grader: Grader) -> None:
    assert vote_keys([["\\frac{1}{2}", "\\frac{2}{4}", "3"]], grader) == [["\\frac{1}{2}", "\\frac{1}{2}", "3"]]


def test_its_limits_are_those_of_any_item(grader: Grader) -> None:
    grades = grader.grade(["a", "for ever", "too much", "a"], ["a"] * 4)
    assert [str(grade.verdict) for grade in grades] == ["correct", "timeout", "timeout", "correct"]


@pytest.mark.parametrize(("text", "told"), [("fault", "ValueError: no such answer"), ("half", "it returned 0.5")])
def test_a_fault_stops_and_is_told(grader: Grader, text: str, told: str) -> None:
    with pytest.raises(StepkdError, match=rf"graders_of_mine\.judge failed on problem 'p7', .*'{text}'.*{told}"):
        grader.grade(["a", text], ["a", "a"], rows=[{}, {"id": "p7"}])
    assert grader.grade_one("a", "a").verdict is Verdict.CORRECT


def test_settings_name_it_with_its_file(file: Path) -> None:
    config = GradingConfig(grader="graders_of_mine:judge")
    assert config.decides()["grader"] == {"name": "graders_of_mine:judge", "sha256": sha256(CODE.encode()).hexdigest()}
    assert "grader" not in GradingConfig().decides()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module.judge", "grading.grader: 'no_such_module.judge' cannot be imported: ModuleNotFoundError"),
        ("graders_of_mine.juge", "cannot be imported: AttributeError"),
        ("graders_of_mine.limit", r"must be a function of a Python file that takes \(text, reference, row\)"),
        ("graders_of_mine.two", r"takes \(text, reference, row\): too many positional"),
        ("operator.add", r"takes \(text, reference, row\)"),
    ],
)
def test_what_cannot_grade_is_refused_before_anything_runs(file: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Grader(GradingConfig(grader=name))


def test_it_is_refused_in_safe_mode(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPKD_SAFE", "1")
    with pytest.raises(ConfigError, match=r"grading\.grader names the code 'graders_of_mine\.judge', and --safe"):
        GradingConfig(grader="graders_of_mine.judge")
    own_grader.cache_clear()
    with pytest.raises(ConfigError, match="--safe allows"):
        own_grader("graders_of_mine:judge")


def test_a_worker_that_imports_much_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that imports torch: what it holds before its first item is no growth."""
    (tmp_path / "grader_that_holds_much.py").write_text(
        "import mmap\nheld = mmap.mmap(-1, 900 << 20)\n\n"
        "def judge(text, reference, row):\n    return text == reference\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Grader(GradingConfig(grader="grader_that_holds_much.judge", memory_mb=1500, workers=1)) as grader:
        assert grader.grade_one("a", "a").verdict is Verdict.CORRECT
        (worker,) = grader._pool
        assert grader.grade(["b", "c"], ["b", "d"])[0].verdict is Verdict.CORRECT
        assert grader._pool == [worker]
