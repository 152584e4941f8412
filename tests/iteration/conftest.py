"""A tiny student that solves some problems, and the settings of a small iterated training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

TASK = 'task:task="modular:terms=3,modulus=3"'


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 0.1M parameters that writes well-formed solutions, about a third of them correct."""
    from stepkd.models.checkpoint import export_model
    from stepkd.training.fit import fit

    folder = tmp_path_factory.mktemp("student")
    options = {"task": "modular:terms=3,modulus=3", "n": 170, "seed": 0, "noise": {"rate": 0.2, "recover": 0.5}}
    settings: dict[str, Any] = {
        "trainer": {"max_steps": 80, "val_check_interval": None, "enable_progress_bar": False},
        "model": {"init_args": {"policy": {"path": "tiny-0.1m"}, "optimizer": {"lr": 1e-2, "warmup": 0.05}}},
        "data": {"init_args": {"train": {"source": "task", "options": options}, "validation": None}},
    }
    return export_model(fit(["tiny/sft"], settings, out=folder / "run").folder, folder / "model")


def _small(model: str | Path = "tiny-0.1m", **changes: Any) -> dict[str, Any]:
    """Settings of rejection-sampling fine-tuning in the tiny world, three steps per iteration."""
    settings: dict[str, Any] = {
        "model": str(model),
        "problems": f"{TASK},n=16",
        "iterations": 2,
        "label": {"labeller": "TaskChecker", "sampling": {"n": 4, "max_new_tokens": 24}, "device": "cpu"},
        "convert": "Demonstrations",
        "train": {
            "recipes": ["recipes/tiny/sft.yaml"],
            "overrides": {
                "trainer.max_steps": 3,
                "trainer.val_check_interval": None,
                "data.init_args.validation": None,
                "data.init_args.global_batch_size": 8,
            },
        },
        "evaluation": {"problems": f"{TASK},n=6,split=test", "sampling": {"n": 4}},
    }
    return settings | changes


@pytest.fixture(scope="session")
def small() -> Any:
    """Settings of a small run, with changes."""
    return _small


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes settings into a file."""

    def write_file(settings: Any) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings), encoding="utf-8")
        return path

    return write_file
