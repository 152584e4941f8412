"""First-error sets: ProcessBench, BIG-Bench Mistake, MR-GSM8K, PRMBench; counts as published, never training data."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.config import DataConfig, check_training_use
from stepkd.data.load import load_rows
from stepkd.data.rows import check_unique_ids
from stepkd.errors import ConfigError, DataError

ROW = {
    "id": "math-7",
    "generator": "G",
    "problem": "p",
    "steps": ["a", "b", "c"],
    "final_answer_correct": False,
    "label": 1,
}


def load(tmp_path: Path, *rows: dict[str, Any], source: str = "processbench", name: str = "math.jsonl") -> list[Any]:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_rows(DataConfig(source=source, path=str(path)))


@pytest.mark.parametrize(
    ("first", "labels"),
    [
        (-1, [True, True, True]),
        (0, [False, None, None]),
        (1, [True, False, None]),
        (2, [True, True, False]),
    ],
)
def test_labels_from_the_first_error(tmp_path: Path, first: int, labels: list[bool | None]) -> None:
    [row] = load(tmp_path, ROW | {"label": first})
    assert row == {
        "prompt": "p",
        "completions": ["a", "b", "c"],
        "labels": labels,
        "first_error": first,
        "outcome": False,
        "id": "math-7",
        "generator": "G",
        "subset": "math",
    }


def test_subset_from_id_file_or_not_at_all(tmp_path: Path) -> None:
    bare = {name: ROW[name] for name in ("problem", "steps", "label")}
    [row] = load(tmp_path, bare, name="omnimath.jsonl")
    assert (row["subset"], row["id"]) == ("omnimath", "processbench/omnimath/0")
    [row] = load(tmp_path, bare, name="mine.jsonl")
    assert "subset" not in row
    assert "outcome" not in row


@pytest.mark.parametrize(
    ("subset", "correct", "incorrect"),
    [("gsm8k", 193, 207), ("math", 406, 594), ("olympiadbench", 339, 661), ("omnimath", 241, 759)],
)
def test_real_counts(data_dir: Path, subset: str, correct: int, incorrect: int) -> None:
    """As the paper counts them; the folder's split is the file of that name."""
    folder = data_dir / "processbench"
    if not folder.is_dir():
        pytest.skip("no processbench in the data folder")
    rows = load_rows(DataConfig(source="processbench", path=str(folder), split=subset))
    check_unique_ids(rows)
    assert Counter(row["first_error"] >= 0 for row in rows) == {False: correct, True: incorrect}
    assert {row["subset"] for row in rows} == {subset}
    assert sum(row["labels"].count(False) for row in rows) == incorrect
    for row in rows:
        first = row["labels"].index(False) if False in row["labels"] else -1
        assert first == row["first_error"]


def test_real_mistake_sets(data_dir: Path) -> None:
    for source, rows_wanted, none in (("bigbench_mistake", 300, 62), ("mr_gsm8k", 590, 0)):
        folder = data_dir / source
        if not folder.is_dir():
            pytest.skip(f"no {source} in the data folder")
        rows = load_rows(DataConfig(source=source, path=str(folder)))
        check_unique_ids(rows)
        assert (len(rows), sum(row["first_error"] < 0 for row in rows)) == (rows_wanted, none)
        assert all(isinstance(row["answer"], str) and isinstance(row["outcome"], bool) for row in rows)


def test_bigbench_layouts(tmp_path: Path) -> None:
    ours = {"id": "x-0", "problem": "p", "steps": ["a", "b"], "label": 1, "answer": "4", "target": "5"}
    [row] = load(tmp_path, ours | {"final_answer_correct": False}, source="bigbench_mistake")
    assert row == {
        "prompt": "p",
        "completions": ["a", "b"],
        "labels": [True, False],
        "first_error": 1,
        "outcome": False,
        "id": "x-0",
        "answer": "5",
        "final_answer": "4",
    }
    original = {"input": "p", "steps": ["a", "b"], "answer": 5, "target": "5", "mistake_index": None}
    [row] = load(tmp_path, original, source="bigbench_mistake")
    assert (row["labels"], row["first_error"], row["final_answer"]) == ([True, True], -1, "5")


def test_mr_gsm8k_layout(tmp_path: Path) -> None:
    raw = ROW | {"id": "u", "gold_answer": 5, "gold_solution": "s", "question_type": "POT", "error_reason": None}
    [row] = load(tmp_path, raw, source="mr_gsm8k")
    assert (row["answer"], row["question_type"], row["labels"]) == ("5", "POT", [True, False, None])
    assert "error_reason" not in row


PRMBENCH = {
    "modified_question": "p",
    "question": "q",
    "modified_process": ["a", "b", "c"],
    "error_steps": [2, 5],
    "classification": "circular",
    "idx": "t_0",
    "reason": "why",
}


def test_prmbench_layout(tmp_path: Path) -> None:
    """Step numbers count from 1; those behind the last step count no step, and are counted."""
    [row, bare] = load(tmp_path, PRMBENCH, PRMBENCH | {"error_steps": []}, source="prmbench")
    assert row == {
        "prompt": "p",
        "completions": ["a", "b", "c"],
        "labels": [True, False, True],
        "error_type": "circular",
        "ignored_errors": 1,
        "id": "circular/t_0",
        "problem_id": "t_0",
        "error_reason": "why",
    }
    assert (bare["labels"], bare["ignored_errors"]) == ([True] * 3, 0)


def test_real_prmbench(data_dir: Path) -> None:
    if not (data_dir / "prmbench").is_dir():
        pytest.skip("no prmbench in the data folder")
    rows = load_rows(DataConfig(source="prmbench", path=str(data_dir / "prmbench")))
    check_unique_ids(rows)
    counts = Counter(row["error_type"] for row in rows)
    assert (len(rows), len(counts), counts.pop("multi_solutions"), set(counts.values())) == (394, 9, 10, {48})
    assert sum(row["ignored_errors"] > 0 for row in rows) == 11
    assert all((False in row["labels"]) == (row["error_type"] != "multi_solutions") for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error_steps": [0]}, "column 'error_steps': must be a list of step numbers from 1, found list .0."),
        ({"error_steps": ["2"]}, "must be a list of step numbers from 1"),
        ({"error_steps": None}, "must be a list of step numbers from 1, found NoneType"),
        ({"modified_process": "abc"}, "column 'modified_process': must be a list of step texts, found str"),
        ({"classification": ["circular"]}, "column 'classification': must be the name of a class, found list"),
        ({"modified_process": [], "error_steps": []}, "has zero steps"),
    ],
)
def test_bad_rows_of_prmbench(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, PRMBENCH, PRMBENCH | change, source="prmbench")
    assert caught.value.line == 2


@pytest.mark.parametrize("source", ["processbench", "bigbench_mistake", "mr_gsm8k", "prmbench"])
def test_never_training_data(source: str) -> None:
    spec = DataConfig(source=source, path="folder")
    with pytest.raises(ConfigError, match=f"{source!r} .* is kept for evaluation"):
        check_training_use(spec)
    check_training_use(DataConfig(source=source, path="folder", allow_evaluation_data=True))


def test_hub_splits() -> None:
    for split in ("gsm8k", "math", "olympiadbench", "omnimath"):
        with pytest.raises(ConfigError, match="is kept for evaluation"):
            check_training_use(DataConfig(source="processbench", split=split))
    with pytest.raises(ConfigError, match="source 'mr_gsm8k' has no hub dataset"):
        DataConfig(source="mr_gsm8k")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"label": 3},
            "column 'label': must be the number of the first incorrect step .0 to 2; -1: none., found int 3",
        ),
        ({"label": -2}, "column 'label': .* found int -2"),
        ({"label": True}, "must be the number of the first incorrect step .*, found bool True"),
        ({"label": 1.0}, "found float 1.0"),
        ({"label": None}, "found NoneType None"),
        ({"steps": "abc"}, "column 'steps': must be a list of step texts, found str"),
        ({"steps": [], "label": -1}, "column 'completions': has zero steps"),
        ({"steps": ["a", "", "c"]}, "step 2 of 3 must not be empty"),
        ({"final_answer_correct": "yes"}, "column 'outcome': must be true or false, found str 'yes'"),
    ],
)
def test_bad_rows(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, ROW, ROW | change)
    assert caught.value.line == 2


def test_missing_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing column 'label' of source 'processbench'"):
        load(tmp_path, {"problem": "p", "steps": ["a"]})
