"""Benchmarks by name and the data they read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepkd.data.config import benchmark_data
from stepkd.data.load import load_rows
from stepkd.data.rows import PROBLEM, check_unique_ids
from stepkd.data.sources import BENCHMARKS, get_benchmark
from stepkd.data.templates import TEMPLATES
from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.metrics import default_ks
from stepkd.evaluation.runner import _warn_of_cut_off
from stepkd.grading.extract import EXTRACTORS


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "set one" / "problems.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "answer": i}) + "\n" for i in range(5)))
    return path


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_entries_refer_to_things_that_exist(name: str) -> None:
    benchmark = get_benchmark(name)
    assert benchmark.name == name
    assert benchmark.template in TEMPLATES
    assert set(benchmark.extractors) <= set(EXTRACTORS)
    assert benchmark.max_new_tokens > 0


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gms8k", "Did you mean 'gsm8k'"),
        ("math-500", "Did you mean 'math500'"),
        ("zzz", r"Known: aime24, aime25,.*task\..*--benchmark rows --data FILE"),
    ],
)
def test_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown benchmark '{name}'.*{hint}"):
        get_benchmark(name)


def test_settings_and_limit() -> None:
    spec = benchmark_data(BENCHMARKS["task"], 'task="modular:terms=3,modulus=7",n=9', 4)
    assert spec.source == "task"
    assert spec.options == {"task": "modular:terms=3,modulus=7", "n": 9}
    assert (spec.split, spec.limit) == ("test", 4)
    assert len(load_rows(spec, contract=PROBLEM)) == 4
    assert benchmark_data(BENCHMARKS["task"], "n=9,limit=2", None).limit == 2
    assert benchmark_data(BENCHMARKS["task"], "n=9,split=validation", None).split == "validation"


def test_hub_by_default() -> None:
    spec = benchmark_data(BENCHMARKS["gsm8k"], None, 7)
    assert (spec.source, spec.path, spec.split, spec.limit) == ("gsm8k", None, "test", 7)


def test_file_whatever_its_folder_is_called(problems: Path) -> None:
    odd = problems.parent / 'lr=1,n=2 "x"'
    odd.mkdir()
    (odd / "problems.jsonl").write_bytes(problems.read_bytes())
    for path in (problems, odd / "problems.jsonl"):
        rows = load_rows(benchmark_data(BENCHMARKS["rows"], str(path), None), contract=PROBLEM)
        assert [row["answer"] for row in rows] == ["0", "1", "2", "3", "4"]


def test_a_single_file_is_evaluated_whatever_split_its_name_says(data_dir: Path) -> None:
    train = benchmark_data(BENCHMARKS["gsm8k"], str(data_dir / "gsm8k" / "train.jsonl"), 2)
    assert [row["id"] for row in load_rows(train, contract=PROBLEM)] == ["gsm8k/train/0", "gsm8k/train/1"]


@pytest.mark.parametrize(("name", "count"), [("gsm8k", 1319), ("gsm_plus", 2100), ("math500", 500)])
def test_folders(name: str, count: int, data_dir: Path) -> None:
    whole = load_rows(benchmark_data(BENCHMARKS[name], str(data_dir / name), None), contract=PROBLEM)
    assert len(whole) == count
    assert load_rows(benchmark_data(BENCHMARKS[name], str(data_dir / name), 2), contract=PROBLEM) == whole[:2]


@pytest.mark.parametrize("name", ["svamp", "multiarith"])
def test_folders_without_a_named_split(name: str, data_dir: Path) -> None:
    assert len(load_rows(benchmark_data(BENCHMARKS[name], str(data_dir / name), 3), contract=PROBLEM)) == 3


@pytest.mark.parametrize(
    ("name", "file", "count", "last"),
    [
        ("minerva_math", "minerva_math", 272, "10.1"),
        ("olympiad_bench", "olympiadbench", 675, "11"),
        ("amc23", "amc23", 40, "8"),
        ("aime24", "aime24", 30, "902"),
        ("aime25", "aime25", 30, "240"),
    ],
)
def test_contests(name: str, file: str, count: int, last: str, data_dir: Path) -> None:
    data = benchmark_data(BENCHMARKS[name], str(data_dir / "contests" / f"{file}.jsonl"), None)
    rows = load_rows(data, contract=PROBLEM)
    check_unique_ids(rows)
    assert (len(rows), rows[-1]["answer"]) == (count, last)
    if name[:3] in ("amc", "aim"):
        assert all(row["answer"].lstrip("-").isdecimal() for row in rows)


def test_more_completions_of_smaller_sets() -> None:
    samples = {name: each.samples for name, each in BENCHMARKS.items() if each.samples > 1}
    small, middle = dict.fromkeys(("aime24", "aime25", "amc23"), 64), ("math500", "minerva_math", "olympiad_bench")
    assert samples == small | dict.fromkeys(middle, 4)


def test_bad_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        load_rows(benchmark_data(BENCHMARKS["rows"], str(tmp_path / "nowhere.jsonl"), None))
    with pytest.raises(ConfigError, match=r"unknown key in .* 'm'"):
        benchmark_data(BENCHMARKS["task"], "m=5", None)
    with pytest.raises(ConfigError, match=r"'task' generates its problems; .*--benchmark rows --data FILE"):
        benchmark_data(BENCHMARKS["task"], "some/file.jsonl", None)
    with pytest.raises(ConfigError, match="source 'rows' has no hub dataset of its own"):
        benchmark_data(BENCHMARKS["rows"], None, None)


@pytest.mark.parametrize(
    ("samples", "ks"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (10, [1, 2, 4, 8, 10])]
)
def test_default_ks(samples: int, ks: list[int]) -> None:
    assert default_ks(samples) == ks


def test_limits_fit_chat_models_and_only_word_problems_take_the_last_number() -> None:
    assert BENCHMARKS["gsm8k"].max_new_tokens == 1024
    assert BENCHMARKS["math500"].max_new_tokens == 2048
    assert {name for name, each in BENCHMARKS.items() if "last_number" in each.extractors} == {
        *("gsm8k", "gsm8k_platinum", "gsm_plus", "svamp", "multiarith", "reasoning_gym", "rows")
    }
    assert "latex" in BENCHMARKS["math500"].extractors


def test_more_than_a_twentieth_cut_off_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    metrics = {"truncated_rate": {"value": 0.25}, "truncated_answered_rate": {"value": 0.05}}
    _warn_of_cut_off(metrics, 320)
    assert "25.0% of the completions were cut off at 320 new tokens; 20.0% have no complete answer" in caplog.text
    caplog.clear()
    _warn_of_cut_off({name: {"value": 0.05} for name in metrics}, 320)
    assert not caplog.text
