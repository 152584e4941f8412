"""``stepkd fit`` as people use it: one folder, resumable after SIGKILL, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import pytest
import torch

from stepkd.cli import main

ROOT = Path(__file__).resolve().parents[2]
OVERLAY = """
trainer: {max_steps: 12, val_check_interval: 3}
checkpoint: {every_n_steps: 1}
model:
  init_args:
    {policy: {path: tiny-0.1m}, optimizer: {warmup: 2}, validation: {sampling: {max_new_tokens: 16}}}
data: {init_args: {train: {options: {n: 70}}, validation: {options: {n: 8}}, global_batch_size: 16}}
"""


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(OVERLAY)
    return path


def words(overlay: Path, out: Path, *extra: str) -> list[str]:
    recipe = ROOT / "recipes" / "tiny" / "sft.yaml"
    return ["fit", "--config", str(recipe), "--config", str(overlay), "--out", str(out), *extra]


def fit(overlay: Path, out: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    return forked.run(words(overlay, out, *extra))


def last(out: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(out / "checkpoints" / f"{name}.ckpt", weights_only=True)


def validated(out: Path) -> dict[int, float]:
    """Accuracy at every step that was validated."""
    from stepkd.runs.logger import read_metrics

    return {row["step"]: row["val/accuracy"] for row in read_metrics(out) if "val/accuracy" in row}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Weights and optimiser state, bit for bit."""
    pairs = [(a["state_dict"], b["state_dict"])]
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (a, b)]
    pairs += [(states[0][k], states[1][k]) for k in states[0]]
    return all(
        left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left) for left, right in pairs
    )


@pytest.fixture(scope="module")
def uninterrupted(overlay: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "whole"
    done = fit(overlay, out)
    assert done.returncode == 0, done.stderr
    return out


def test_the_folder_holds_what_a_reader_needs(uninterrupted: Path) -> None:
    from stepkd.runs.logger import read_metrics

    run = json.loads((uninterrupted / "run.json").read_text())
    assert (run["kind"], run["status"]) == ("fit", "finished")
    assert "path: tiny-0.1m" in (uninterrupted / "config.yaml").read_text()
    rows = read_metrics(uninterrupted)
    trained = [row for row in rows if "train/loss" in row]
    assert len(trained) == 12
    wanted = {"train/ce", "train/grad_norm", "train/lr", "train/tokens", "perf/tokens_per_second", "perf/memory_gib"}
    assert wanted <= set(trained[0])
    assert any("val/accuracy" in row for row in rows)
    assert {path.name for path in (uninterrupted / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert last(uninterrupted)["stepkd"]["position"] == {"epoch": 2, "batch": 2}


@pytest.mark.slow
def test_two_runs_are_bit_identical(overlay: Path, uninterrupted: Path, tmp_path: Path) -> None:
    again = [sys.executable, "-m", "stepkd", *words(overlay, tmp_path / "again")]
    subprocess.run(again, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=300)
    assert same(last(uninterrupted), last(tmp_path / "again"))
    assert not same(last(uninterrupted), {**last(uninterrupted), "state_dict": {}})


def test_best_is_the_best(uninterrupted: Path) -> None:
    scores = validated(uninterrupted)
    assert len(scores) == 4
    best = max(scores.values())
    assert last(uninterrupted, "best")["global_step"] == min(step for step in scores if scores[step] == best) + 1


def test_killed_and_resumed_equals_uninterrupted(overlay: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """In the second pass over the data; validation runs every third step."""
    out = tmp_path / "killed"
    process = forked.Command(words(overlay, out))
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_text().count("train/loss") >= 5:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    process.wait(timeout=60)
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert last(out)["global_step"] < 12
    done = fit(overlay, out, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming from last.ckpt" in done.stdout
    assert same(last(out), last(uninterrupted))
    assert validated(out) == validated(uninterrupted)
    assert same(last(out, "best"), last(uninterrupted, "best"))
    assert last(out, "best")["global_step"] == last(uninterrupted, "best")["global_step"]


@pytest.mark.slow
def test_killed_while_it_validates(overlay: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """The step's checkpoint is written after its validation, so nothing of it is lost."""
    out = tmp_path / "killed"
    killer = tmp_path / "killer.py"
    killer.write_text(
        "import os, signal\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Killer(Callback):\n"
        "    def on_validation_batch_end(self, trainer, *_, **__):\n"
        "        if trainer.global_step == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    extra = ["--trainer.callbacks", "killer.Killer"]
    killed = forked.run(words(overlay, out, *extra), PYTHONPATH=str(tmp_path))
    assert killed.returncode == -signal.SIGKILL
    assert last(out)["global_step"] == 5
    assert fit(overlay, out, "--resume").returncode == 0
    assert same(last(out), last(uninterrupted))
    assert validated(out) == validated(uninterrupted)


@pytest.mark.slow
def test_a_moved_run_keeps_its_best(overlay: Path, uninterrupted: Path, tmp_path: Path) -> None:
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(uninterrupted, moved)
    done = fit(overlay, moved, "--resume", "--trainer.max_steps", "15")
    assert done.returncode == 0, done.stderr
    scores = validated(moved)
    assert len(scores) == 5
    best = max(scores.values())
    assert last(moved, "best")["global_step"] == min(step for step in scores if scores[step] == best) + 1


def test_an_existing_run_is_never_silently_overwritten(
    overlay: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert main(words(overlay, uninterrupted)) == 2
    told = capsys.readouterr().err
    assert "--resume" in told
    assert "--overwrite" in told
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_evaluate_and_export_take_a_run_folder(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    from stepkd.models.checkpoint import load_trained

    out = tmp_path / "exported"
    assert main(["export", str(uninterrupted), "--to", str(out)]) == 0
    plain = AutoModelForCausalLM.from_pretrained(out)
    ours = load_trained(uninterrupted)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, ours.causal_lm(input_ids=ids).logits)
    arguments = ["evaluate", "--model", str(uninterrupted), "--benchmark", "task", "--data", "task=modular,n=8"]
    assert main([*arguments, "--sampling.max_new_tokens", "16", "--out", str(tmp_path / "evaluation")]) == 0
    assert "pass@1" in capsys.readouterr().out


def test_validate_and_predict(uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from stepkd.data.io import read_rows
    from stepkd.data.rows import COMPLETION, validate

    checkpoint = str(uninterrupted / "checkpoints" / "best.ckpt")
    config = ["--config", str(uninterrupted / "config.yaml"), "--ckpt_path", checkpoint]
    assert main(["validate", *config]) == 0
    assert "val/accuracy" in capsys.readouterr().out
    out = tmp_path / "completions"
    predict = ["--data.init_args.predict.source", "task", "--data.init_args.predict.options", "{task: modular, n: 5}"]
    assert main(["predict", *config, *predict, "--out", str(out)]) == 0
    rows = [validate(row, COMPLETION, path=out, line=line) for row, line in read_rows(out / "completions.jsonl")]
    assert len(rows) == 5
