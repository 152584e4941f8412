"""A small experiment outside the package, named by a dotted path, and claim files that use it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

CODE = """
from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import numpy as np

from stepkd.claims import ArmResult, Experiment
from stepkd.errors import ConfigError
from stepkd.randomness import generator


@dataclass(frozen=True)
class Settings:
    base: float = 0.5
    problems: int = 30
    kill_at: int | None = None
    sizes: tuple[int, ...] = (1,)
    task: str = "one"

    def __post_init__(self):
        if self.problems < 1:
            raise ConfigError(f"problems={self.problems}: must be at least 1")


@dataclass(frozen=True)
class Arm:
    gain: float = 0.0
    steps: int = 100


def run(unit, report):
    with open(unit.folder / "calls.txt", "a") as file:
        file.write("call\\n")
    settings = unit.settings
    if settings.kill_at == unit.seed and not os.environ.get("SPARE"):
        os.kill(os.getpid(), signal.Signals[os.environ.get("SIGN", "SIGKILL")])
    report("drawing")
    noise = generator(unit.seed, "fake", settings.task).random((settings.problems, 2))
    return [
        ArmResult(
            arm,
            [f"p{i}" for i in range(settings.problems)],
            {
                "right": (noise[:, 0] < settings.base + choice.gain).astype(float).tolist(),
                "share": [[int(x < 0.2), 1] for x in noise[:, 1]],
            },
            facts={"steps": choice.steps},
        )
        for arm, choice in unit.arms.items()
    ]


FREE = Experiment(
    run=run,
    settings=Settings,
    metrics=("right", "share"),
    arms={"plain": {}, "better": {"gain": 0.3}},
    arm_settings=Arm,
    facts=("steps",),
)
FIXED = Experiment(
    run=run, settings=Settings, metrics=lambda s: [f"best@{n}" for n in s.sizes], arms={"a": {}, "b": {}}
)
NEEDS_ARMS = Experiment(run=run, settings=Settings, metrics=("right",), arms={}, arm_settings=Arm)
NOT_ONE = 3
"""

CLAIM: dict[str, Any] = {
    "claim": "The better arm is right more often.",
    "source": "nowhere, 0.8 against 0.5",
    "experiment": "fake_claim_experiment.FREE",
    "seeds": [0, 1, 2, 3, 4],
    "statements": [{"metric": "right", "better": "better", "worse": "plain", "paper": "0.8 against 0.5"}],
    "quick": {"seeds": [0], "settings": {"problems": 5}},
}


@pytest.fixture
def experiment_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder on the import path with the fake experiment."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "fake_claim_experiment.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "fake_claim_experiment", raising=False)
    return folder


@pytest.fixture
def write_claim(tmp_path: Path, experiment_folder: Path) -> Callable[..., Path]:
    """Writes ``fake.yaml``; keyword arguments replace keys, None removes one."""

    def write(**changes: Any) -> Path:
        keys = {key: value for key, value in {**CLAIM, **changes}.items() if value is not None}
        path = tmp_path / "fake.yaml"
        path.write_text(yaml.safe_dump(keys, sort_keys=False))
        return path

    return write
