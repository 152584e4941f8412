"""Every method, killed or asked to stop at some points and resumed, ends with the weights of an uninterrupted run.

The points are drawn once, by the method's name. No sample is lost or trained on twice.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
POLICY = {"path": "tiny-0.1m", "init_seed": 7}
TEACHER = {"path": "tiny-0.1m"}
PROBLEMS = {"init_args": {"train": {"options": {"n": 18}}, "validation": None, "global_batch_size": 4}}
REWARDS = [
    {"name": "length", "options": {"limit": 20}},
    {"name": "format", "weight": 0.5, "options": {"pattern": r"\d"}},
]
ROLLOUT = {"group_size": 4, "max_new_tokens": 24, "max_rows": 8}
SHORT = {"samples": 0}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "gkd": ("gkd", {"teacher": TEACHER, "source": {"student": 0.5, "max_new_tokens": 24, "max_rows": 2}}),
    "self_distill": ("self_distill", {"teacher": {"itself": "ema", "decay": 0.5}}),
    "kdrl": ("kdrl", {"teacher": TEACHER, "rollout": ROLLOUT, "rewards": REWARDS, "kd": {"beta": 0.3}}),
    "grpo": ("grpo", {"rollout": ROLLOUT, "rewards": REWARDS, "policy_loss": {"inner_steps": 2}}),
    "prm": ("prm", {}),
    "step_kto": ("step_kto", {}),
    "sft": ("sft", {}),
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Solutions with step labels."""
    from stepkd.tasks import Noise, make_rows

    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with open(path, "w", encoding="utf-8") as stream:
        for row in make_rows("modular:terms=4", 18, seed=0, noise=Noise(rate=0.4)):
            kept = {name: row[name] for name in ("id", "prompt", "answer", "outcome")}
            print(json.dumps(kept | {"completions": row["steps"], "labels": row["step_labels"]}), file=stream)
    return path


class Runs:
    """Runs of one method in folders beside each other."""

    def __init__(self, method: str, folder: Path, labelled: Path) -> None:
        recipe, settings = METHODS[method]
        self.folder = folder
        self.inner = settings.get("policy_loss", {}).get("inner_steps", 1)  # optimiser steps on every batch
        self.recipe = ROOT / "recipes" / "tiny" / f"{recipe}.yaml"
        data: dict[str, Any] = PROBLEMS
        if method == "prm":
            train = {"options": {"n": 18, "noise": {"rate": 0.4}}}
            data = {"init_args": {**PROBLEMS["init_args"], "train": train}}
        if method == "step_kto":
            data = {"init_args": {"train": {"path": str(labelled)}, "validation": None, "global_batch_size": 4}}
        model = {"policy": POLICY, "optimizer": {"lr": 1e-2, "warmup": 0}, **settings}
        if method not in ("prm", "step_kto"):
            model["validation"] = SHORT
        self.overlay: dict[str, Any] = {
            "trainer": {"max_steps": STEPS * self.inner, "val_check_interval": None, "callbacks": []},
            "checkpoint": {"every_n_steps": 2, "monitor": "val/loss", "mode": "min"},
            "model": {"init_args": model},
            "data": data,
        }

    def fit(
        self, name: str, *extra: str, stop_at: str = "", stop_rank: int = 0, ranks: int = 1, **checkpoint: Any
    ) -> subprocess.CompletedProcess[str]:
        overlay = self.folder / f"{name}.yaml"
        stopper = {"class_path": "stopper.Stopper", "init_args": {"out": str(self.folder / f"{name}.batches")}}
        settings = {**self.overlay, "trainer": {**self.overlay["trainer"], "callbacks": [stopper]}}
        overlay.write_text(yaml.safe_dump(settings | {"checkpoint": settings["checkpoint"] | checkpoint}))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        command = [
            sys.executable,
            *launcher,
            "-m",
            "stepkd",
            "fit",
            "--config",
            str(self.recipe),
            "--config",
            str(overlay),
        ]
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        return subprocess.run(
            [*command, "--out", str(self.folder / name), *extra],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "STOP_AT": stop_at,
                "STOP_RANK": str(stop_rank),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            timeout=240,
        )

    def last(self, name: str) -> dict[str, Any]:
        return torch.load(self.folder / name / "checkpoints" / "last.ckpt", weights_only=True)

    def batches(self, name: str) -> list[dict[int, list[str]]]:
        """By rank, problems of the batch that each optimiser step was taken on in the end."""
        files = sorted(self.folder.glob(f"{name}.batches.*"))
        return [dict(map(json.loads, file.read_text().splitlines())) for file in files]


@pytest.fixture
def runs(tmp_path: Path, labelled: Path) -> Callable[[str], Runs]:
    return lambda method: Runs(method, tmp_path, labelled)


def same_state(a: Any, b: Any) -> bool:
    """Nested values alike, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_state(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return bool(a == b)


def assert_alike(runs: Runs, name: str, other: str) -> None:
    a, b = runs.last(name), runs.last(other)
    assert a["global_step"] == b["global_step"] == STEPS * runs.inner
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "stepkd"):
        assert same_state(a[part], b[part]), part
    assert runs.batches(name) == runs.batches(other)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_and_asked_to_stop(method: str, runs: Callable[[str], Runs]) -> None:
    """SIGKILL at one point, SIGTERM at a later one, then to the end: three processes make one run."""
    made = runs(method)
    whole = made.fit("whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    draw = random.Random(method)
    killed_at, stopped_at = (made.inner * draw.choice(steps) for steps in ((1, 2), (3, 4)))
    phases = ["optimizer", "rollout" if method in ("kdrl", "grpo") else "batch_end"]
    draw.shuffle(phases)
    killed = made.fit("parts", stop_at=f"{phases[0]}:{killed_at}:SIGKILL")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    stopped = made.fit("parts", "--resume", stop_at=f"{phases[1]}:{stopped_at}:SIGTERM")
    assert stopped.returncode == 0, stopped.stderr[-3000:]
    assert "asked to stop by SIGTERM" in stopped.stdout
    assert made.last("parts")["global_step"] - stopped_at in (0, made.inner)  # the step under way may end
    done = made.fit("parts", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_alike(made, "parts", "whole")


@pytest.mark.slow
def test_one_rank_is_asked_and_all_stop(runs: Callable[[str], Runs]) -> None:
    """The ranks agree before a batch's first step: none waits for another, and two processes go on from one state."""
    made = runs("kdrl")
    whole = made.fit("whole", ranks=2)
    assert whole.returncode == 0, whole.stderr[-3000:]
    stopped = made.fit("parts", ranks=2, stop_at="rollout:3:SIGTERM", stop_rank=1)
    assert stopped.returncode == 0, stopped.stderr[-3000:]
    assert "asked to stop by a signal to another rank" in stopped.stdout
    assert made.last("parts")["global_step"] == 3
    done = made.fit("parts", "--resume", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_alike(made, "parts", "whole")


def test_sampling_breaks_off(runs: Callable[[str], Runs]) -> None:
    """A request in the middle of a rollout ends it within a token, gives up the batch, and keeps the steps before."""
    made = runs("kdrl")
    made.overlay["model"]["init_args"]["rollout"] = {"group_size": 4, "max_new_tokens": 24, "max_rows": 4}
    stopped = made.fit("run", stop_at="rollout:3:SIGTERM", preempted_exit_code=75)
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    assert "SIGTERM: stopping after this step" in stopped.stderr
    assert "holds the state after 3 steps" in stopped.stdout
    assert made.last("run")["global_step"] == 3
    assert json.loads((made.folder / "run" / "run.json").read_text())["status"] == "stopped"
