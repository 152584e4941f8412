"""What a run logs, and where: to the user's loggers and always to ``metrics.jsonl``, in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from stepkd.cli import main
from stepkd.runs.logger import read_metrics

ROOT = Path(__file__).resolve().parents[2]


class Recording(CSVLogger):
    """Remembers the settings that it was told."""

    told: dict[str, Any]

    def log_hyperparams(self, params: Any = None) -> None:
        Recording.told = dict(params)
        super().log_hyperparams(params)


def fit(tmp_path: Path, *words: str, monitor: str | None = "val/loss", **trainer: Any) -> Path:
    """One step with validation."""
    settings = {
        "trainer": {"max_steps": 1, "val_check_interval": 1, **trainer},
        "model": {"init_args": {"policy": {"path": "tiny-0.1m"}, "validation": {"sampling": None}}},
        "data": {
            "init_args": {"train": {"options": {"n": 8}}, "validation": {"options": {"n": 4}}, "global_batch_size": 4}
        },
        "checkpoint": {"monitor": monitor, "mode": "min"},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    recipes = ["--config", str(ROOT / "recipes" / "tiny" / "sft.yaml"), "--config", str(tmp_path / "small.yaml")]
    assert main(["fit", *recipes, "--out", str(tmp_path / "run"), *words]) == 0
    return tmp_path / "run"


def test_every_logger_is_told_the_settings_and_writes_to_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word about folders, and beside ``metrics.jsonl``."""
    monkeypatch.chdir(tmp_path)
    recording = {"class_path": f"{__name__}.Recording"}
    run = fit(tmp_path, logger=[recording, {"class_path": "CSVLogger", "init_args": {"name": "second"}}])
    assert Recording.told["optimizer.lr"] == 3e-3
    assert Recording.told["data.train.options.n"] == 8
    assert Recording.told["trainer.max_steps"] == 1
    assert "train/loss" in read_metrics(run)[0]
    assert {path.parent for path in run.rglob("metrics.csv")} == {
        run / "lightning_logs" / "version_0",
        run / "second" / "version_0",
    }
    told = [yaml.safe_load(path.read_text())["optimizer.lr"] for path in run.rglob("hparams.yaml")]
    assert told == [3e-3, 3e-3]
    assert {path.name for path in tmp_path.iterdir()} == {"small.yaml", "run"}


def test_a_logger_by_its_name_alone(tmp_path: Path) -> None:
    run = fit(tmp_path, "--trainer.logger", "CSVLogger")
    assert (run / "lightning_logs" / "version_0" / "metrics.csv").is_file()
    assert (run / "metrics.jsonl").is_file()


def test_a_folder_of_ones_own_stays(tmp_path: Path) -> None:
    own = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "own")}}
    run = fit(tmp_path, logger=own)
    assert (tmp_path / "own" / "lightning_logs").is_dir()
    assert not (run / "lightning_logs").exists()


def test_no_monitor_no_best_checkpoint(tmp_path: Path) -> None:
    """With validation data, which is measured all the same."""
    run = fit(tmp_path, monitor=None)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert "val/loss" in read_metrics(run)[0]


def test_no_progress_is_shown_when_none_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(tmp_path, enable_progress_bar=False)
    text = capsys.readouterr().out
    assert "finished after 1 steps" in text
    assert "step 1/1" not in text
    assert "train/loss" in read_metrics(run)[0]


def test_a_line_says_how_many_micro_batches_are_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepkd.runs.progress.LINE_SECONDS", 0.0)
    fit(tmp_path, enable_progress_bar=None)
    text = capsys.readouterr().out
    assert "micro-batch 1/1  step" in text
    assert "training 1/1" not in text
