"""Step labels and their batches: sources, refusals, counts, padding, fingerprints."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stepkd.data.collate import collate
from stepkd.data.config import DataConfig
from stepkd.data.datamodule import StepData
from stepkd.data.encode import LabelRule
from stepkd.errors import ConfigError, DataError
from stepkd.models.spec import Classifier, LabelTokens, PolicyConfig, tiny_tokenizer
from stepkd.modules.prm import PRMModule
from stepkd.modules.sft import SFTModule
from stepkd.steps.format import StepFormat


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def attach(data: StepData, module: Any = None, **head: Any) -> StepData:
    """Give a data module the trainer it needs, with a reward model that is never loaded."""
    kinds = {"label_tokens": LabelTokens, "classifier": Classifier}
    module = module or PRMModule(PolicyConfig(path="tiny-0.1m"), kinds[head.pop("kind", "label_tokens")](**head))
    trainer: Any = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1, limit_train_batches=1.0)
    data.trainer = trainer
    return data


def task(split: str = "train", n: int = 12, **options: Any) -> DataConfig:
    return DataConfig(
        source="task", split=split, options={"task": "modular:terms=3", "n": n, "noise": {"rate": 0.4}, **options}
    )


def write(path: Path, labels: list[list[Any]], **columns: Any) -> DataConfig:
    rows = [
        {"prompt": f"{i}+1=", "completions": [f"{j}" for j in range(len(row))], "labels": row, **columns}
        for i, row in enumerate(labels)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(path))


def made(train: DataConfig, **settings: Any) -> StepData:
    return StepData(train, template="task", max_length=96, overlap_ngram=0, **settings)


def test_tasks_in_batches_of_one_step(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    data = attach(StepData(task(), task("validation", 5), template="task", max_length=96, global_batch_size=4))
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(batch.examples) for batch in batches] == [4, 4, 4]
    assert len(data.examples["validation"]) == 5
    assert "train: 12 of 12 rows, {" in caplog.text
    assert "n-grams" in caplog.text or "overlap" in caplog.text
    for example in data.examples["train"]:
        labels = example.row["step_labels"]
        first = labels.index(False) if False in labels else len(labels) - 1
        assert len(example.spans) == first + 1, "cut behind the first error"
        text = tokenizer.decode(list(example.token_ids))
        steps = [step if step.endswith("\n") else f"{step}\n" for step in example.row["steps"]]
        assert text == "".join(f"{step}~" for step in steps[: first + 1])


def test_files_of_step_labels_and_of_completions(tmp_path: Path, tokenizer: Any) -> None:
    data = attach(made(write(tmp_path / "a.jsonl", [[True, False], [True, None]])))
    data.setup("fit")
    assert [len(example.spans) for example in data.examples["train"]] == [2, 1]
    ids = tokenizer("1\n2", add_special_tokens=False)["input_ids"]
    completion = {
        "problem_id": "p", "prompt": "Q", "completion": "1\n2", "token_ids": ids, "logprobs": [-0.1] * 3,
        "step_ends": [2, 3], "finish": "stop", "correct": True, "model": "m", "sampling": {}, "seed": 0,
        "step_labels": [True, False], "step_values": [0.75, None],
    }  # fmt: skip
    path = tmp_path / "completions.jsonl"
    path.write_text(json.dumps(completion) + "\n" + json.dumps({**completion, "step_values": [0.125, None]}) + "\n")
    for rule, expected in (
        (LabelRule(), [((0.0, 1.0), (1.0, 0.0))] * 2),
        (LabelRule(kind="soft"), [((0.25, 0.75),), ((0.875, 0.125),)]),
    ):
        data = attach(made(DataConfig(path=str(path)), labels=rule))
        data.setup("fit")
        assert [example.targets for example in data.examples["train"]] == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize("label", [True, 1, 0.875, -1])
def test_labels_that_are_all_the_same_are_refused(label: Any, tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", [[label], [label]])
    name = "incorrect" if label == -1 else "correct"
    with pytest.raises(DataError, match=rf"all 2 training labels are the same \({name}\).*allow_one_class"):
        attach(made(spec)).setup("fit")
    data = attach(made(spec, allow_one_class=True))
    data.setup("fit")
    assert len(data.examples["train"]) == 2


def test_soft_labels_that_differ_teach_something_on_either_side_of_a_half(tmp_path: Path) -> None:
    data = attach(made(write(tmp_path / "a.jsonl", [[0.125], [0.375]])))
    data.setup("fit")
    assert len(data.examples["train"]) == 2


def test_held_out_labels_may_agree(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", [[True]])
    data = attach(StepData(task(), spec, template="task", max_length=96, overlap_ngram=0))
    data.setup("fit")
    assert len(data.examples["validation"]) == 1


def test_skips_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = [[True, False], [None] * 80 + [True], [True] * 80]
    data = attach(made(write(tmp_path / "a.jsonl", labels)))
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    assert "train: 2 of 3 rows, {'correct': 26, 'incorrect': 1, 'rows_truncated': 2" in caplog.text
    assert "'rows_truncated': 2, 'rows_truncated_before_a_label': 1, 'steps_dropped': 111}" in caplog.text


def test_three_classes(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", [[1, 0, -1]])
    data = attach(made(spec), kind="classifier", classes=3)
    data.setup("fit")
    example: Any = data.examples["train"][0]
    assert example.targets == ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("labels", "head", "rule", "message"),
    [
        ([[None, None]], {}, {}, "zero labelled steps"),
        ([[0.5, 1.0]], {"kind": "classifier", "classes": 3}, {}, "soft labels for 3 classes"),
        ([[True, False]], {}, {"kind": "rating"}, "labels.kind asks for 'rating'"),
        ([[True, False]], {"meaning": "outcome"}, {"scope": "outcome"}, "is correct: give rows with a boolean"),
    ],
)
def test_rows_that_cannot_be_trained_on(
    labels: list[list[Any]], head: dict[str, Any], rule: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        attach(made(write(tmp_path / "a.jsonl", labels), labels=LabelRule(**rule)), **head).setup("fit")


def test_labels_and_steps_of_different_length_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "Q", "completions": ["1", "2"], "labels": [True]}) + "\n")
    with pytest.raises(DataError, match="has 1 entries for 2 completions") as caught:
        attach(made(DataConfig(path=str(path)))).setup("fit")
    assert (caught.value.path, caught.value.line) == (str(path), 1)


def test_what_an_encoder_refuses_names_the_split_and_the_file(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", [[0.5, 1.0]], id="row-7")
    with pytest.raises(
        DataError, match=r"data\.train \(.*a\.jsonl\): row-7, column 'labels': labels are of kind 'soft'"
    ):
        attach(made(spec, labels=LabelRule(kind="bool"))).setup("fit")


@pytest.mark.parametrize(("scope", "meaning"), [("outcome", "correctness"), ("steps", "outcome")])
def test_an_outcome_model_says_so_in_both_places(scope: Any, meaning: str) -> None:
    """The meaning decides how scores are reduced, so a head that says the wrong thing is silently misused later."""
    with pytest.raises(ConfigError, match=f"data.labels.scope is '{scope}' and model.head.meaning is '{meaning}'"):
        attach(made(task(), labels=LabelRule(scope=scope)), meaning=meaning).setup("fit")
    attach(made(task(), labels=LabelRule(scope="outcome")), meaning="outcome").setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": LabelRule()}, r"data\.labels is set, and SFTModule reads no labels: leave it out"),
        ({"allow_one_class": True}, r"data\.allow_one_class is set, and SFTModule reads no labels"),
    ],
)
def test_methods_without_labels_take_no_settings_of_labels(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attach(made(task(), **settings), SFTModule(PolicyConfig(path="tiny-0.1m"))).setup("fit")


def test_a_marker_that_is_not_one_token() -> None:
    with pytest.raises(ConfigError, match=r"step marker 'END' is 3 tokens \['E', 'N', 'D'\] in this tokenizer"):
        attach(made(task()), format=StepFormat(marker="END")).setup("fit")


def test_evaluation_data_is_refused_for_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kept for evaluation"):
        attach(made(DataConfig(source="processbench", path=str(tmp_path)))).setup("fit")


def test_changed_labels_are_other_data(tmp_path: Path) -> None:
    prints = set()
    for number, labels in enumerate([[True, False], [True, True], [None, True]]):
        for neutral in ("correct", "incorrect"):  # a rule that changes nothing here
            data = attach(made(write(tmp_path / "x.jsonl", [labels, [False]]), labels=LabelRule(neutral=neutral)))  # type: ignore[arg-type]
            assert data.fingerprint() is None
            data.setup("fit")
            prints.add(data.fingerprint())
        assert len(prints) == number + 1
    assert None not in prints


# ---- micro-batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pad_to", [None, 150])
def test_read_positions_follow_the_padding(side: Any, pad_to: int | None, tokenizer: Any) -> None:
    data = attach(made(task(n=8), labels=LabelRule(after_error="keep")))
    data.setup("fit")
    examples: Any = data.examples["train"]
    batch = collate(examples, 0, padding_side=side, pad_to=pad_to)
    assert batch.input_ids_BT.shape[1] == max(pad_to or 0, *(example.length for example in examples))
    assert (batch.input_ids_BT.flatten()[batch.read_L] == tokenizer.convert_tokens_to_ids("~")).all()
    assert batch.attention_mask_BT.flatten()[batch.read_L].all()
    assert len(set(batch.read_L.tolist())) == len(batch.read_L) == sum(len(example.spans) for example in examples)
    labels = [label for example in examples for label in example.row["step_labels"]]
    assert batch.targets_LC[:, 1].tolist() == [float(label) for label in labels]
    assert batch.targets_LC.dtype == torch.float64


def test_correct_tokens_are_those_of_steps_whose_own_or_next_label_is_correct(tmp_path: Path) -> None:
    labels = [[True, None, False], [None, True, None], [0.75, 0.25]]
    data = attach(made(write(tmp_path / "a.jsonl", labels), labels=LabelRule(after_error="keep")))
    data.setup("fit")
    expected = [[True, False, False], [True, True], [True, False]]  # what is behind the last label is cut off
    for side in ("right", "left"):
        batch = collate(data.examples["train"], 0, padding_side=side)  # type: ignore[arg-type]
        assert batch.correct_N.tolist() == [
            correct for row in expected for correct in row for _ in ("digit", "newline", "~")
        ]
        assert len(batch.correct_N) == len(batch.targets_N)
    spec = write(tmp_path / "b.jsonl", [[1, 0, -1]])
    three = attach(made(spec, labels=LabelRule(after_error="keep")), kind="classifier", classes=3)
    three.setup("fit")
    assert collate(three.examples["train"], 0).correct_N.tolist() == [True] * 6 + [False] * 3  # neutral is correct


def test_soft_targets_are_exact_and_unlabelled_steps_are_not_read(tmp_path: Path) -> None:
    data = attach(made(write(tmp_path / "a.jsonl", [[0.1, None, 0.7], [0.3]])))
    data.setup("fit")
    batch = collate(data.examples["train"], 0)
    assert batch.targets_LC.tolist() == [[0.9, 0.1], [1 - 0.7, 0.7], [0.7, 0.3]]
    moved = batch.to(torch.device("meta"))
    assert {moved.read_L.device.type, moved.targets_LC.device.type} == {"meta"}  # type: ignore[attr-defined]
