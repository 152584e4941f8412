"""The verdicts written by hand (tests/grading/pairs.py), and both ways round where they are equations of value."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from runpy import run_path

import pytest

from stepkd.data.sources import BENCHMARKS
from stepkd.grading.pool import Grader, GradingConfig, Verdict

_TABLES = run_path(str(Path(__file__).with_name("pairs.py")))
ANSWERS: dict[str, list[tuple[str, str, bool]]] = _TABLES["ANSWERS"]
TEXTS: dict[str, list[tuple[str, str, bool]]] = _TABLES["TEXTS"]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(GradingConfig(deadline_s=20)) as grader:
        yield grader


def _incorrect(
    grader: Grader, cases: list[tuple[str, str, bool]], *, box: bool = False, cut: bool = False
) -> list[object]:
    texts = [f"So it is \\boxed{{{text}}}." if box else text for _, text, _ in cases]
    grades = grader.grade(texts, [gold for gold, _, _ in cases], cut_off=[cut] * len(cases))
    return [
        (case, grade.verdict, grade.extracted)
        for case, grade in zip(cases, grades, strict=True)
        if (grade.verdict is Verdict.CORRECT) != case[2]
    ]


def test_there_are_enough_pairs_of_both_kinds() -> None:
    verdicts = [verdict for group in (*ANSWERS.values(), *TEXTS.values()) for _, _, verdict in group]
    assert len(verdicts) >= 470
    assert 0.35 < sum(verdicts) / len(verdicts) < 0.65


@pytest.mark.parametrize("group", ANSWERS)
def test_answers_get_the_verdict_written_beside_them(group: str, grader: Grader) -> None:
    assert _incorrect(grader, ANSWERS[group], box=True) == []


@pytest.mark.parametrize("group", TEXTS)
def test_texts_get_the_verdict_written_beside_them(group: str) -> None:
    extractors = BENCHMARKS["gsm8k" if group == "words" else "math500"].extractors
    with Grader(GradingConfig(deadline_s=20, extractors=extractors)) as grader:
        assert _incorrect(grader, TEXTS[group], cut=group == "cut") == []
