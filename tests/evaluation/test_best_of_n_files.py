"""Best-of-N from files of scored rollouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.best_of_n_files import best_of_n_from_files


def row(problem: str, sample: int, right: bool, score: float | None, answer: str = "4") -> dict[str, Any]:
    completion = f"2+2={answer}\n#### {answer}" if right else "2+2=5\n#### 5"
    return {
        "problem_id": problem, "sample": sample, "completion": completion, "answer": answer, "correct": right,
        "score": score,
    }  # fmt: skip


ROWS = [row("p", 0, True, 0.9), row("p", 1, False, 0.2), row("q", 0, False, 0.8), row("q", 1, True, 0.1)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def test_curves_by_hand(tmp_path: Path) -> None:
    good = [dict(each, score=float(each["correct"])) for each in ROWS]
    files = {"prm": write(tmp_path / "a.jsonl", ROWS), "oracle": write(tmp_path / "b.jsonl", good[::-1])}
    result = best_of_n_from_files(files)
    assert result.ks == (1, 2)
    assert result.problems == 2
    assert [each.value for each in result.curves["pass"]] == [0.5, 1.0]
    assert [each.value for each in result.curves["prm"]] == [0.5, 0.5]  # right on p, wrong on q
    assert [each.value for each in result.curves["oracle"]] == [0.5, 1.0]
    assert [each.value for each in result.curves["majority"]] == pytest.approx([0.5, 0.5])


def test_spellings_of_a_wrong_answer_are_not_outvoted_by_fewer_right_ones(tmp_path: Path) -> None:
    """Two spellings of a correct answer against three of a wrong one: the wrong one has the majority."""
    texts = [(r"\frac{1}{2}", True), ("0.5", True), (r"\frac{1}{3}", False), ("2/6", False), (r"\frac{2}{6}", False)]
    rows = [
        {**row("p", i, right, 0.5), "completion": f"#### {text}", "answer": "1/2"}
        for i, (text, right) in enumerate(texts)
    ]
    result = best_of_n_from_files({"prm": write(tmp_path / "a.jsonl", rows)}, ks=[5])
    assert result.curves["majority"][0].value == 0.0
    assert result.curves["pass"][0].value == 1.0


def test_what_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ConfigError, match="at least one file"):
        best_of_n_from_files({})
    with pytest.raises(ConfigError, match="cannot be called 'majority'"):
        best_of_n_from_files({"majority": path})
    with pytest.raises(ConfigError, match=r"scored different rollouts \(1 are in one only\)"):
        best_of_n_from_files({"a": path, "b": write(tmp_path / "b.jsonl", ROWS[:-1])})
    with pytest.raises(DataError, match=r"line 2.*'score'.*stepkd score"):
        best_of_n_from_files({"a": write(tmp_path / "c.jsonl", [ROWS[0], {"problem_id": "p", "correct": True}])})
    other = [dict(ROWS[0], completion="1+3=4\n#### 4"), *ROWS[1:]]
    with pytest.raises(ConfigError, match=r"different solutions under one id \(sample 0 of problem 'p'\)"):
        best_of_n_from_files({"a": path, "b": write(tmp_path / "f.jsonl", other)})
    with pytest.raises(DataError, match="--keep-duplicates"):
        best_of_n_from_files({"a": write(tmp_path / "g.jsonl", [{**ROWS[0], "labelling": {"dedupe": True}}])})
    with pytest.raises(DataError, match="not graded"):
        best_of_n_from_files({"a": write(tmp_path / "d.jsonl", [{**ROWS[0], "correct": None}])})
    with pytest.raises(DataError, match=r"sample 0 of problem 'p' occurs twice"):
        best_of_n_from_files({"a": write(tmp_path / "e.jsonl", [ROWS[0], ROWS[0]])})
