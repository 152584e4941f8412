"""Writers of step-labelled rows: what is written reads back, casts are counted, TRL's types are TRL's."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.config import DataConfig
from stepkd.data.io import read_rows
from stepkd.data.load import load_rows
from stepkd.data.rows import COMPLETION, STEPWISE, validate
from stepkd.data.sources.contract_rows import to_stepwise, trl_row
from stepkd.data.sources.math_shepherd import write_math_shepherd
from stepkd.errors import ConfigError, DataError, MachineError
from stepkd.labels.convert import Stepwise

ROLLED: dict[str, Any] = {
    "problem_id": "p/0",
    "prompt": "2+3?",
    "completion": "2+3=5\n5",
    "token_ids": [3, 4, 5],
    "logprobs": [-0.1, -0.2, -0.3],
    "step_ends": [2, 3],
    "finish": "stop",
    "correct": True,
    "model": "m",
    "sampling": {},
    "seed": 0,
    "step_labels": [True, None],
    "step_values": [1, 0.25],
    "answer": "5",
}
BOOLS = [
    {"id": "0", "prompt": "p", "completions": ["a\n", "b"], "labels": [True, False], "outcome": False, "answer": "1"},
    {"id": "1", "prompt": "q ü", "completions": ["c"], "labels": [True], "outcome": True, "answer": "2"},
]


def rated(*labels: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": "p", "completions": [f"s{i}" for i in range(len(labels))], "labels": list(labels), **more}


# --- completions to rows ----------------------------------------------------------------------------------------------


def test_to_stepwise() -> None:
    validate(dict(ROLLED), COMPLETION)
    row = to_stepwise(ROLLED | {"steps": ["2+3=5\n", "5"]})
    assert row == {
        "id": "p/0",
        "prompt": "2+3?",
        "completions": ["2+3=5\n", "5"],
        "labels": [True, None],
        "outcome": True,
        "answer": "5",
    }
    bare = {name: ROLLED[name] for name in ROLLED if name != "answer"} | {
        "correct": None,
        "id": "s/1",
        "labeller": {"j": 8},
    }
    row = to_stepwise(bare | {"steps": ["a", "b"]}, keep=("labeller", "absent"))
    assert row == {
        "id": "s/1",
        "prompt": "2+3?",
        "completions": ["a", "b"],
        "labels": [True, None],
        "labeller": {"j": 8},
    }


@pytest.mark.parametrize(
    ("change", "steps", "message"),
    [
        ({}, ["a"], "p/0, column 'labels': has 2 entries for 1 completions"),
        ({"step_labels": None}, ["a", "b"], "column 'step_labels': the completion has no step_labels: label it first"),
        ({}, ["a", " "], "column 'completions': step 2 of 2 must not be empty"),
        ({"step_labels": [None, None]}, ["a", "b"], "has zero labelled steps"),
        ({"step_ends": [3]}, ["a"], "has 2 entries for 1 step_ends"),
    ],
)
def test_to_stepwise_bad_input(change: dict[str, Any], steps: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_stepwise(ROLLED | change | {"steps": steps})


# --- casting to TRL's booleans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "settings", "cast", "counted"),
    [
        ([True, False], {}, [True, False], {"correct": 1, "incorrect": 1}),
        ([1, 0, -1], {}, [True, True, False], {"correct": 2, "incorrect": 1, "neutral": 1}),
        ([1, 0, -1], {"neutral": "incorrect"}, [True, False, False], {"correct": 1, "incorrect": 2, "neutral": 1}),
        ([1.0, 0.5, 0.49, 0], {}, [True, True, False, False], {"correct": 2, "incorrect": 2}),
        ([1.0, 0.125, 0.0], {"threshold": 0.125}, [True, True, False], {"correct": 2, "incorrect": 1}),
    ],
)
def test_cast_of_every_kind(
    labels: list[Any], settings: dict[str, Any], cast: list[bool], counted: dict[str, int]
) -> None:
    counts: Counter[str] = Counter()
    row = trl_row(rated(*labels, id="x", subset="s"), counts=counts, **settings)
    assert row == rated(*cast, id="x", subset="s")
    assert all(isinstance(label, bool) for label in row["labels"])
    assert +counts == counted


def test_unlabelled_steps_join_the_next_label() -> None:
    counts: Counter[str] = Counter()
    row = trl_row(rated(None, None, True, False, None), counts=counts)
    assert row == {"prompt": "p", "completions": ["s0\ns1\ns2", "s3"], "labels": [True, False]}
    assert +counts == {"correct": 1, "incorrect": 1, "joined": 2, "cut": 1}
    row = trl_row(rated(1, 0, 0, -1, 0), neutral="mask", counts=counts)
    assert row == {"prompt": "p", "completions": ["s0", "s1\ns2\ns3"], "labels": [True, False]}
    assert trl_row(rated(0, 0), neutral="mask", counts=counts) is None
    assert (counts["empty"], counts["neutral"], counts["cut"]) == (1, 5, 4)


def test_cast_keeps_all_text_up_to_the_last_label() -> None:
    for labels in ([None, 1, None, 0, -1], [0, None, None], [None, None, -1]):
        given = rated(*labels)
        row = trl_row(given)
        assert row is not None
        last = max(i for i, label in enumerate(labels) if label is not None)
        assert "\n".join(row["completions"]) == "\n".join(given["completions"][: last + 1])


def test_cast_bad_input() -> None:
    for threshold in (1.0, 0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match=f"threshold={threshold}: must lie between 0 and 1"):
            trl_row(rated(1), threshold=threshold)
    with pytest.raises(DataError, match="column 'labels': mixes true/false with numbers"):
        trl_row(rated(True, 1))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        BOOLS,
        [rated(1, 0, -1, None, id="a"), rated(1, id="b")],
        [rated(0.5, None, 1.0, id="a")],
        [rated(True, id="a", prompt=[{"role": "user", "content": "p"}])],
    ],
)
def test_round_trip(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert Stepwise().write(rows, path) == len(rows)
    back = load_rows(DataConfig(source="rows", path=str(path)), contract=STEPWISE)
    assert back == rows
    assert [[type(label) for label in row["labels"]] for row in back] == [
        [type(label) for label in row["labels"]] for row in rows
    ]
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no temporary file is left"


def test_files_have_trls_columns_and_types(tmp_path: Path) -> None:
    """TRL's stepwise-supervision type: text, list of texts, list of booleans."""
    datasets = pytest.importorskip("datasets")
    rows = [trl_row(row) for row in (rated(1, None, -1, id="a"), rated(0, id="b"))]
    path = tmp_path / "trl.jsonl"
    Stepwise().write([row for row in rows if row is not None], path)
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    features = loaded.features
    assert features["prompt"].dtype == "string"
    assert features["completions"].feature.dtype == "string"
    assert features["labels"].feature.dtype == "bool"
    assert loaded[0] == {"prompt": "p", "completions": ["s0", "s1\ns2"], "labels": [True, False], "id": "a"}


def test_source_to_file_and_back(tmp_path: Path, data_dir: Path) -> None:
    """PRM800K rows survive."""
    path = data_dir / "prm800k" / "phase1_test.jsonl"
    if not path.is_file():
        pytest.skip("no prm800k in the data folder")
    rows = load_rows(DataConfig(source="prm800k", path=str(path), options={"per_record": 2}))
    Stepwise().write(rows, tmp_path / "rows.jsonl")
    assert load_rows(DataConfig(path=str(tmp_path / "rows.jsonl"))) == rows


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Stepwise().write(BOOLS, path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"column 'labels': has 1 entries for 2 completions"):
        Stepwise().write([BOOLS[0], BOOLS[0] | {"labels": [True]}], path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_write_bad_input(tmp_path: Path) -> None:
    for ending in ("csv", "parquet"):
        with pytest.raises(DataError, match=rf"written as \.jsonl, not '\.{ending}'"):
            Stepwise().write(BOOLS, tmp_path / f"x.{ending}")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(MachineError, match=r"cannot write .*That is a file: give another"):
        Stepwise().write(BOOLS, tmp_path / "file" / "x.jsonl")


# --- what TRL's files get wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": ["a"], "labels": [True]}, "missing column 'prompt' of a stepwise row"),
        (
            rated(True) | {"completions": [{"role": "assistant", "content": "a"}]},
            "step 1 of 1 must be text, found dict",
        ),
        (rated(True) | {"completions": "a"}, "column 'completions': must be a list of step texts, found str 'a'"),
        (rated(True, prompt=[{"role": "assistant", "content": "a"}]), "ends with an assistant message"),
        ({"prompt": "p", "completions": ["a"], "label": [True]}, "no row contract fits .* lacks 'labels'"),
    ],
)
def test_layouts_that_are_not_trls_type(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_rows(DataConfig(path=str(path)))


# --- Math-Shepherd's text form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [True, False])
def test_math_shepherd_round_trip(tmp_path: Path, bare: bool) -> None:
    numbered = ["Step 1: 1+1=2 - fine", "Step 2: so 2. The answer is: 2"]
    steps = [step.partition(": ")[2] for step in numbered] if bare else numbered
    rows = [{"id": "a", "prompt": "1 + 1 - 0?", "completions": steps, "labels": [True, False], "subset": "GSM8K"}]
    path = tmp_path / "ms.jsonl"
    assert write_math_shepherd(rows, path) == 1
    [(written, _)] = read_rows(path)
    assert written == {
        "input": "1 + 1 - 0? Step 1: 1+1=2 - fine ки\nStep 2: so 2. The answer is: 2 ки",
        "label": "1 + 1 - 0? Step 1: 1+1=2 - fine +\nStep 2: so 2. The answer is: 2 -",
        "task": "GSM8K",
        "id": "a",
    }
    back = load_rows(DataConfig(source="math_shepherd", path=str(path)))
    assert back == [rows[0] | {"completions": numbered, "final_answer": "2"}]


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (["Step 1: a", "b"], "p Step 1: a ки\nb ки"),
        (["Step 2: a", "b"], "p Step 1: Step 2: a ки\nStep 2: b ки"),
        (["a\n", " b"], "p Step 1: a ки\nStep 2: b ки"),
    ],
)
def test_math_shepherd_numbers_steps_unless_the_first_has_one(tmp_path: Path, steps: list[str], text: str) -> None:
    write_math_shepherd([rated(True, True) | {"completions": steps}], tmp_path / "x.jsonl")
    [(written, _)] = read_rows(tmp_path / "x.jsonl")
    assert written["input"] == text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (rated(True, prompt=[{"role": "user", "content": "p"}]), "column 'prompt': is a list of messages"),
        (rated(True, prompt="a ки b"), "column 'prompt': holds the step tag 'ки'"),
        (rated(True) | {"completions": ["ки"]}, "column 'completions': holds the step tag"),
        (rated(True, prompt="Do Step 1: a"), "column 'prompt': holds .* or 'Step 1:' where no solution begins"),
        (
            rated(True) | {"completions": ["as in step 1: a"]},
            "column 'completions': holds .*convert the row",
        ),
    ],
)
def test_math_shepherd_bad_input(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_math_shepherd([row], tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()
