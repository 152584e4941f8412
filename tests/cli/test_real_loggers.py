"""The overlays of recipes/logger with the real packages (stepkd[loggers]): what they are told, and what never."""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import forked
import pytest

from stepkd.runs.logger import read_metrics

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
SECRETS = {
    "HF_TOKEN": "hf_SecretOfTheHubSecretOfTheHub",
    "WANDB_API_KEY": "5ec4e70f0a0db15ec4e70f0a0db15ec4e70f0a0d",
    "MLFLOW_TRACKING_PASSWORD": "secret-of-the-tracking-server",
}
COLUMNS = ["prompt", "completion", "expected", "verdict", "tokens", "finish"]

Found = tuple[Mapping[str, Any], list[float], list[list[str]]]
"""Settings, training losses, names of the columns of every table."""


def stepkd(home: Path, *words: str) -> None:
    """Run one command, with credentials in the environment."""
    done = forked.run(words, HOME=str(home), MLFLOW_ALLOW_FILE_STORE="true", **SECRETS)
    assert done.returncode == 0, done.stdout + done.stderr
    (home / "said.txt").write_text(done.stdout + done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("logger", PACKAGES)
def test_a_logger_gets_settings_metrics_and_samples_and_no_credentials(
    logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(PACKAGES[logger])
    for name in [name for name in os.environ if name.startswith(("WANDB", "MLFLOW", "TRACKIO"))]:
        monkeypatch.delenv(name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = tmp_path / "run"
    rows = {"source": "task", "split": "validation", "options": {"task": "modular:terms=4", "n": 4}}
    words = ["--config", "tiny/sft", "--config", f"logger/{logger}", "--out", str(run)]
    words += ["--model.policy.path", "tiny-0.1m", "--data.validation", json.dumps(rows)]
    words += ["--data.train.options.n", "16", "--data.global_batch_size", "4", "--trainer.val_check_interval", "1"]
    stepkd(tmp_path, "fit", *words, "--trainer.max_steps", "1")
    stepkd(tmp_path, "fit", *words, "--trainer.max_steps", "2", "--resume")
    losses = [row["train/loss"] for row in read_metrics(run)]
    assert len(losses) == 2
    settings, logged, tables = READERS[logger](run)
    assert float(settings["optimizer.lr"]) == 3e-3
    assert settings["policy.path"] == "tiny-0.1m"
    assert sorted(logged) == pytest.approx(sorted(losses), rel=1e-6)
    assert tables == [COLUMNS, COLUMNS]
    if logger == "tensorboard":  # one is enough
        stepkd(tmp_path, "export", str(run), "--to", str(tmp_path / "model"))
    assert list((tmp_path / "here").iterdir()) == [], "everything lies in the run folder"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5
    for path in written:
        held = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in held], path


def tensorboard_reader(run: Path) -> Found:
    import yaml
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses, tables = [], []
    for folder in sorted((run / "tensorboard").iterdir()):
        events = EventAccumulator(str(folder))
        events.Reload()
        losses += [event.value for event in events.Scalars("train/loss")]
        texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("val/samples/text_summary")]
        tables += [text.splitlines()[0].strip("| ").split(" | ") for text in texts]
    return yaml.safe_load((run / "tensorboard" / "version_0" / "hparams.yaml").read_text()), losses, tables


def wandb_reader(run: Path) -> Found:
    """Its files hold Protocol Buffers of an undocumented form: a name, a tag, a length, a value as JSON."""
    held = b"".join(path.read_bytes() for path in sorted(run.glob("wandb/offline-run-*/*.wandb")))
    settings = {
        name: json.loads(re.search(re.escape(name).encode() + rb"\x82\x01.(0\.[0-9]+|\"[^\"]+\")", held, re.DOTALL)[1])  # type: ignore[index]
        for name in ("optimizer.lr", "policy.path")
    }
    losses = [float(value) for value in dict.fromkeys(re.findall(rb"train/loss\x82\x01.([0-9.]+)", held, re.DOTALL))]
    tables = [
        json.loads(path.read_text())["columns"] for path in run.glob("wandb/offline-run-*/files/media/table/val/*.json")
    ]
    return settings, losses, tables


def mlflow_reader(run: Path) -> Found:
    (experiment,) = [path for path in (run / "mlruns").iterdir() if path.name.isdigit() and path.name != "0"]
    runs = [path for path in experiment.iterdir() if path.is_dir()]
    settings = {path.name: path.read_text() for each in runs for path in (each / "params").iterdir()}
    losses = [float((each / "metrics" / "train" / "loss").read_text().split()[1]) for each in runs]
    tables = [json.loads((each / "artifacts" / "val" / "samples.json").read_text())["columns"] for each in runs]
    assert {table.pop(0) for table in tables} == {"step"}
    return settings, losses, tables


def trackio_reader(run: Path) -> Found:
    with sqlite3.connect(run / "trackio" / "stepkd.db") as database:
        ((settings,),) = database.execute("select config from configs")
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by id")]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    return json.loads(settings), losses, [list(row["val/samples"]["_value"][0]) for row in rows if "val/samples" in row]


READERS = {
    "tensorboard": tensorboard_reader,
    "wandb": wandb_reader,
    "mlflow": mlflow_reader,
    "trackio": trackio_reader,
}
