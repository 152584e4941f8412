"""Which settings a resumed run takes as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepkd.errors import ConfigError
from stepkd.runs.rundir import check_changes, newest_config, recipe_settings

THEN = {
    "seed_everything": 0,
    "trainer": {"max_steps": 6, "devices": 1, "logger": None, "precision": None},
    "checkpoint": {"every_n_steps": 100, "monitor": "val/loss"},
    "model": {
        "class_path": "stepkd.modules.GKDModule",
        "init_args": {
            "seed": 0,
            "policy": {"path": "a", "lora": None, "gradient_checkpointing": False},
            "source": {"lmbda": 0.5},
            "engine": {"class_path": "Transformers", "init_args": {"max_rows": 64}},
            "loss_weights": None,
            "micro_batch_tokens": 8192,
            "rewards": [{"name": "length", "options": {"limit": 20}}],
        },
    },
    "data": {"class_path": "stepkd.data.StepData", "init_args": {"seed": 0, "train": {"options": {}}, "test": None}},
}


def changed(dotted: str, value: Any) -> dict[str, Any]:
    """The settings with one of them changed."""
    import copy

    settings = copy.deepcopy(THEN)
    *path, name = dotted.split(".")
    place: Any = settings
    for key in path:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[name] = value
    return settings


def compare(dotted: str, value: Any, *named: str) -> list[str]:
    return check_changes(recipe_settings(THEN), recipe_settings(changed(dotted, value)), named, "runs/x")


@pytest.mark.parametrize(
    ("dotted", "value", "line"),
    [
        ("trainer.max_steps", 9, "trainer.max_steps: 6 then, 9 now"),
        ("trainer.devices", 8, "trainer.devices: 1 then, 8 now"),
        ("trainer.logger", {"class_path": "CSVLogger"}, "trainer.logger.class_path: not set then, 'CSVLogger' now"),
        ("checkpoint.every_n_steps", 5, "checkpoint.every_n_steps: 100 then, 5 now"),
        ("model.init_args.micro_batch_tokens", 99, "micro_batch_tokens: 8192 then, 99 now"),
        ("model.init_args.engine.init_args.max_rows", 8, "engine.max_rows: 64 then, 8 now"),
        ("model.init_args.engine.init_args.completions", 8, "engine.completions: not set then, 8 now"),
        ("model.init_args.policy.gradient_checkpointing", True, "policy.gradient_checkpointing: False then, True now"),
        ("data.init_args.test", {"path": "x"}, "data.test.path: not set then, 'x' now"),
    ],
)
def test_length_logging_and_hardware_are_applied_and_said(dotted: str, value: Any, line: str) -> None:
    assert compare(dotted, value) == [line]


@pytest.mark.parametrize(
    ("dotted", "value", "name"),
    [
        ("seed_everything", 1, "seed"),
        ("trainer.precision", "bf16-mixed", "trainer.precision"),
        ("trainer.limit_train_batches", 2, "trainer.limit_train_batches"),
        ("checkpoint.monitor", "val/accuracy", "checkpoint.monitor"),
        ("model.class_path", "stepkd.modules.SFTModule", "model.class_path"),
        ("model.init_args.policy.lora", {"r": 4}, "policy.lora.r"),
        ("model.init_args.source.lmbda", 1.0, "source.lmbda"),
        ("model.init_args.loss_weights", {"kd": 2.0}, "loss_weights.kd"),
        ("model.init_args.rewards.0.options.limit", 21, "rewards.0.options.limit"),
        ("data.init_args.train.options", {"n": 3}, "data.train.options.n"),
    ],
)
def test_what_decides_the_weights_is_refused_unless_named(dotted: str, value: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)runs/x cannot be resumed.*--resume_with {name}\b"):
        compare(dotted, value)
    assert compare(dotted, value, name) == compare(dotted, value, name.partition(".")[0])


def test_what_is_the_same_is_not_said() -> None:
    assert compare("trainer.precision", "32-true") == [], "the default by its name"
    assert compare("model.init_args.new_in_this_version", None) == []
    assert compare("model.init_args.source.lmbda", 0.5) == []


def test_the_newest_settings_are_compared(tmp_path: Path) -> None:
    assert newest_config(tmp_path) is None
    for name in ("config.yaml", "config-2.yaml", "config-10.yaml", "config-old.yaml"):
        (tmp_path / name).touch()
    assert newest_config(tmp_path) == tmp_path / "config-10.yaml"
