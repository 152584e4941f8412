"""Fitting as a function: what ``stepkd fit`` does, without a command line."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from stepkd.errors import ConfigError
from stepkd.runs.process import Preempted
from stepkd.training.fit import FitResult, StepkdCLI, check_fit, fit, run, validate

RECIPES = ["tiny/sft"]


def settings(**trainer: Any) -> dict[str, Any]:
    return {
        "trainer": {"max_steps": 2, "check_val_every_n_epoch": 1, "val_check_interval": None, **trainer},
        "checkpoint": {"monitor": "val/loss", "mode": "min"},
        "model": {
            "init_args": {
                "policy": {"path": "tiny-0.1m"},
                "optimizer": {"warmup": 0, "schedule": "constant"},
                "validation": {"sampling": None},
            }
        },
        "data": {
            "init_args": {
                "train": {"options": {"n": 8}},
                "validation": {"options": {"n": 4}},
                "global_batch_size": 4,
            }
        },
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])


def test_the_function_trains_as_the_command_does(tmp_path: Path) -> None:
    assert fit(RECIPES, settings(), out=tmp_path / "a") == FitResult(tmp_path / "a", "finished", 2)
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(settings()))
    words = ["fit", "--config", *RECIPES, "--config", str(tmp_path / "overlay.yaml"), "--out", str(tmp_path / "b")]
    assert run(words) == 0
    found, expected = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_fit_is_resumed_when_it_is_told_to(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    fit(RECIPES, settings(), out=tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) is before, "a signal after the training is not for the training"
    with pytest.raises(ConfigError, match="already holds a run"):
        fit(RECIPES, settings(max_steps=3), out=tmp_path / "run")
    assert fit(RECIPES, settings(max_steps=3), out=tmp_path / "run", resume=True).steps == 3
    assert fit(RECIPES, settings(), out=tmp_path / "run", overwrite=True).steps == 2


def test_dotted_names_reach_every_setting() -> None:
    dotted = {"data.init_args.train.options.n": 7, "trainer": {"max_steps": 2}, "trainer.max_epochs": 3}
    found = check_fit(["tiny/sft"], dotted)
    assert found.data.specs["train"].options["n"] == 7
    assert (found.trainer["max_steps"], found.trainer["max_epochs"]) == (2, 3)


def test_functions_print_progress_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = settings(enable_progress_bar=False)
    fit(RECIPES, quiet, out=tmp_path / "run")
    found = validate(RECIPES, quiet)
    assert found["val/loss"] > 0
    assert capsys.readouterr().out == ""


def test_checking_builds_module_and_data_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = check_fit(RECIPES, settings(), words=["--seed_everything", "3"])
    assert type(found.module).__name__ == "SFTModule"
    assert found.module.seed == found.data.seed == 3
    assert found.module.policy is None
    assert found.trainer["max_steps"] == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"init_args": {"optimizer": {"learning_rate": 1}}}}, r"^'learning_rate' is not .*'lr'"),
        ({"model": {"init_args": {"optimizer": {"lr": -1}}}}, "optimizer.lr=-1.*: must be positive"),
        ({"model.init_args.optimizer.learning_rate": 1}, r"^'learning_rate' is not .*'lr'"),
        ({"trainer.max_steps": "many"}, r"trainer\.max_steps: expected int.*got 'many'"),
        ({"trainer": {"gradient_clip_val": 1.0}}, r"trainer\.gradient_clip_val: 1\.0 has no effect here"),
        ({"trainer": {"max_steps": -1, "max_epochs": -1}}, "the run has no end"),
    ],
)
def test_a_mistake_in_the_settings_is_told_as_on_the_command_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_fit(RECIPES, change)


@pytest.mark.parametrize(("every", "said"), [(100, "holds the state after 7 steps"), (None, "keeps no state")])
def test_a_run_asked_to_stop_says_what_is_left_of_it(
    every: int | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = SimpleNamespace(path=Path("runs/first"), mark=lambda *_: None)
    trainer = SimpleNamespace(is_global_zero=True, global_step=7)
    cli = SimpleNamespace(run_dir=run, trainer=trainer, quiet=False, last=SimpleNamespace(every_n_steps=every))
    StepkdCLI.mark_stopped(cli, Preempted("asked to stop"))  # type: ignore[arg-type]
    assert f"asked to stop: runs/first {said}" in capsys.readouterr().out
