"""Feedback and pairs: which rows are read, what is refused and reported, prompts that stay together."""

from __future__ import annotations

import json
import logging
from itertools import groupby, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stepkd.data.batching import Position
from stepkd.data.config import DataConfig
from stepkd.data.datamodule import StepData
from stepkd.data.encode import LabelRule
from stepkd.data.feedback import feedback_counts
from stepkd.errors import ConfigError, DataError
from stepkd.models.spec import PolicyConfig, tiny_tokenizer
from stepkd.modules.dpo import DPOModule
from stepkd.modules.kto import KTOModule, StepKTOModule

TINY = PolicyConfig(path="tiny-0.1m")
TOKENIZER = tiny_tokenizer()


class Pairs(StepData):
    """Marks data whose rows are pairs, for :func:`attach`."""


def attach(data: Any, module: Any = None, *, rank: int = 0, world_size: int = 1) -> Any:
    """Give a data module the trainer it needs, with a model that is never loaded."""
    module = module or (DPOModule(TINY) if isinstance(data, Pairs) else KTOModule(TINY))
    trainer: Any = SimpleNamespace(
        lightning_module=module, global_rank=rank, world_size=world_size, limit_train_batches=1.0
    )
    data.trainer = trainer
    return data


def write(path: Path, rows: list[dict[str, Any]]) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(path))


def unpaired(labels: list[bool], prompts: list[str] | None = None) -> list[dict[str, Any]]:
    prompts = prompts or [f"Q{i}" for i in range(len(labels))]
    return [
        {"prompt": prompt, "completion": f"{'x' * (i % 5)}\n{i}", "label": label}
        for i, (prompt, label) in enumerate(zip(prompts, labels, strict=True))
    ]


def stepwise(labels: list[list[Any]], **columns: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Q{i}", "completions": [f"{j}" for j in range(len(row))], "labels": row, **columns}
        for i, row in enumerate(labels)
    ]


def completions(correct: list[bool | None], labels: list[bool | None] | None = None) -> list[dict[str, Any]]:
    ids = [*TOKENIZER("1\n2")["input_ids"], TOKENIZER.eos_token_id]
    return [
        {
            "problem_id": f"p{i}", "prompt": f"Q{i}", "completion": "1\n2", "token_ids": ids, "logprobs": [-0.1] * 4,
            "step_ends": [2, 4], "finish": "stop", "correct": each, "model": "m", "sampling": {}, "seed": 0,
            **({"step_labels": labels} if labels else {}),
        }
        for i, each in enumerate(correct)
    ]  # fmt: skip


def pairs(n: int = 3, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"Q{i // 2}", "chosen": f"{i}\n", "rejected": f"{i}{i}", **columns} for i in range(n)]


def feedback(train: DataConfig, **settings: Any) -> StepData:
    return StepData(train, template="plain", max_length=64, **settings)


def paired(train: DataConfig, **settings: Any) -> StepData:
    return Pairs(train, template="plain", max_length=64, **settings)


# ---- feedback -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (unpaired([True, False, True]), [(1, (-1,)), (0, (-1, -1)), (1, (-1, -1))]),
        (stepwise([[True, False], [True, True]]), [(-1, (1, 0)), (-1, (1, 1))]),
        (stepwise([[True, False], [True, True]], outcome=False), [(0, (1, 0)), (0, (1, 1))]),
        (completions([True, False], [True, False]), [(1, (1, 0)), (0, (1, 0))]),
    ],
    ids=["unpaired", "stepwise", "stepwise with outcome", "completions"],
)
def test_kinds_of_rows(rows: list[dict[str, Any]], found: list[tuple[int, tuple[int, ...]]], tmp_path: Path) -> None:
    steps = any(label >= 0 for _, labels in found for label in labels)
    data = attach(
        feedback(write(tmp_path / "a.jsonl", rows), allow_one_class=True), StepKTOModule(TINY) if steps else None
    )
    data.setup("fit")
    assert [(example.outcome, example.step_labels) for example in data.examples["train"]] == found


def test_counts_of_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*completions([True, True, False], [True, False]), *completions([None], [True, None]), *completions([None])]
    data = attach(feedback(write(tmp_path / "a.jsonl", rows)))
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    expected = {
        "correct_outcomes": 2,
        "incorrect_outcomes": 1,
        "correct_steps": 4,
        "incorrect_steps": 3,
        "correct_with_incorrect_step": 2,
    }
    assert feedback_counts(data.examples["train"]) == expected
    assert f"train: 4 of 5 rows, {str(expected)[:-1]}" in caplog.text
    assert "'rows_without_feedback': 1, 'rows_without_outcome': 1" in caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (unpaired([True, True]), "all 2 labelled outcomes are correct: nothing contrasts"),
        (unpaired([False]), "all 1 labelled outcomes are incorrect"),
        (stepwise([[True, True]]), "all 2 labelled steps are correct"),
        (completions([True, False], [False, False]), "all 4 labelled steps are incorrect"),
    ],
    ids=["correct", "incorrect", "steps correct", "steps incorrect"],
)
def test_one_class_is_refused_unless_allowed(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", rows)
    module = StepKTOModule(TINY) if "steps" in message else None  # KTO does not look at steps
    with pytest.raises(DataError, match=f"{message}.*allow_one_class"):
        attach(feedback(spec), module).setup("fit")
    data = attach(feedback(spec, allow_one_class=True), module)
    data.setup("fit")
    assert len(data.examples["train"]) == len(rows)


def test_held_out_rows_may_be_of_one_class(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", unpaired([True, False]))
    data = attach(feedback(train, validation=write(tmp_path / "b.jsonl", unpaired([True]))))
    data.setup("fit")
    assert len(data.examples["validation"]) == 1
    assert feedback_counts(data.examples["train"])["correct_outcomes"] == 1, (
        "class weights are those of the training data"
    )


def test_the_label_rule_is_used(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", stepwise([[1, 0, -1, 1]], outcome=False) + stepwise([[1]], outcome=True))
    for rule, expected in (
        (None, (1, 1, 0, 1)),
        (LabelRule(after_error="keep", neutral="mask"), (1, -1, 0, 1)),
        (LabelRule(after_error="truncate", neutral="incorrect"), (1, 0)),
    ):
        data = attach(feedback(spec, labels=rule))
        data.setup("fit")
        assert data.examples["train"][0].step_labels == expected


def test_no_feedback_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row has feedback .*'rows_without_feedback': 2"):
        attach(feedback(write(tmp_path / "a.jsonl", completions([None, None])))).setup("fit")


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_pairs_of_solutions_and_of_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for prefix, counts in (
        ({}, "'with_visits': 1"),
        ({"prefix": ["a\n"]}, "'with_prefix': 4, 'with_visits': 1"),
        ({"prefix": []}, "'with_visits': 1"),
    ):
        rows = [*pairs(3, **prefix), *pairs(1, **prefix, chosen_visits=3, rejected_visits=1)]
        rows.append({"prompt": "Q", "chosen": "1", "rejected": "2" * 90, **prefix})
        data = attach(paired(write(tmp_path / "a.jsonl", rows)))
        with caplog.at_level(logging.INFO):
            data.setup("fit")
        assert f"train: 4 of 5 rows, {{{counts}, 'pairs_too_long': 1}}" in caplog.text
        assert [example.visits for example in data.examples["train"]] == [None, None, None, (3, 1)]
        end = TOKENIZER.eos_token_id
        ends = {ids[-1] == end for e in data.examples["train"] for ids in (e.token_ids, e.rejected.token_ids)}
        assert ends == {"prefix" not in prefix}


def test_no_pair_is_left(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "chosen": "é", "rejected": "è"}]
    with pytest.raises(DataError, match=r"no pair is left \({'pairs_with_equal_sides': 1}\)"):
        attach(paired(write(tmp_path / "a.jsonl", rows))).setup("fit")


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "rows", "message"),
    [
        (
            feedback,
            pairs(),
            "KTOModule learns from rows of the kinds completion, stepwise, unpaired, and these are of",
        ),
        (paired, unpaired([True]), "DPOModule learns from rows .* preference, step_preference, .* kind 'unpaired'"),
        (paired, [{"prompt": "Q", "answer": "1"}], "kind 'problem': label or convert them first"),
    ],
    ids=["pairs for feedback", "feedback for pairs", "problems"],
)
def test_rows_of_another_kind(made: Any, rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(DataError, match=message) as caught:
        attach(made(write(path, rows))).setup("fit")
    assert caught.value.path == str(path)


@pytest.mark.parametrize("settings", [{"labels": LabelRule()}, {"allow_one_class": True}], ids=str)
def test_pairs_take_no_settings_of_labels(settings: dict[str, Any], tmp_path: Path) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=rf"data\.{name} is set, and DPOModule reads no labels: leave it out"):
        attach(paired(write(tmp_path / "a.jsonl", pairs()), **settings)).setup("fit")


@pytest.mark.parametrize(
    ("module", "rows", "message"),
    [
        (StepKTOModule, unpaired([True, False]), "no row has labelled steps, .* or use KTO, which needs none"),
        (KTOModule, stepwise([[True, False]]), "no row has labelled outcomes, and the method learns from them"),
    ],
)
def test_rows_without_what_the_method_learns_from(module: Any, rows: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        attach(feedback(write(tmp_path / "a.jsonl", rows), allow_one_class=True), module(TINY)).setup("fit")


def test_a_trainer_is_needed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="StepData needs a trainer whose module has a tokenizer: attach it"):
        paired(write(tmp_path / "a.jsonl", pairs())).setup("fit")


def test_evaluation_data_is_refused_for_training(tmp_path: Path) -> None:
    for data in (feedback, paired):
        with pytest.raises(ConfigError, match="kept for evaluation"):
            attach(data(DataConfig(source="processbench", path=str(tmp_path)))).setup("fit")


# ---- prompts that stay together -------------------------------------------------------------------------------------


def batches_of(data: Any) -> list[Any]:
    data.setup("fit")
    return list(data.train_dataloader())


@pytest.mark.parametrize("kind", ["feedback", "pairs"])
def test_completions_of_one_prompt_stay_together(kind: str, tmp_path: Path) -> None:
    """Shuffled as prompts, they come one after the other, in every epoch in another order."""
    prompts = [f"Q{i % 6}" for i in range(24)]
    if kind == "feedback":
        spec = write(tmp_path / "a.jsonl", unpaired([i % 3 == 0 for i in range(24)], prompts))
        made: Any = feedback
    else:
        rows = [{"prompt": p, "chosen": f"{i}", "rejected": f"{i}x"} for i, p in enumerate(prompts)]
        spec, made = write(tmp_path / "a.jsonl", rows), paired
    apart = [tuple(e.prompt_ids) for b in batches_of(attach(made(spec, global_batch_size=8))) for e in b.peers]
    assert len(list(groupby(apart))) > 12
    data = attach(made(spec, global_batch_size=8, keep_prompts_together=True))
    batches = batches_of(data)
    together = [tuple(example.prompt_ids) for batch in batches for example in batch.peers]
    assert len(list(groupby(together))) == 6
    assert sorted(i for batch in batches for i in batch.indices) == list(range(24))
    data.trainer.lightning_module.position = Position(1)
    other = [tuple(example.prompt_ids) for batch in data.train_dataloader() for example in batch.peers]
    assert len(list(groupby(other))) == 6
    assert other != together


def test_ranks_share_whole_prompts(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", unpaired([i % 2 == 0 for i in range(24)], [f"Q{i % 6}" for i in range(24)]))
    shares = [
        batches_of(attach(feedback(spec, global_batch_size=24, keep_prompts_together=True), rank=rank, world_size=3))
        for rank in range(3)
    ]
    seen = [{tuple(example.prompt_ids) for example in batches[0].examples} for batches in shares]
    assert [len(prompts) for prompts in seen] == [2, 2, 2]
    assert len(set().union(*seen)) == 6
    peers = [[each.key for each in batches[0].peers] for batches in shares]
    assert peers[0] == peers[1] == peers[2]
    assert sorted(place for batches in shares for place in batches[0].places) == list(range(24))


def test_held_out_batches_keep_the_files_order(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", unpaired([i % 3 == 0 for i in range(9)], [f"Q{i % 2}" for i in range(9)]))
    data = attach(feedback(spec, validation=spec, global_batch_size=4, keep_prompts_together=True))
    data.setup("fit")
    rows = [example.row["completion"] for batch in data.val_dataloader() for example in batch.peers]
    assert rows == [row["completion"] for row in unpaired([True] * 9)]


# ---- fingerprints ---------------------------------------------------------------------------------------------------


def test_whatever_changes_a_batch_changes_the_fingerprint(tmp_path: Path) -> None:
    def of(made: Any, rows: list[dict[str, Any]], **settings: Any) -> str:
        data = attach(made(write(tmp_path / "x.jsonl", rows), **settings))
        data.setup("fit")
        found = data.fingerprint()
        assert found is not None
        return str(found)

    kinds: list[tuple[Any, list[list[dict[str, Any]]]]] = [
        (feedback, [unpaired([True, False]), unpaired([False, True]), stepwise([[True, False]], outcome=True)]),
        (feedback, [stepwise([[True, False]], outcome=True), stepwise([[False, True]], outcome=True)]),
        (paired, [pairs(), [row | {"rejected": "z"} for row in pairs()]]),
        (paired, [pairs(), pairs(chosen_visits=2, rejected_visits=1), pairs(chosen_visits=1, rejected_visits=1)]),
        (paired, [pairs(prefix=["a\n"]), pairs(prefix=["b\n"]), pairs(prefix=[])]),
    ]
    for made, variants in kinds:
        one_class = {"allow_one_class": True} if made is feedback else {}
        prints = [of(made, rows, **one_class) for rows in variants]
        prints.append(of(made, variants[0], keep_prompts_together=True, **one_class))
        assert all(a != b for a, b in pairwise(sorted(prints)))
        assert of(made, variants[0], **one_class) == prints[0]
