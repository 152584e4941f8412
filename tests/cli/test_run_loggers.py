"""What a run logs, and where: to the user's loggers and always to ``metrics.jsonl``, in the run folder."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from stepkd.cli import main
from stepkd.errors import ConfigError
from stepkd.runs.logger import log_table, read_metrics
from stepkd.training.fit import fit as run_fit
from stepkd.training.trackio import TrackioLogger

ROOT = Path(__file__).resolve().parents[2]


class Recording(CSVLogger):
    """Remembers the settings and the table that it was told."""

    told: dict[str, Any]
    table: tuple[str, list[str], list[list[Any]], int]

    def log_hyperparams(self, params: Any = None) -> None:
        Recording.told = dict(params)
        super().log_hyperparams(params)

    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        Recording.table = (key, columns, data, step)


def fit(tmp_path: Path, *words: str, monitor: str | None = "val/loss", samples: Any = None, **trainer: Any) -> Path:
    """One step with validation."""
    settings = {
        "trainer": {"max_steps": 1, "val_check_interval": 1, **trainer},
        "model": {"init_args": {"policy": {"path": "tiny-0.1m"}, "validation": {"sampling": samples}}},
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


def test_completions_of_validation_are_a_table(tmp_path: Path) -> None:
    """One per problem, with its grade, at the step of the metrics."""
    run = fit(tmp_path, logger={"class_path": f"{__name__}.Recording"}, samples={"n": 2, "max_new_tokens": 4})
    key, columns, rows, step = Recording.table
    assert (key, columns) == ("val/samples", ["prompt", "completion", "expected", "verdict", "tokens", "finish"])
    assert len(rows) == 4
    assert [row["step"] for row in read_metrics(run) if "val/accuracy" in row] == [step]
    for prompt, completion, expected, verdict, tokens, finish in rows:
        assert (prompt[-1], expected.isdigit(), verdict) == ("\n", True, "unparsed")
        assert (tokens == 4) == (finish == "length")
        assert len(completion) <= 4


def test_text_of_tensorboard_shows_a_model_s_own_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = TensorBoardLogger.__new__(TensorBoardLogger)
    written: list[Any] = []
    monkeypatch.setattr(TensorBoardLogger, "experiment", SimpleNamespace(add_text=lambda *told: written.append(told)))
    log_table(logger, "val/samples", ("prompt", "completion"), [["a|b", "<b>1</b>\n2"]], 3)
    row = "| a&#124;b | &lt;b&gt;1&lt;/b&gt;<br>2 |"
    assert written == [("val/samples", f"| prompt | completion |\n| --- | --- |\n{row}", 3)]


@pytest.mark.parametrize("place", ["setting", "variable"])
def test_a_credential_in_a_setting_is_refused_before_anything_is_written(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "https://me:hunter2hunter2@hub/model" if place == "setting" else "0123456789abcdef0123"
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    words = ["--model.policy.path", secret, "--out", str(tmp_path / "run")]
    assert main(["fit", "--config", "tiny/sft", *words]) == 2
    said = capsys.readouterr().err
    what = "a password or token" if place == "setting" else "the value of the variable WANDB_API_KEY"
    assert f"policy.path holds {what}, and settings are written into files" in said
    assert secret not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        ("trackio", r"TrackioLogger needs trackio: pip install 'stepkd\[loggers\]'"),
        ("mlflow", "MLFLOW_ALLOW_FILE_STORE=true"),
    ],
)
def test_what_a_logger_lacks_is_named(
    logger: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepkd.runs.logger.find_spec", lambda name: None if name == "trackio" else name)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(ConfigError, match=rf"trainer\.logger: .*{message}"):
        run_fit(["tiny/sft", f"logger/{logger}"], out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_first_look_keeps_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "tiny/sft", "--config", "base/tiny", "--config", "debug", "--out", str(tmp_path / "look")]
    assert main(["fit", *words, "--data.train.options.n", "64"]) == 0
    assert list((tmp_path / "look" / "checkpoints").iterdir()) == []
    assert [row["step"] for row in read_metrics(tmp_path / "look") if "val/loss" in row] == [1, 3]
    assert "stepkd evaluate" not in capsys.readouterr().out


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


def test_what_trackio_is_told_after_a_run_goes_to_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []

    def init(project: str, name: str | None, **_: Any) -> Any:
        begun.append(name)
        return SimpleNamespace(name=name or "calm-sea-1", log=lambda *_, **__: None)

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init, finish=lambda: None))
    logger = TrackioLogger()
    logger.log_metrics({"train/loss": 1.0})
    logger.finalize("success")
    logger.log_metrics({"test/loss": 1.0})
    assert begun == [None, "calm-sea-1"]
