"""Two processes under a launcher train as one does: the same samples, the same losses, for every kind of method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stepkd.launch.logger import read_metrics

METHODS = ["sft", "prm", "step_kto", "gkd", "kdrl"]
WAYS = [("torchrun", "ddp"), ("accelerate", "fsdp2")]


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(folder) if "train/loss" in row]


def tokens(made: Any, name: str) -> dict[int, list[Any]]:
    """The completions that every step was taken on, of all ranks."""
    found: dict[int, list[Any]] = {}
    for file in sorted(made.folder.glob(f"{name}.tokens.*")):
        for step, rows in map(json.loads, file.read_text().splitlines()):
            found.setdefault(step, []).extend(rows)
    return {step: sorted(rows) for step, rows in found.items()}


def assert_same_training(made: Any, name: str, other: str) -> None:
    assert tokens(made, name) == tokens(made, other)
    assert losses(made.folder / name) == pytest.approx(losses(made.folder / other), rel=1e-5)
    ours, theirs = (made.last(each) for each in (name, other))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for key, value in ours["state_dict"].items():
        assert torch.allclose(value, theirs["state_dict"][key], rtol=1e-3, atol=2e-5), key


def assert_done(done: Any) -> None:
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one(method: str, runs: Callable[[str], Any]) -> None:
    made = runs(method)
    assert_done(made.fit("one"))
    assert len(losses(made.folder / "one")) == 6
    for launcher, strategy in WAYS:
        assert_done(made.fit(strategy, ranks=2, launcher=launcher, strategy=strategy))
        assert_same_training(made, strategy, "one")
