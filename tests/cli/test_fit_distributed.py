"""``stepkd fit`` on two ranks: run folder, data shares, validation and checkpoints of two ranks, and back to one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import forked
import pytest
import torch

from stepkd.runs.logger import read_metrics

ROOT = Path(__file__).resolve().parents[2]
OVERLAY = """
trainer: {max_steps: 4, val_check_interval: 2}
checkpoint: {every_n_steps: 2}
model:
  init_args:
    policy: {path: tiny-0.1m, dtype: float64}
    optimizer: {warmup: 1}
    validation: {sampling: {max_new_tokens: 12}}
    micro_batch_tokens: 100
data: {init_args: {train: {options: {n: 30}}, validation: {options: {n: 1}}, global_batch_size: 5}}
"""


def fit(folder: Path, out: str, *extra: str, two: bool) -> subprocess.CompletedProcess[str]:
    (folder / "small.yaml").write_text(OVERLAY)
    configs = ["--config", str(ROOT / "recipes/tiny/sft.yaml"), "--config", str(folder / "small.yaml")]
    words = ["fit", *configs, "--out", str(folder / out), *extra]
    return forked.run(words, ranks=2 if two else 1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for out, two in (("one", False), ("two", True)):
        done = fit(folder, out, two=two)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "sync_dist" not in done.stderr, "validation is reduced over the ranks already"
    return folder


def test_two_ranks_equal_one(folder: Path) -> None:
    """Five rows over two ranks, and a validation set of one row: rank 1 has nothing to validate."""
    one, two = weights(folder / "one"), weights(folder / "two")
    gap = sum(float((one[name] - two[name]).norm() ** 2) for name in one) ** 0.5
    assert gap / sum(float(value.norm() ** 2) for value in one.values()) ** 0.5 < 1e-8
    rows = [read_metrics(folder / out) for out in ("one", "two")]
    for name in ("train/loss", "train/tokens", "val/loss", "val/accuracy", "val/tokens"):
        series = [[row[name] for row in metrics if name in row] for metrics in rows]
        assert series[0], f"{name} was not logged"
        assert series[1] == pytest.approx(series[0], rel=1e-6), name
    assert (folder / "two" / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.slow
def test_an_existing_folder_stops_both_ranks(folder: Path) -> None:
    done = fit(folder, "two", two=True)
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_ranks_resume_what_one_began(folder: Path) -> None:
    assert fit(folder, "mixed", "--trainer.max_steps", "4", two=False).returncode == 0
    done = fit(folder, "mixed", "--resume", "--trainer.max_steps", "6", two=True)
    assert done.returncode == 0, done.stderr[-3000:]
    last = torch.load(folder / "mixed" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6
    assert last["stepkd"]["position"] == {"epoch": 1, "batch": 0}
