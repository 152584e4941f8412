"""All MATH-500 reference answers in twelve spellings, and every verdict that came with GSM8K's example solutions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from stepkd.grading.pool import Grader, GradingConfig, Verdict

_INTEGER = re.compile(r"-?[0-9]+")
_NUMBER = re.compile(r"-?[0-9.]+|-?\\d?frac *(?:\{[0-9]+\}|[0-9]) *(?:\{[0-9]+\}|[0-9])")
_SEVERAL = re.compile(r"=|\\in|\\pm|\\text|\\mbox|[0-9}] ?,(?!\\!)(?![0-9]{3})")


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _left_right(gold: str) -> str | None:
    if "left" in gold or "text" in gold or not re.search(r"[()\[\]]|\\[{}]", gold):
        return None
    return re.sub(r"(\\\{|[(\[])", r"\\left\1 ", re.sub(r"(\\\}|[)\]])", r"\\right\1", gold))


def _unspaced(gold: str) -> str | None:
    """Without the blanks that LaTeX does not need: a command keeps the one before a letter."""
    shorter = re.sub(r"(\\[A-Za-z]+) (?=[A-Za-z])|(?<!\\) ", lambda match: match[0] if match[1] else "", gold)
    return shorter if shorter != gold and "text" not in gold else None


SPELLINGS: dict[str, Callable[[str], str | None]] = {
    "box": lambda g: g,
    "hash": lambda g: g,
    "dfrac": lambda g: re.sub(r"\\d?frac", r"\\dfrac", g) if "frac" in g else None,
    "left right": _left_right,
    "thin space": lambda g: re.sub(r"(?<=.)([+=-]|,(?!\\)) ?", r"\1\\, ", g) if re.search(r".[+=,-]", g) else None,
    "boldsymbol": lambda g: f"\\boldsymbol{{{g}}}",
    "blanks removed": _unspaced,
    "Unicode minus": lambda g: g.replace("-", "\u2212") if "-" in g else None,
    "thousands separator": lambda g: f"{int(g):,}" if _INTEGER.fullmatch(g) else None,
    "trailing .0": lambda g: f"{g}.0" if _INTEGER.fullmatch(g) else None,
    "unit in text": lambda g: f"{g}\\text{{ units}}" if _NUMBER.fullmatch(g) else None,
    "x =": lambda g: None if _SEVERAL.search(g) else f"x = {g}",
}


@pytest.fixture(scope="module")
def golds(data_dir: Path) -> list[str]:
    golds = [row["answer"] for row in _rows(data_dir / "math500" / "test.jsonl")]
    assert len(golds) == 500
    return golds


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_math500_answer_in_each_spelling_is_correct(name: str, golds: list[str]) -> None:
    cases = [(spelled, gold) for gold in golds if (spelled := SPELLINGS[name](gold)) is not None]
    mark = "#### {}" if name == "hash" else "Thus \\boxed{{{}}}."
    with Grader(GradingConfig(deadline_s=20)) as grader:
        grades = grader.grade([mark.format(spelled) for spelled, _ in cases], [gold for _, gold in cases])
    refused = [case for case, grade in zip(cases, grades, strict=True) if grade.verdict is not Verdict.CORRECT]
    print(f"{name}: {len(cases) - len(refused)} of {len(cases)}")
    assert refused == []
    assert len(cases) > 15


def test_gsm8k_example_verdicts_are_the_authors(data_dir: Path) -> None:
    """5,276 solutions of four models; the mark ``A:`` is read as ``####``."""
    texts, golds, verdicts = [], [], []
    for row in _rows(data_dir / "gsm8k" / "example_model_solutions.jsonl"):
        for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            sample = row[model]
            texts.append(sample["solution"].replace("\nA:", "\n####"))  # type: ignore[index]
            golds.append(row["ground_truth"].rpartition("A:")[2].strip())
            verdicts.append(sample["is_correct"])  # type: ignore[index]
    assert len(texts) == 5276
    with Grader() as grader:
        grades = grader.grade(texts, golds)
    assert [
        (text[-80:], gold, grade)
        for text, gold, verdict, grade in zip(texts, golds, verdicts, grades, strict=True)
        if (grade.verdict is Verdict.CORRECT) != verdict
    ] == []
