"""Where rows are read from: folders, splits, the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.config import DataConfig, resolve_split
from stepkd.data.load import load_rows
from stepkd.data.sources import get_source
from stepkd.errors import ConfigError, DataError

GSM = {"question": "How many?", "answer": "She has 2*600=<<2*600=1200>>1200.\nSo 1,200.\n#### 1,200"}


def write(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# --- folders and splits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["test.jsonl", "main/test.jsonl", "data/test.jsonl", "test-00000-of-00001.jsonl", "main/test-00000-of-00002.jsonl"],
)
def test_folder_with_a_file_per_split(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, GSM)
    write((tmp_path / name).with_name("train.jsonl"), GSM, GSM)
    assert [row["id"] for row in load_rows(DataConfig(source="gsm8k", path=str(tmp_path), split="test"))] == [
        "gsm8k/test/0"
    ]
    assert len(load_rows(DataConfig(source="gsm8k", path=str(tmp_path)))) == 2


def test_folder_with_shards(tmp_path: Path) -> None:
    for shard in range(3):
        write(tmp_path / f"train-{shard:05}-of-00003.jsonl", GSM)
    rows = load_rows(DataConfig(source="gsm8k", path=str(tmp_path)))
    assert [row["id"] for row in rows] == ["gsm8k/train/0", "gsm8k/train/1", "gsm8k/train/2"]


def test_folder_with_one_file_of_any_name(tmp_path: Path) -> None:
    write(tmp_path / "all_of_it.jsonl", {"question": "q", "answer": "1"})
    (tmp_path / "README.md").write_text("about")
    assert load_rows(DataConfig(source="multiarith", path=str(tmp_path)))[0]["id"] == "multiarith/test/0"


def test_folder_without_a_fitting_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file for split 'train' of source 'gsm8k'; the folder has no \.jsonl"):
        load_rows(DataConfig(source="gsm8k", path=str(tmp_path)))
    write(tmp_path / "test.jsonl", GSM)
    with pytest.raises(
        DataError, match=r"the folder has test\.jsonl\. Name the file train\.jsonl or give its own path"
    ):
        load_rows(DataConfig(source="gsm8k", path=str(tmp_path)))
    write(tmp_path / "test.json", GSM)
    with pytest.raises(DataError, match=r"several files for one split: test\.json, test\.jsonl"):
        load_rows(DataConfig(source="gsm8k", path=str(tmp_path), split="test"))


def test_a_splits_own_name_may_look_like_a_shards(tmp_path: Path) -> None:
    for name in ("run-01", "run-02"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "answer": "1"}) + "\n")
    assert [row["prompt"] for row in load_rows(DataConfig(path=str(tmp_path), split="run-02"))] == ["run-02"]


def test_the_files_name_states_the_split() -> None:
    assert resolve_split(DataConfig(source="gsm8k", path="x/test.jsonl")) == "test"
    assert resolve_split(DataConfig(source="gsm8k", path="x/mine.jsonl")) == "train"
    assert resolve_split(DataConfig(source="gsm8k", path="x/mine.jsonl", split="test")) == "test"
    assert resolve_split(DataConfig(source="aime24", split="train")) == "test"  # the hub calls it train
    assert resolve_split(DataConfig(source="gsm8k", path="x/test.jsonl", split="train")) == "test"  # a recipe's split


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stands in for the network: records the calls and gives one GSM8K row each."""
    import datasets

    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        calls.append((name, config, split))
        return [GSM | {"problem": "p", "solution": "\\boxed{1}"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_ids_configurations_and_splits(hub: list[tuple[Any, ...]]) -> None:
    assert load_rows(DataConfig(source="gsm8k", split="test"))[0]["id"] == "gsm8k/test/0"
    load_rows(DataConfig(source="gsm8k", hub="me/gsm8k-copy", split="dev"))
    load_rows(DataConfig(source="gsm8k", hub_config="socratic"))
    load_rows(DataConfig(hub="me/rows", columns={"prompt": "question"}))
    load_rows(DataConfig(source="aime24"))
    load_rows(DataConfig(source="aime24", hub="AI-MO/aimo-validation-aime", split="train"))
    assert hub == [
        ("openai/gsm8k", "main", "test"),
        ("me/gsm8k-copy", None, "dev"),
        ("openai/gsm8k", "socratic", "train"),
        ("me/rows", None, "train"),
        ("HuggingFaceH4/aime_2024", None, "train"),
        ("AI-MO/aimo-validation-aime", None, "train"),
    ]
    hub.clear()
    rows = load_rows(DataConfig(source="math"))
    assert [call[1] for call in hub] == list(get_source("math").hub_configs)
    assert [row["id"] for row in rows] == [f"math/train/{i}" for i in range(7)]


def test_hub_errors(hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    with pytest.raises(ConfigError, match=r"unknown split \(source gsm8k\) 'tset': did you mean 'test'"):
        load_rows(DataConfig(source="gsm8k", split="tset"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [])
    with pytest.raises(DataError, match="gsm8k:train: no rows are left: 0 found"):
        load_rows(DataConfig(source="gsm8k"))

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\nlong tail")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = r"openai/gsm8k/main:train: cannot load .*ConnectionError: Couldn't reach.*No network\? Give path="
    with pytest.raises(DataError, match=message) as caught:
        load_rows(DataConfig(source="gsm8k"))
    assert "long tail" not in str(caught.value)
