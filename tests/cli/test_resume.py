"""``--resume``: changed settings are named, what is resumed from is said, and nothing that was reached is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stepkd.cli import main
from stepkd.runs.logger import read_metrics

ROOT = Path(__file__).resolve().parents[2]
OVERLAY = {
    "trainer": {"max_steps": 6, "val_check_interval": 3},
    "checkpoint": {"every_n_steps": 2, "monitor": "val/loss", "mode": "min"},
    "model": {
        "init_args": {
            "policy": {"path": "tiny-0.1m"},
            "optimizer": {"lr": 1e-2, "schedule": "constant", "warmup": 0},
            "validation": {"sampling": None},
        }
    },
    "data": {
        "init_args": {"train": {"options": {"n": 40}}, "validation": {"options": {"n": 4}}, "global_batch_size": 8}
    },
}


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(OVERLAY))
    return path


def fit(overlay: Path, out: Path, *extra: str) -> int:
    recipe = ROOT / "recipes" / "tiny" / "sft.yaml"
    return main(["fit", "--config", str(recipe), "--config", str(overlay), "--out", str(out), *extra])


@pytest.fixture(scope="module")
def six(overlay: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, which is also the first half of :func:`twelve`."""
    out = tmp_path_factory.mktemp("runs") / "six"
    assert fit(overlay, out) == 0
    return out


@pytest.fixture(scope="module")
def twelve(overlay: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "twelve"
    assert fit(overlay, out, "--trainer.max_steps", "12") == 0
    return out


@pytest.fixture
def run(six: Path, tmp_path: Path) -> Path:
    """A copy of the run of six steps."""
    return Path(shutil.copytree(six, tmp_path / "run"))


def last(out: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(out / "checkpoints" / f"{name}.ckpt", weights_only=True)


def same_weights(a: Path, b: Path) -> bool:
    left, right = last(a)["state_dict"], last(b)["state_dict"]
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def logged(out: Path, *names: str) -> list[tuple[Any, ...]]:
    """The lines of ``metrics.jsonl`` as they stand, without those that hold none of the names."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], *(line.get(name) for name in names)) for line in lines if set(names) & set(line)]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.init_args.optimizer.lr", "0.02", "optimizer.lr: 0.01 then, 0.02 now"),
        ("model.init_args.loss_weights", "{ce: 0.5}", "loss_weights.ce: not set then, 0.5 now"),
        ("data.init_args.train.options.n", "41", "data.train.options.n: 40 then, 41 now"),
        ("trainer.precision", "bf16-mixed", "trainer.precision: '32-true' then, 'bf16-mixed' now"),
    ],
)
def test_a_setting_that_decides_what_is_learnt_is_refused(
    key: str, value: str, said: str, overlay: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert fit(overlay, run, "--resume", "--trainer.max_steps", "9", f"--{key}", value) == 2
    text = capsys.readouterr().err
    assert said in text
    assert "--resume_with" in text
    assert "max_steps" not in text
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_hardware_and_length_change_and_are_said(
    overlay: Path, run: Path, twelve: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An extended run is the longer one, in its weights and in what it logged: no step twice, none left out."""
    changed = ["--trainer.max_steps", "12", "--model.init_args.micro_batch_tokens", "9999"]
    assert fit(overlay, run, "--resume", *changed) == 0
    text = capsys.readouterr().out
    assert "trainer.max_steps: 6 then, 12 now" in text
    assert "micro_batch_tokens: 16384 then, 9999 now" in text
    assert "optimizer" not in text
    assert same_weights(run, twelve)
    names = ("train/loss", "val/loss", "epoch")
    assert logged(run, *names) == logged(twelve, *names)
    assert [step for step, loss, *_ in logged(run, *names) if loss is not None] == list(range(12))


def test_a_named_learning_rate_takes_effect(overlay: Path, run: Path) -> None:
    """Also schedule, betas and decay: the optimiser's state in the checkpoint does not bring the old ones back."""
    settings = {"lr": 5e-3, "schedule": "linear", "warmup": 0, "beta1": 0.8, "weight_decay": 0.1}
    words = [word for name, value in settings.items() for word in (f"--model.init_args.optimizer.{name}", str(value))]
    steps = ["--trainer.max_steps", "10"]
    assert fit(overlay, run, "--resume_with", "optimizer.lr", *steps, *words) == 2, "the others are not named"
    assert fit(overlay, run, "--resume_with", "optimizer", *steps, *words) == 0
    rates = [row["train/lr"] for row in read_metrics(run) if "train/lr" in row]
    assert rates == pytest.approx([1e-2] * 6 + [5e-3 * (10 - step) / 10 for step in range(6, 10)])
    group = last(run)["optimizer_states"][0]["param_groups"][0]
    assert (group["betas"][0], group["weight_decay"], group["initial_lr"]) == (0.8, 0.1, 5e-3)
    assert fit(overlay, run, "--resume", *steps) == 2, "what was agreed to is what the run now has"


def test_a_run_asked_to_stop_validates_and_logs_as_if_it_had_not_been(
    overlay: Path, twelve: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    out = tmp_path / "run"
    stopper = ["--trainer.callbacks", "[{class_path: stopper.Stopper, init_args: {out: " + str(out) + "}}]"]
    for at in ("4", "8"):
        monkeypatch.setenv("STOP_AT", f"batch_end:{at}:SIGTERM")
        resume = ["--resume"] if out.exists() else []
        assert fit(overlay, out, *resume, *stopper, "--trainer.max_steps", "12") == 0
        assert json.loads((out / "run.json").read_text())["status"] == "stopped"
    monkeypatch.delenv("STOP_AT")
    assert fit(overlay, out, "--resume", "--trainer.max_steps", "12") == 0
    names = ("train/loss", "val/loss", "epoch")
    assert logged(out, *names) == logged(twelve, *names)
    assert same_weights(out, twelve)


@pytest.mark.parametrize("lost", ["torn", "missing"])
def test_a_lost_last_checkpoint_sends_back_to_the_best(
    lost: str, overlay: Path, run: Path, twelve: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints" / "last.ckpt"
    whole = path.read_bytes()
    path.unlink()
    if lost == "torn":
        path.write_bytes(whole[:-60])
    step = last(run, "best")["global_step"]
    assert fit(overlay, run, "--resume", "--trainer.max_steps", "12") == 0
    said = capsys.readouterr().out
    assert f"resuming from best.ckpt at step {step} (last.ckpt is torn or missing)" in said
    assert same_weights(run, twelve)
    assert last(run, "best")["global_step"] == last(twelve, "best")["global_step"]


@pytest.mark.parametrize("left", ["torn", "finished"])
def test_a_run_without_a_whole_checkpoint_is_not_begun_again(
    left: str, overlay: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    if left == "torn":
        (run / "checkpoints" / "last.ckpt").write_bytes(b"PK\x03\x04 torn")
    marker = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(marker | {"status": "finished" if left == "finished" else "running"}))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert fit(overlay, run, "--resume") == 2
    text = capsys.readouterr().err
    assert f"holds {'last.ckpt' if left == 'torn' else 'nothing'}. Put one back" in text
    assert "--overwrite" in text
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_ended_before_its_first_checkpoint_starts_at_its_first_step(
    overlay: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n")
    marker = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(marker | {"status": "failed"}))
    assert fit(overlay, run, "--resume", "--trainer.max_steps", "1") == 0
    assert "starting from step 0" in capsys.readouterr().out


def test_a_scheduler_that_starts_a_job_again_needs_no_flag(
    overlay: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(marker | {"launch": "elastic:7:", "status": "failed"}))
    agent = {"TORCHELASTIC_RUN_ID": "7", "TORCHELASTIC_RESTART_COUNT": "1", "MASTER_ADDR": "localhost", "RANK": "0"}
    for name, value in (agent | {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    assert fit(overlay, run, "--trainer.max_steps", "7") == 0
    assert "resuming from last.ckpt" in capsys.readouterr().out
    assert [step for step, *_ in logged(run, "train/loss")] == list(range(7))
