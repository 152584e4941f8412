"""Specs: contract rows, order and limits, training use, recipes and the command-line shorthand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.config import DataConfig, check_training_use, parse_spec
from stepkd.data.load import load_rows
from stepkd.data.rows import DEMONSTRATION, PROBLEM, STEPWISE, problem_with, validate
from stepkd.errors import ConfigError, DataError

ANYTHING = problem_with({})
PROBLEMS = [{"prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(10)]


def write(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(source: str, path: Path, *rows: Any, **settings: Any) -> list[dict[str, Any]]:
    return load_rows(DataConfig(source=source, path=write(path, *rows), **settings))


# --- rows in contract form -------------------------------------------------------------------------------------------


def test_rows_keep_extra_columns_and_get_ids(tmp_path: Path) -> None:
    rows = load(
        "rows",
        tmp_path / "mine.jsonl",
        {"prompt": "1+1?", "answer": 2, "level": 1},
        {"prompt": "2?", "answer": "2", "id": 7},
    )
    assert rows == [
        {"prompt": "1+1?", "answer": "2", "level": 1, "id": "mine/0"},
        {"prompt": "2?", "answer": "2", "id": "7"},
    ]


def test_rows_rename_and_validate(tmp_path: Path) -> None:
    raw = {"instruction": "1+1?", "steps": ["a", "b"], "ok": [True, None]}
    columns = {"prompt": "instruction", "completions": "steps", "labels": "ok"}
    [row] = load("rows", tmp_path / "a.jsonl", raw, columns=columns)
    assert validate(row, STEPWISE) == {"prompt": "1+1?", "completions": ["a", "b"], "labels": [True, None], "id": "a/0"}
    with pytest.raises(DataError, match=r"a\.jsonl, line 2, column 'labels': has zero labelled steps"):
        load("rows", tmp_path / "a.jsonl", raw, raw | {"ok": [None, None]}, columns=columns)


def test_rows_take_the_contract_of_the_first_row_or_the_one_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2, column 'answer': missing column 'answer' of a problem row"):
        load("rows", tmp_path / "a.jsonl", PROBLEMS[0], {"prompt": "x", "solution": "y"})
    path = write(tmp_path / "a.jsonl", {"prompt": "x", "solution": "y"})
    assert load_rows(DataConfig(path=path), contract=DEMONSTRATION)[0]["solution"] == "y"
    with pytest.raises(DataError, match="missing column 'answer' of a problem row"):
        load_rows(DataConfig(path=path), contract=PROBLEM)
    with pytest.raises(DataError, match="missing column 'completions' of a stepwise row; the row has 'prompt'"):
        load_rows(DataConfig(path=path), contract=STEPWISE)


def test_rows_extra_column_rules(tmp_path: Path) -> None:
    raw = PROBLEMS[0] | {"solutions": ["a"]}
    with pytest.raises(DataError, match="unknown column 'solutions'; did you mean 'solution'"):
        load("rows", tmp_path / "a.jsonl", raw)
    [row] = load("rows", tmp_path / "a.jsonl", raw, options={"extra_columns": "keep"})
    assert row["solutions"] == ["a"]


def test_whole_numbers_0_and_1_are_incorrect_and_correct_unless_a_minus_1_is_among_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = {"prompt": "p", "completions": ["a", "b", "c"], "labels": [1, 0, None]}
    [row, ones] = load("rows", tmp_path / "a.jsonl", raw, raw | {"labels": [1, 1, 1]})
    assert (row["labels"], ones["labels"]) == ([True, False, None], [True, True, True])
    assert row["labels"][0] is True
    [record] = caplog.records
    assert re.search(r"a\.jsonl: .*0 is read as incorrect .*data\.init_args\.labels\.kind: rating", record.getMessage())
    caplog.clear()
    [row, _] = load("rows", tmp_path / "a.jsonl", raw, raw | {"labels": [1, -1, 0]})
    assert row["labels"] == [1, 0, None]
    assert type(row["labels"][1]) is int
    [row] = load_rows(DataConfig(path=write(tmp_path / "a.jsonl", raw)), ratings=True)
    assert type(row["labels"][1]) is int
    [row, _] = load("rows", tmp_path / "a.jsonl", raw, raw | {"labels": [0.5, 0, 1]})
    assert row["labels"] == [1.0, 0.0, None]
    assert type(row["labels"][1]) is float, "beside chances it is one"
    assert not caplog.records


def test_boolean_labels_survive_parquet_and_saved_datasets(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": "p", "completions": ["a", "b"], "labels": [True, None]}] * 2
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "saved"))
    for spec in (DataConfig(path=str(tmp_path / "a.parquet")), DataConfig(path=str(tmp_path / "saved"), split="test")):
        loaded = load_rows(spec)
        assert [row["labels"] for row in loaded] == [[True, None]] * 2
        assert loaded[0]["labels"][0] is True
    with pytest.raises(DataError, match=r"the saved dataset has no split 'tset'\. Did you mean 'test'"):
        load_rows(DataConfig(path=str(tmp_path / "saved"), split="tset"))


# --- a file of one's own under a recipe's other settings -------------------------------------------------------------


@pytest.mark.parametrize("source", ["gsm8k", "math", "multiarith"])
def test_a_file_in_contract_form_is_read_as_rows_whatever_source_the_recipe_names(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mine.jsonl"
    for raw in (PROBLEMS[0], {"prompt": "x", "completion": "y"}, {"messages": [{"role": "user", "content": "x"}]}):
        spec = DataConfig(source=source, path=write(path, raw))
        assert load_rows(spec, contract=ANYTHING) == load_rows(DataConfig(path=str(path)), contract=ANYTHING)
        assert f"so it is read as source 'rows', not '{source}'" in caplog.messages[-1]
    caplog.clear()
    load("gsm8k", path, {"question": "q", "answer": "#### 2", "prompt": "not this"})
    assert not caplog.records
    with pytest.raises(DataError, match=rf"missing column .* of source '{source}'.*of your own set source: rows"):
        load(source, path, {"text": "x"})


def test_a_path_wins_over_hub_configuration_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepkd.data.load._read_hub", lambda *_: pytest.fail("asks the hub"))
    recipe = {"hub": "a/b", "hub_config": "main", "split": "train[:90%]"}
    rows = load("rows", tmp_path / "test.jsonl", *PROBLEMS, **recipe)
    assert len(rows) == 10
    with pytest.raises(ConfigError, match="kept for evaluation"):
        check_training_use(DataConfig(source="gsm8k", path="x/test.jsonl", split="train"))


# --- limit, offset, order --------------------------------------------------------------------------------------------


def test_limit_offset_and_ids(tmp_path: Path) -> None:
    rows = load("rows", tmp_path / "a.jsonl", *PROBLEMS, limit=3, offset=2)
    assert [row["id"] for row in rows] == ["a/2", "a/3", "a/4"]
    with pytest.raises(DataError, match="no rows are left: 10 found, offset 10; lower the offset"):
        load("rows", tmp_path / "a.jsonl", *PROBLEMS, offset=10)


def test_limit_stops_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PROBLEMS[0]) + "\n{broken\n")
    assert len(load_rows(DataConfig(path=str(path), limit=1))) == 1
    with pytest.raises(DataError, match="line 2: corrupt JSON"):
        load_rows(DataConfig(path=str(path)))


def test_shuffle_is_a_permutation_keyed_by_the_seed(tmp_path: Path) -> None:
    def ids(**settings: Any) -> list[str]:
        return [row["id"] for row in load("rows", tmp_path / "a.jsonl", *PROBLEMS, **settings)]

    whole = ids(shuffle_seed=1)
    assert sorted(whole) == sorted(ids())
    assert whole == ids(shuffle_seed=1)
    assert whole != ids()
    assert whole != ids(shuffle_seed=2)
    assert ids(shuffle_seed=1, limit=4, offset=3) == whole[3:7]


# --- training on evaluation data -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"source": "math500"},
        {"source": "math500", "path": "x/train.jsonl"},
        {"source": "gsm8k", "split": "test"},
        {"source": "gsm8k", "path": "x/test.jsonl"},
        {"source": "math", "split": "test"},
        {"source": "svamp"},
        {"source": "aime24", "split": "train"},
    ],
)
def test_evaluation_data_is_refused_for_training(settings: dict[str, Any]) -> None:
    message = f"'{settings['source']}' .*kept for evaluation.*set allow_evaluation_data: true"
    with pytest.raises(ConfigError, match=message):
        check_training_use(DataConfig(**settings))
    check_training_use(DataConfig(**settings, allow_evaluation_data=True))


def test_training_data_is_allowed() -> None:
    for source in ("gsm8k", "math", "reasoning_gym", "task"):
        check_training_use(DataConfig(source=source))
    check_training_use(DataConfig(source="svamp", split="train"))
    check_training_use(DataConfig(path="x.jsonl"))


# --- specs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "gsm8"}, "no file, folder or data source named 'gsm8'. Did you mean 'gsm8k'"),
        ({"source": "rows"}, "source 'rows' has no hub dataset of its own; give path=<file> or hub=<id>"),
        ({"source": "gsm8k", "limit": 0}, "limit=0: must be at least 1"),
        ({"source": "gsm8k", "offset": -1}, "offset=-1: must be 0 or positive"),
        ({"source": "task", "columns": {"prompt": "q"}}, "source 'task' generates its rows; drop columns"),
        (
            {"source": "task", "options": {"noize": True}},
            r"unknown option \(source task\) 'noize': did you mean",
        ),
        ({"source": "reasoning_gym", "options": {"size": True}}, "must be int, found bool True"),
        ({"source": "reasoning_gym", "options": {"config": 3}}, "must be dict, found int 3"),
        (
            {"path": "x", "options": {"extra_columns": "drop"}},
            "extra_columns of .*'drop': choose from check, keep",
        ),
    ],
)
def test_bad_specs(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("gsm8k", DataConfig(source="gsm8k")),
        ("gsm8k:path=/x/test.jsonl,split=test,limit=8",
         DataConfig(source="gsm8k", path="/x/test.jsonl", split="test", limit=8)),
        ("prm800k:per_record=4,path=a b.jsonl",
         DataConfig(source="prm800k", path="a b.jsonl", options={"per_record": 4})),
        ("x/rows.jsonl", DataConfig(path="x/rows.jsonl")),
        ("C:\\x\\rows.parquet,limit=2", DataConfig(path="C:\\x\\rows.parquet", limit=2)),
        ("rows:path='a,b.jsonl',columns.prompt=q,columns.answer='1'",
         DataConfig(path="a,b.jsonl", columns={"prompt": "q", "answer": "1"})),
        ("rows:path=it's.jsonl,limit=1", DataConfig(path="it's.jsonl", limit=1)),
        ("rows:hub=me/rows,split=2024,extra_columns=keep",
         DataConfig(hub="me/rows", split="2024", options={"extra_columns": "keep"})),
        ("task:n=4,noise.rate=0.5,noise.kind=random,options.seed=3",
         DataConfig(source="task", options={"n": 4, "noise": {"rate": 0.5, "kind": "random"}, "seed": 3})),
        ('task:noise={"rate": 0.5, "seed": 1},n=2',
         DataConfig(source="task", options={"noise": {"rate": 0.5, "seed": 1}, "n": 2})),
        ("reasoning_gym:dataset='10'", DataConfig(source="reasoning_gym", options={"dataset": "10"})),
        ("math500:allow_evaluation_data=true,shuffle_seed=null",
         DataConfig(source="math500", allow_evaluation_data=True)),
    ],
)  # fmt: skip
def test_shorthand(text: str, spec: DataConfig) -> None:
    assert parse_spec(text) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gsm9k:limit=1", "no file, folder or data source named 'gsm9k'. Did you mean 'gsm8k'"),
        ("gsm8k:limt=1", "unknown key in .* 'limt': did you mean 'limit'"),
        ("gsm8k:limit=ten", "limit: expected int, got 'ten'"),
        ("gsm8k:limit=1.5", "limit: expected int, got '1.5'"),
        ("gsm8k:offset=null", "offset has no value"),
        ("gsm8k:allow_evaluation_data=1", "allow_evaluation_data: expected bool, got '1'"),
        ("gsm8k:limit", "cannot read 'limit'.*write key=value"),
        ("gsm8k:columns=prompt", "columns: expected dict"),
        ("gsm8k:limit=0", "limit=0: must be at least 1"),
        ("task:n='3'", "option n of source 'task' must be int, found str '3'"),
    ],
)
def test_bad_shorthand(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_spec(text)


def test_a_spec_can_stand_in_a_recipe() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=DataConfig)
    yaml = "{source: prm800k, path: x, split: train, limit: 3, columns: {prompt: q}, options: {per_record: 4}}"
    parsed = parser.instantiate(parser.parse_args(["--data", yaml])).data
    assert parsed == DataConfig(
        source="prm800k", path="x", split="train", limit=3, columns={"prompt": "q"}, options={"per_record": 4}
    )


def test_rows_of_ones_own_take_the_place_of_generated_ones() -> None:
    generated: dict[str, Any] = {"source": "task", "options": {"task": "modular:terms=4", "n": 8}}
    for own in ({"path": "rows.jsonl"}, {"hub": "me/rows", "split": "train"}):
        assert DataConfig(**generated, **own) == DataConfig(**own)


def test_importing_the_sources_is_light() -> None:
    heavy = {"datasets", "transformers", "torch", "pyarrow", "reasoning_gym", "lightning"}
    modules = "stepkd.data.load, stepkd.data.templates"
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
