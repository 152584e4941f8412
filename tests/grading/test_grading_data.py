"""Reference answers of GSM8K (test) and MATH-500 against themselves, other spellings and incorrect ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.config import benchmark_data
from stepkd.data.load import load_rows
from stepkd.data.rows import PROBLEM
from stepkd.data.sources import BENCHMARKS
from stepkd.grading.extract import extract_answer
from stepkd.grading.pool import Grade, Grader, GradingConfig, Verdict
from stepkd.grading.reading import Items, Relation, Words, read
from stepkd.grading.verify import same


def verdict_counts(grades: list[Grade]) -> Counter[Verdict]:
    return Counter(grade.verdict for grade in grades)


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def golds(data_dir: Path) -> list[str]:
    rows = _rows(data_dir / "gsm8k" / "test.jsonl")
    assert len(rows) == 1319
    return [row["answer"].rpartition("####")[2].strip() for row in rows]


@pytest.fixture(scope="module")
def math_rows(data_dir: Path) -> list[dict[str, str]]:
    rows = _rows(data_dir / "math500" / "test.jsonl")
    assert len(rows) == 500
    return rows


def _with_commas(gold: str) -> str:
    return f"{int(gold.replace(',', '')):,}"


RIGHT = {
    "itself": lambda g: g,
    "hash": lambda g: f"Some text.\n#### {g}",
    "hash, then a next question": lambda g: f"#### {g}\n\nQuestion: 3 + 4?\n#### 7123456",
    "currency": lambda g: f"It costs ${_with_commas(g)}.00.".replace("$-", "-$"),
    "units": lambda g: f"#### {g.replace(',', '')} apples",
    "boxed": lambda g: f"So $\\boxed{{{g}}}$.",
    "boxed with text": lambda g: f"$$\\boxed{{{g}\\text{{ apples}}}}$$",
    "bare box": lambda g: f"\\boxed {g}.",
    "equation": lambda g: f"\\boxed{{x = {g}}}",
    "decimal": lambda g: f"The answer is {g.replace(',', '')}.0",
    "percent": lambda g: f"#### {g}%",
    "LaTeX thousands": lambda g: f"\\boxed{{{_with_commas(g).replace(',', '{,}')}}}",
}

INCORRECT = {
    "one more": lambda g: f"#### {int(g.replace(',', '')) + 1}",
    "sign flipped": lambda g: f"The answer is {-int(g.replace(',', '')) or 1}.",
    "ten times": lambda g: f"\\boxed{{{int(g.replace(',', '')) * 10 or 1}}}",
    "a little more": lambda g: f"#### {g}.01",
}


@pytest.mark.parametrize("form", RIGHT)
def test_gsm8k_answers_in_every_spelling_are_correct(form: str, golds: list[str]) -> None:
    with Grader() as grader:
        grades = grader.grade([RIGHT[form](gold) for gold in golds], golds)
        assert not grader._pool, "plain numbers need no worker"
    assert [grade for grade in grades if grade.verdict is not Verdict.CORRECT] == []


@pytest.mark.parametrize("form", INCORRECT)
def test_gsm8k_incorrect_answers_are_incorrect(form: str, golds: list[str]) -> None:
    with Grader() as grader:
        grades = grader.grade([INCORRECT[form](gold) for gold in golds], golds)
    assert verdict_counts(grades) == {"incorrect": 1319}


def test_math500_solutions_yield_their_answers(math_rows: list[dict[str, str]]) -> None:
    """Word for word but for one, which boxes its answer in two spellings joined by "or"."""
    others = [r for r in math_rows if extract_answer(r["solution"], ("boxed",)) != r["answer"]]
    assert len(others) <= 1
    with Grader(GradingConfig(extractors=("boxed",), deadline_s=20)) as grader:
        assert (
            verdict_counts(grader.grade([r["solution"] for r in others], [r["answer"] for r in others]))["incorrect"]
            == 0
        )


def test_math500_answers_in_other_spellings(math_rows: list[dict[str, str]]) -> None:
    answers = [row["answer"] for row in math_rows]
    completions = [f"\\boxed{{ {a.replace('frac', 'dfrac').replace('ddfrac', 'dfrac')} }}" for a in answers]
    with Grader(GradingConfig(extractors=("boxed",), deadline_s=20)) as grader:
        assert verdict_counts(grader.grade(completions, answers))["correct"] == 500
        # Another problem's answer is incorrect (pairs seven apart share no value in this set; every third keeps it
        # short).
        pairs = [(a, b) for a, b in zip(answers, answers[7:] + answers[:7], strict=True) if a != b][::3]
        counts = verdict_counts(grader.grade([f"\\boxed{{{a}}}" for a, _ in pairs], [b for _, b in pairs]))
    assert counts == {"incorrect": len(pairs)}


def test_math500_answers_are_read_as_mathematics(math_rows: list[dict[str, str]]) -> None:
    """Without the quick path, so that a change of the LaTeX grammar shows."""
    words = [row["answer"] for row in math_rows if isinstance(read(row["answer"]), Words)]
    assert all(answer.startswith("\\text{") for answer in words)
    assert all(same(read(row["answer"]), read(row["answer"])) for row in math_rows)


# --- the other benchmarks, whole --------------------------------------------------------------------------------------

FILES = {
    "gsm_plus": "gsm_plus/testmini.jsonl",
    "svamp": "svamp/svamp.jsonl",
    "multiarith": "multiarith/multiarith.jsonl",
    "minerva_math": "contests/minerva_math.jsonl",
    "olympiad_bench": "contests/olympiadbench.jsonl",
    **{name: f"contests/{name}.jsonl" for name in ("amc23", "aime24", "aime25")},
}
NO_MATHEMATICS = {
    "minerva_math": {"245", "250", "251"},  # MR=SRMC and its like: names of curves, compared as text
    "olympiad_bench": {"1965", "2045"},  # a sentence about f; "t(0,4]", a slip for an interval
}
"""Reference answers of which only the same text is found equal."""


def _problems(name: str, data_dir: Path) -> list[dict[str, Any]]:
    return load_rows(benchmark_data(BENCHMARKS[name], str(data_dir / FILES[name]), None), contract=PROBLEM)


@pytest.mark.parametrize("name", FILES)
def test_every_reference_answer_and_solution_is_correct(name: str, data_dir: Path) -> None:
    """OlympiadBench's solutions are proofs that mark no answer."""
    rows = _problems(name, data_dir)
    texts = [(f"So $\\boxed{{{row['answer']}}}$.", row["answer"]) for row in rows]
    if name != "olympiad_bench":
        texts += [(row["solution"], row["answer"]) for row in rows if "solution" in row]
    with Grader(GradingConfig(deadline_s=20), extractors=BENCHMARKS[name].extractors) as grader:
        assert verdict_counts(grader.grade(*zip(*texts, strict=True))) == {"correct": len(texts)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minerva_math", "olympiad_bench"])
def test_reference_answers_are_read_as_mathematics(name: str, data_dir: Path) -> None:
    """Without the quick path; all but those named above equal themselves by value."""

    def is_text(value: Any) -> bool:
        if isinstance(value, Relation):
            return None in value.sides and is_text(value.value)
        return isinstance(value, Words) or (isinstance(value, Items) and any(map(is_text, value.items)))

    answers = {row["id"].rpartition("/")[2]: row["answer"] for row in _problems(name, data_dir)}
    unread = {key for key, text in answers.items() if is_text(read(text)) or not same(read(text), read(text))}
    assert unread == NO_MATHEMATICS[name]
