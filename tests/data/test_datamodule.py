"""StepData: specs in, loaders of optimiser-step batches out."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stepkd.data.batching import Position
from stepkd.data.config import DataConfig
from stepkd.data.datamodule import StepData
from stepkd.errors import ConfigError, DataError
from stepkd.models.spec import tiny_tokenizer

START = Position()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def attach(tokenizer: Any) -> Any:
    """Give a data module the trainer it needs: a rank, and a module with a tokenizer and a position."""

    def attached(data: StepData, *, rank: int = 0, world_size: int = 1, position: Position = START) -> StepData:
        def reads(split: str) -> dict[tuple[str, ...], str]:
            return {("solution",) if split == "train" else ("answer",): "somebody reads it"}

        module = SimpleNamespace(tokenizer=tokenizer, position=position, reads=reads)
        trainer: Any = SimpleNamespace(
            lightning_module=module, global_rank=rank, world_size=world_size, limit_train_batches=1.0
        )
        data.trainer = trainer
        return data

    return attached


def task(split: str = "train", n: int = 12) -> DataConfig:
    return DataConfig(source="task", split=split, options={"task": "modular:terms=3", "n": n})


def write(path: Path, rows: list[dict[str, Any]]) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(path))


def test_fit(attach: Any, tokenizer: Any) -> None:
    data = attach(StepData(train=task(), validation=task("validation", 5), template="task", global_batch_size=4))
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(batch.examples) for batch in batches] == [4, 4, 4]
    assert sorted(i for batch in batches for i in batch.indices) == list(range(12))
    first = batches[0].examples[0]
    assert tokenizer.decode(list(first.prompt_ids)) == first.row["prompt"]
    assert tokenizer.decode(list(first.token_ids)) == first.row["solution"] + "<eos>"
    validation = [i for batch in data.val_dataloader() for i in batch.indices]
    assert sorted(validation[:4]) == [0, 1, 2, 3]
    assert validation[4:] == [4], "file order"
    examples = data.examples["train"]
    data.setup("fit")
    assert data.examples["train"] is examples, "tokenised once"


def test_training_starts_at_the_modules_position_and_validation_at_the_beginning(attach: Any) -> None:
    settings = {"train": task(), "validation": task("validation", 4), "template": "task", "global_batch_size": 4}
    whole = attach(StepData(**settings))
    resumed = attach(StepData(**settings), position=Position(0, 2))
    for data in (whole, resumed):
        data.setup("fit")
    rest, every = ([batch.indices for batch in data.train_dataloader()] for data in (resumed, whole))
    assert rest == every[2:]
    rest, every = ([batch.indices for batch in data.val_dataloader()] for data in (resumed, whole))
    assert rest == every == [(0, 1, 2, 3)]


def test_ranks(attach: Any) -> None:
    shares = []
    for rank in range(2):
        data = attach(StepData(train=task(), template="task", global_batch_size=12), rank=rank, world_size=2)
        data.setup("fit")
        shares.append(next(iter(data.train_dataloader())).indices)
    assert sorted(shares[0] + shares[1]) == list(range(12))


def test_no_validation_data(attach: Any) -> None:
    data = attach(StepData(train=task(), template="task"))
    data.setup("fit")
    assert data.val_dataloader() == []


def test_validation_without_solutions(attach: Any, tmp_path: Path) -> None:
    spec = write(tmp_path / "v.jsonl", [{"prompt": "1+1=\n", "answer": "2"}])
    data = attach(StepData(train=task(), validation=spec, template="task"))
    data.setup("fit")
    (example,) = data.examples["validation"]
    assert not len(example.token_ids)
    assert len(example.prompt_ids)


def test_a_held_out_row_whose_solution_does_not_fit_still_counts_for_accuracy(attach: Any, tmp_path: Path) -> None:
    path = tmp_path / "validation.jsonl"
    rows = [
        {"id": "short", "prompt": "1+1", "answer": "2", "solution": "#### 2"},
        {"id": "long", "prompt": "1+2", "answer": "3", "solution": "so " * 40 + "#### 3"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = attach(StepData(validation=DataConfig(path=str(path)), template="task", max_length=24))
    data.setup("validate")
    lengths = {example.id: len(example.token_ids) for example in data.examples["validation"]}
    assert lengths["short"] > 0
    assert lengths["long"] == 0


def test_predict_takes_prompts_only(attach: Any) -> None:
    data = attach(StepData(predict=task("test", 3), template="task"))
    data.setup("predict")
    assert [len(e.token_ids) for b in data.predict_dataloader() for e in b.examples] == [0, 0, 0]


def test_test_stage(attach: Any) -> None:
    data = attach(StepData(test=task("test", 3), template="task"))
    data.setup("test")
    assert sum(len(batch.examples) for batch in data.test_dataloader()) == 3


def test_truncation_and_overlap_are_reported(attach: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = "one two three four five six seven eight nine"
    row = {"id": "v1", "prompt": words, "answer": "2", "solution": "a\nb"}
    long = {"prompt": "q", "answer": "2", "solution": "a\n" + "b" * 100}
    train, validation = write(tmp_path / "t.jsonl", [row, long]), write(tmp_path / "v.jsonl", [row])
    data = attach(StepData(train=train, validation=validation, template="task", max_length=60))
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    assert "train: 2 of 2 rows, {'rows_truncated': 1, 'steps_dropped': 1}" in caplog.text
    assert "of 1 validation prompts 1 share all of their 8-word n-grams with training prompts" in caplog.text
    assert "largely seen: v1" in caplog.text


def test_validation_rows_that_share_an_id_count_each(
    attach: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"id": "v", "prompt": prompt, "answer": "2", "solution": "a"} for prompt in ("one two", "three four")]
    train, validation = write(tmp_path / "t.jsonl", rows[:1]), write(tmp_path / "v.jsonl", rows)
    with caplog.at_level(logging.INFO):
        attach(StepData(train=train, validation=validation, template="task", overlap_ngram=2)).setup("fit")
    assert "of 2 validation prompts 1 share all of their 2-word n-grams" in caplog.text
    with pytest.raises(ConfigError, match=r"data\.overlap_ngram=-1: must be 0 or positive"):
        StepData(train=train, overlap_ngram=-1)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_missing_specs(attach: Any, stage: str) -> None:
    name = "validation" if stage == "validate" else stage
    with pytest.raises(ConfigError, match=rf"data.{name} is not set, and `stepkd {stage}` reads it"):
        attach(StepData(train=task())).setup(stage)


def test_missing_training_data(attach: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.train is not set: name a source, for instance data.train.source"):
        attach(StepData(validation=task())).setup("fit")


def test_evaluation_data_is_refused_for_training(attach: Any, data_dir: Path) -> None:
    math = {"source": "math500", "path": str(data_dir / "math500"), "limit": 3}
    with pytest.raises(ConfigError, match=r"'math500' \(split 'test'\) is kept for evaluation"):
        attach(StepData(train=DataConfig(**math))).setup("fit")
    data = attach(StepData(train=DataConfig(**math, allow_evaluation_data=True), template="math", max_length=4000))
    data.setup("fit")
    assert len(data.examples["train"]) == 3
    validation = attach(StepData(train=task(), validation=DataConfig(**math), template="math", max_length=4000))
    validation.setup("fit")
    assert len(validation.examples["validation"]) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1", "answer": "2"}, r"t.jsonl, line 1, column 'solution': missing column 'solution'"),
        ({"prompt": "1", "solution": 3}, r"t.jsonl, line 1, column 'solution': must be text"),
        ({"prompt": "1", "solution": " "}, r"t.jsonl, line 1, column 'solution': must not be empty"),
        ({"id": "x", "prompt": "1" * 100, "solution": "1"}, r"x, column 'prompt': the prompt has 100 tokens"),
    ],
    ids=["missing", "type", "no steps", "long"],
)
def test_bad_training_rows(attach: Any, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    data = attach(StepData(train=write(tmp_path / "t.jsonl", [row]), template="task", max_length=64))
    with pytest.raises(DataError, match=message):
        data.setup("fit")


def test_without_a_trainer() -> None:
    with pytest.raises(RuntimeError, match="needs a trainer whose module has a tokenizer"):
        StepData(train=task()).setup("fit")


def test_steps_cut_elsewhere_are_other_data(attach: Any) -> None:
    prints = set()
    for segmenter in ("newline", "whole", "newline"):
        data = attach(StepData(train=task(), template="task", segmenter=segmenter))
        assert data.fingerprint() is None
        data.setup("fit")
        prints.add(data.fingerprint())
    assert len(prints) == 2


def test_what_a_limit_leaves_out_of_a_file_of_ones_own_is_told(
    attach: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = write(
        tmp_path / "mine.jsonl", [{"prompt": f"{i}+1=", "answer": "2", "solution": "#### 2"} for i in range(9)]
    )
    limited = DataConfig(source="gsm8k", path=spec.path, limit=5, hub="owner/data", split="train")
    attach(StepData(train=limited, validation=spec, template="task")).setup("fit")
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{spec.path} has the columns 'prompt', 'answer', 'solution', so it is read as source 'rows', not 'gsm8k'",
        f"data.train: {spec.path} is read, and hub: owner/data is not",
        f"data.train: 5 rows of {spec.path} are used (limit: 5)",
    ]
