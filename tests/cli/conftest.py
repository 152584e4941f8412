"""Small runs of every method through the command line, under any launcher and strategy."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import forked
import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
POLICY = {"path": "tiny-0.1m", "init_seed": 7}
TEACHER = {"class_path": "Local", "init_args": {"path": "tiny-0.1m"}}
PROBLEMS = {"init_args": {"train": {"options": {"n": 18}}, "validation": None, "global_batch_size": 4}}
REWARDS = [
    {"name": "length", "options": {"limit": 20}},
    {"name": "format", "weight": 0.5, "options": {"pattern": r"\d"}},
]
ROLLOUT = {"sampling": {"n": 4, "max_new_tokens": 24}}
KD = {"class_path": "SampledKL", "init_args": {"beta": 0.3}}
SOURCE = {"lmbda": 0.5, "sampling": {"max_new_tokens": 24}}


def rows(number: int) -> dict[str, Any]:
    """An engine that decodes so many completions at once."""
    return {"class_path": "Transformers", "init_args": {"max_rows": number}}


SHORT = {"sampling": None}
ACCELERATE = [
    *("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/cluster/accelerate_8gpu.yaml")),
    *("--num_processes", "{ranks}"),
]
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "{ranks}"],
    "accelerate": [*ACCELERATE, "--mixed_precision", "no"],
    "accelerate-bf16": ACCELERATE,
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "gkd": ("gkd", {"teacher": TEACHER, "source": SOURCE, "engine": rows(2)}),
    "self_distill": ("self_distill", {"teacher": {"class_path": "SelfAverage", "init_args": {"decay": 0.5}}}),
    "kdrl": ("kdrl", {"teacher": TEACHER, "rollout": ROLLOUT, "engine": rows(8), "rewards": REWARDS, "kd": KD}),
    "grpo": ("grpo", {"rollout": ROLLOUT, "engine": rows(8), "rewards": REWARDS, "policy_loss": {"num_iterations": 2}}),
    "prm": ("prm", {}),
    "step_kto": ("step_kto", {}),
    "sft": ("sft", {}),
}


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Solutions with step labels."""
    from stepkd.tasks.rows import Noise, make_rows

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
        self.inner = settings.get("policy_loss", {}).get("num_iterations", 1)  # optimiser steps on every batch
        self.steps = STEPS * self.inner
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
            "trainer": {"max_steps": self.steps, "val_check_interval": None, "callbacks": []},
            "checkpoint": {"every_n_steps": 2, "monitor": "val/loss", "mode": "min"},
            "model": {"init_args": model},
            "data": data,
        }

    def fit(
        self,
        name: str,
        *extra: str,
        stop_at: str = "",
        stop_rank: int = 0,
        ranks: int = 1,
        launcher: Literal["torchrun", "accelerate", "accelerate-bf16"] | None = None,
        strategy: str | None = None,
        **checkpoint: Any,
    ) -> subprocess.CompletedProcess[str]:
        """``stepkd fit`` in ``name``, on one process or several; a strategy is a recipe's name.

        Without a launcher the ranks are forked, with torchrun's variables.
        """
        overlay = self.folder / f"{name}.yaml"
        self.write_overlay(name, overlay, **checkpoint)
        configs = [self.recipe, overlay]
        if strategy is not None:
            configs.append(ROOT / "recipes" / "strategy" / f"{strategy}.yaml")
        words = ["fit", *(part for config in configs for part in ("--config", str(config)))]
        words += ["--out", str(self.folder / name), *extra]
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {"PYTHONPATH": os.pathsep.join(paths), "STOP_AT": stop_at, "STOP_RANK": str(stop_rank)}
        if launcher is None:
            return forked.run(words, ranks=ranks, **variables)
        command = [sys.executable, *(part.format(ranks=ranks) for part in LAUNCHERS[launcher]), "-m", "stepkd", *words]
        environ = {**os.environ, **variables, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240)

    def whole(self, **ways: Any) -> str:
        """The name of a run to the end, on one process or several, that is made once."""
        name = "-".join(["whole", *(str(ways[each]) for each in sorted(ways))])
        if not (self.folder / name).exists():
            done = self.fit(name, **ways)
            assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
        return name

    def write_overlay(self, name: str, file: Path, **checkpoint: Any) -> None:
        """The settings of a run, with the callback that records and stops it."""
        stopper = {"class_path": "stopper.Stopper", "init_args": {"out": str(self.folder / name)}}
        settings = {**self.overlay, "trainer": {**self.overlay["trainer"], "callbacks": [stopper]}}
        file.write_text(yaml.safe_dump(settings | {"checkpoint": settings["checkpoint"] | checkpoint}))

    def last(self, name: str) -> dict[str, Any]:
        return torch.load(self.folder / name / "checkpoints" / "last.ckpt", weights_only=True)

    def batches(self, name: str) -> list[dict[int, list[str]]]:
        """By rank, problems of the batch that each optimiser step was taken on in the end."""
        files = sorted(self.folder.glob(f"{name}.batches.*"))
        return [dict(map(json.loads, file.read_text().splitlines())) for file in files]


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory, labelled: Path) -> Callable[[str], Runs]:
    """Runs of a method that tests share, save for the names of those which they stop or change."""
    return functools.cache(lambda method: Runs(method, tmp_path_factory.mktemp(method), labelled))


@pytest.fixture
def runs(tmp_path: Path, labelled: Path) -> Callable[[str], Runs]:
    return lambda method: Runs(method, tmp_path, labelled)
