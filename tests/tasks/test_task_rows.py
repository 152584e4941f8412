"""Rows: disjoint splits, one result per key, and the check of steps against a stored row."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stepkd
from stepkd.errors import ConfigError, DataError
from stepkd.tasks.families import TASKS, get_task
from stepkd.tasks.rows import Noise, check_row, make_rows, row_problem, split_of

SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize("name", TASKS)
def test_columns_and_labels(name: str) -> None:
    rows = make_rows(name, 30, seed=3, noise=Noise(0.3))
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == 30
    for row in rows:
        assert list(row) == ["id", "prompt", "answer", "solution", "steps", "step_labels", "outcome", "task", "meta"]
        assert row["outcome"] == (row["steps"][-1] == f"#### {row['answer']}")
        assert row["solution"] == "".join(row["steps"])
        assert row["solution"].splitlines(keepends=True) == row["steps"]
        assert get_task(row["task"]) == get_task(name)
        stored = json.loads(json.dumps(row))
        assert stored == row
        assert check_row(stored, row["steps"]) == row["step_labels"]
    assert not all(all(row["step_labels"]) for row in rows)


def test_splits_are_disjoint_whatever_the_seed() -> None:
    prompts: dict[str, set[str]] = {
        split: {
            row["prompt"]
            for seed in range(3)
            for row in make_rows("modular:terms=3,modulus=7", 60, seed=seed, split=split)
        }
        for split in SPLITS
    }
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["validation"] & prompts["test"]
    assert all(split_of(prompt) == split for split in SPLITS for prompt in prompts[split])


def test_split_shares() -> None:
    found = [split_of(f"{index}=\n") for index in range(5000)]
    assert abs(found.count("train") / 5000 - 0.8) < 0.025
    assert abs(found.count("validation") / 5000 - 0.1) < 0.02


def test_rows_depend_on_seed_and_index_only() -> None:
    rows = make_rows("modular", 40, seed=1)
    assert make_rows("modular", 15, seed=1) == rows[:15]
    assert make_rows("modular", 40, seed=2) != rows
    noisy = make_rows("modular", 40, seed=1, noise=Noise(0.5))
    assert [row["prompt"] for row in noisy] == [row["prompt"] for row in rows]
    assert [row["steps"] for row in noisy] != [row["steps"] for row in rows]


def test_same_rows_in_another_process() -> None:
    code = (
        "import hashlib, json; from stepkd.tasks import TASKS, Noise, make_rows; "
        "kinds = ('random', 'systematic'); "
        "rows = [make_rows(n, 5, seed=7, noise=Noise(0.4, kind=k)) for n in TASKS for k in kinds]; "
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())"
    )
    root = str(Path(stepkd.__file__).parent.parent)
    found = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": root}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout.strip())
    rows = [
        make_rows(name, 5, seed=7, noise=Noise(0.4, kind=kind))  # type: ignore[arg-type]
        for name in TASKS
        for kind in ("random", "systematic")
    ]
    assert found == {hashlib.sha256(json.dumps(rows).encode()).hexdigest()}


def test_generated_problems_do_not_change_between_versions() -> None:
    # Splits and seeds are part of published results: this digest may change only on purpose.
    prompts = [row["prompt"] for name in TASKS for row in make_rows(name, 3, seed=0, split="test")]
    assert hashlib.sha256("".join(prompts).encode()).hexdigest()[:16] == "94d081f301797ea7"


def test_all_problems_of_a_small_space_are_found_and_no_more() -> None:
    task = "modular:terms=2,modulus=4,operators=+-"  # 32 problems
    sizes = {}
    for split in SPLITS:
        with pytest.raises(ConfigError, match="different problems were found") as caught:
            make_rows(task, 33, seed=0, split=split)  # type: ignore[arg-type]
        sizes[split] = int(re.search(r"but only (\d+) different", str(caught.value))[1])  # type: ignore[index]
        assert f"33 rows asked of {get_task(task).spec} ({split} split)" in str(caught.value)
        assert f"ask for at most {sizes[split]}" in str(caught.value)
    assert sum(sizes.values()) == 32
    assert len(make_rows(task, sizes["train"], seed=1)) == sizes["train"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n=0, seed=0: ask for at least one row"),
        ({"seed": -1}, "n=1, seed=-1: ask for at least one row, and give a seed of 0 or more"),
        ({"split": "valid"}, "unknown split 'valid': did you mean 'validation'?"),
        ({"task": "moduler"}, "did you mean 'modular'?"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    arguments = {"task": "modular", "n": 1, "seed": 0, **settings}
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_rows(arguments.pop("task"), arguments.pop("n"), **arguments)


def test_check_row_marks_slips_surplus_and_claims() -> None:
    row = make_rows("modular:terms=3,operators=+", 1, seed=0)[0]
    task, problem = row_problem(row)
    slip = task.slips(problem, [], row["steps"][0])[0]
    carried = task.next_step(problem, [slip])
    assert carried is not None
    assert check_row(row, [slip, carried]) == [False, False]
    assert check_row(row, [slip, carried], given="claims") == [False, True]
    assert check_row(row, [*row["steps"], "more"]) == [True, True, True, False]
    assert check_row(row, []) == []


def test_bad_rows() -> None:
    row = make_rows("modular", 1, seed=0)[0]
    without = {key: value for key, value in row.items() if key != "meta"}
    message = f"row {row['id']}: not a problem of the tiny world, as stepkd.tasks.make_rows makes them (KeyError"
    with pytest.raises(DataError, match=re.escape(message)):
        check_row(without, [])
    for meta in (
        None,
        {},
        {"numbers": "12"},
        {"numbers": [1], "operators": "+"},
        {"numbers": [None, 2], "operators": "+"},
    ):
        with pytest.raises(DataError, match="not a problem of the tiny world"):
            check_row({**row, "meta": meta}, [])
    with pytest.raises(DataError, match="'11' is not the answer of the problem in the row's meta"):
        check_row({**row, "answer": "11"}, [])
    endless = {"row": "0" * 12, "steps": 10**12}
    with pytest.raises(DataError, match="no answer follows after 200 steps"):
        check_row({**row, "task": "cellular", "meta": endless}, [])
