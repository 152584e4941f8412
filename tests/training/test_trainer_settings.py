"""Every argument of Lightning's Trainer takes effect or is refused by name; none is ignored."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as callbacks
import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from stepkd.errors import ConfigError
from stepkd.training.fit import run
from stepkd.training.trainer_settings import CALLBACKS, REFUSED, check_trainer_settings

SEEN_HERE = {
    "benchmark",
    "callbacks",
    "check_val_every_n_epoch",
    "default_root_dir",
    "detect_anomaly",
    "deterministic",
    "enable_autolog_hparams",
    "enable_model_summary",
    "fast_dev_run",
    "inference_mode",
    "limit_predict_batches",
    "limit_test_batches",
    "limit_train_batches",
    "limit_val_batches",
    "log_every_n_steps",
    "max_epochs",
    "max_steps",
    "max_time",
    "min_epochs",
    "min_steps",
    "num_sanity_val_steps",
    "precision",
    "profiler",
    "reload_dataloaders_every_n_epochs",
    "val_check_interval",
}
SEEN_ELSEWHERE = {
    "accelerator": "tests/runs/test_launcher.py",
    "devices": "tests/runs/test_launcher.py",
    "num_nodes": "tests/runs/test_launcher.py",
    "strategy": "tests/modules/test_strategy_list.py",
    "logger": "tests/runs/test_logger.py",
    "enable_progress_bar": "tests/cli/test_run_loggers.py",
}
NOT_NEUTRAL = {
    "accumulate_grad_batches": 4,
    "barebones": True,
    "enable_checkpointing": False,
    "gradient_clip_algorithm": "value",
    "gradient_clip_val": 1.0,
    "model_registry": "somebody/something",
    "overfit_batches": 1,
    "plugins": ["TorchSyncBatchNorm"],
    "sync_batchnorm": True,
    "use_distributed_sampler": False,
}
OVERLAY = {
    "trainer": {"max_steps": -1, "val_check_interval": None, "check_val_every_n_epoch": 1, "callbacks": "Watcher"},
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
            "train": {"options": {"n": 12}},
            "validation": {"options": {"n": 8}},
            "global_batch_size": 4,
        }
    },
}


def test_every_argument_of_the_trainer_was_looked_at() -> None:
    """A new one of Lightning's fails here: find out whether it takes effect under manual optimisation."""
    arguments = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert arguments == SEEN_HERE | SEEN_ELSEWHERE.keys() | REFUSED.keys()
    assert not REFUSED.keys() & (SEEN_HERE | SEEN_ELSEWHERE.keys())
    assert REFUSED.keys() == NOT_NEUTRAL.keys()


def test_lightnings_defaults_are_not_refused() -> None:
    check_trainer_settings({"max_steps": 1}, "fit")
    defaults = {name: p.default for name, p in inspect.signature(Trainer.__init__).parameters.items() if name != "self"}
    check_trainer_settings(defaults | {"max_steps": 1}, "fit")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_argument_without_effect_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.{name}: .* has no effect here: "):
        check_trainer_settings({"max_steps": 1, name: NOT_NEUTRAL[name]}, "fit")


@pytest.mark.parametrize("name", sorted(CALLBACKS))
def test_callbacks_that_need_automatic_optimisation_are_refused_by_name(name: str) -> None:
    callback = {"class_path": f"{getattr(callbacks, name).__module__}.{name}"}
    for given in (callback, [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}, callback]):
        said = rf"trainer\.callbacks: {name} does not work here, because it needs Lightning's automatic .*: [a-z]"
        with pytest.raises(ConfigError, match=said):
            check_trainer_settings({"max_steps": 1, "callbacks": given}, "fit")


@pytest.mark.slow
def test_overfitting_can_be_had_with_the_setting_that_the_message_names(trained: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"overfit_batches: 1 has no effect here: set data\.init_args\.train\.limit"):
        trained(max_epochs=3, overfit_batches=1)
    watcher = trained("--data.init_args.train.limit", "4", max_epochs=3)
    assert (watcher.counts["steps"], watcher.counts["epochs"]) == (3, 3)


@pytest.fixture
def trained(tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs ``stepkd fit`` (or another command) with arguments of the Trainer; gives what the callback saw."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from trainer_watcher import Watcher

    def start(*extra: str, command: str = "fit", out: str = "run", **settings: Any) -> type[Watcher]:
        Watcher.clear()
        overlay = json.loads(json.dumps(OVERLAY)) | {}
        overlay["trainer"] |= {"callbacks": {"class_path": "trainer_watcher.Watcher"}} | settings
        (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
        configs = ["--config", str(repo_root / "recipes/tiny/sft.yaml"), "--config", str(tmp_path / "overlay.yaml")]
        folder = ["--out", str(tmp_path / out)] if command in ("fit", "predict") else []
        assert run([command, *configs, *folder, *extra]) == 0
        return Watcher

    yield start
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def test_a_plain_run_has_every_switch_off(trained: Callable[..., Any], tmp_path: Path, capfd: Any) -> None:
    watcher = trained(max_steps=2)
    assert watcher.seen == {
        "deterministic": False,
        "benchmark": False,
        "detect_anomaly": False,
        "precision": "32-true",
        "root": str(tmp_path / "run"),
    }
    assert watcher.counts == {"loaders": 1, "steps": 2, "epochs": 1}
    assert len(steps_logged(tmp_path / "run")) == 2
    text = "".join(capfd.readouterr())
    assert "Profiler Report" not in text
    assert "Trainable params" not in text


@pytest.mark.slow
def test_switches_take_effect(trained: Callable[..., Any], tmp_path: Path, capfd: Any, caplog: Any) -> None:
    caplog.set_level("INFO")
    watcher = trained(
        max_steps=4,
        deterministic=True,
        benchmark=True,
        detect_anomaly=True,
        precision="bf16-mixed",
        profiler="simple",
        enable_model_summary=True,
        enable_autolog_hparams=False,
        log_every_n_steps=2,
        num_sanity_val_steps=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        default_root_dir=str(tmp_path / "elsewhere"),
    )
    for name in ("deterministic", "benchmark", "detect_anomaly"):
        assert watcher.seen[name], name
    assert watcher.seen["precision"] == "bf16-mixed"
    assert watcher.seen["root"] == str(tmp_path / "elsewhere")
    assert watcher.counts["sanity"] == 1
    assert watcher.counts["validations"] == 3, "the check before training, and after steps 2 and 4"
    assert watcher.counts["validation batches"] == 3
    first, second = steps_logged(tmp_path / "run")
    assert second == first + 2
    assert "Trainable params" in "".join(capfd.readouterr())
    assert "Profiler Report" in caplog.text


def steps_logged(folder: Path) -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "train/loss" in row]


def test_epochs_and_their_limits_take_effect(trained: Callable[..., Any]) -> None:
    watcher = trained(
        max_epochs=2, limit_train_batches=2, check_val_every_n_epoch=2, reload_dataloaders_every_n_epochs=1
    )
    assert watcher.counts["steps"] == 4
    assert watcher.counts["epochs"] == 2
    assert watcher.counts["validations"] == 1
    assert watcher.counts["validation batches"] == 2
    assert watcher.counts["loaders"] == 2


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_time": "00:00:00:00"}, 0),
        ({"max_time": "00:00:00:00", "min_steps": 4}, 4),
        ({"max_time": "00:00:00:00", "min_epochs": 1}, 3),
        ({"fast_dev_run": 2}, 2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_ends_of_a_run_take_effect(settings: dict[str, Any], steps: int, trained: Callable[..., Any]) -> None:
    assert trained(**settings).counts["steps"] == steps


@pytest.mark.parametrize(("command", "inference_mode"), [("test", True), ("predict", False)])
def test_settings_of_other_commands_take_effect(
    command: str, inference_mode: bool, trained: Callable[..., Any]
) -> None:
    data = json.dumps({"source": "task", "options": {"task": "modular:terms=4", "n": 8}})
    settings = {f"limit_{command}_batches": 1, "inference_mode": inference_mode}
    watcher = trained(f"--data.init_args.{command}", data, command=command, **settings)
    assert watcher.counts[f"{command} batches"] == 1
    assert watcher.seen["inference_mode"] == inference_mode


@pytest.mark.slow
def test_a_whole_number_is_a_number_of_batches_whichever_library_named_the_types_first() -> None:
    code = (
        "import inspect, typing\nfrom lightning.pytorch import Trainer\n"
        "hints = inspect.unwrap(Trainer.__init__).__annotations__\n"
        "hints.update(limit_val_batches=typing.Union[float, int, None])\n"
        "from stepkd.training.fit import check_fit\n"
        "limits = {'limit_val_batches': 1, 'limit_train_batches': 0.5, 'val_check_interval': '00:00:10:00'}\n"
        "found = check_fit(['tiny/sft'], {'trainer': limits | {'max_steps': 1}}).trainer\n"
        "print([type(found[name]).__name__ for name in limits])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("['int', 'float', 'str']")
