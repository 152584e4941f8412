"""Checkpoints that are killed or run out of disk while they are written, and earlier ones that are kept."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stepkd.errors import StepkdError
from stepkd.runs.resume import find_last_checkpoint, read_checkpoint
from stepkd.training.checkpoints import AtomicCheckpointIO, LastCheckpoint


def checkpoint(step: int, size: int = 4) -> dict[str, Any]:
    return {"global_step": step, "state_dict": {"w": torch.full((size,), float(step))}, "stepkd": {"policy": {}}}


WRITER = """
import os, resource, signal, sys, torch
sys.path.insert(0, {tests!r})
from test_checkpoint_files import AtomicCheckpointIO, checkpoint
how, after, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if how == "kill":
    write = torch.save
    def torn(value, stream):
        class Dying:
            written = 0
            def write(self, data):
                self.written += len(data)
                stream.write(bytes(data)[: max(after - self.written + len(data), 0)])
                if self.written >= after:
                    stream.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                return len(data)
            def flush(self):
                pass
        write(value, Dying())
    torch.save = torn
elif how == "rename":
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
else:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, resource.RLIM_INFINITY))
AtomicCheckpointIO().save_checkpoint(checkpoint(2, 50_000), path)
"""


def write(how: str, after: int, path: Path) -> subprocess.CompletedProcess[str]:
    script = WRITER.format(tests=str(Path(__file__).parent))
    return subprocess.run(
        [sys.executable, "-c", script, how, str(after), str(path)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(("how", "after"), [("kill", 100), ("kill", 120_000), ("rename", 0)])
def test_a_kill_while_it_writes_leaves_the_one_before(how: str, after: int, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), path)
    done = write(how, after, path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [entry for entry in tmp_path.iterdir() if entry != path]
    assert len(left) == 1
    assert left[0].stat().st_size >= min(after, 100)
    assert find_last_checkpoint(tmp_path) == path
    assert read_checkpoint(path)["global_step"] == 1
    AtomicCheckpointIO().save_checkpoint(checkpoint(3), path)
    assert list(tmp_path.iterdir()) == [path]  # the wreck is gone
    assert read_checkpoint(path)["global_step"] == 3


@pytest.mark.parametrize("after", [0, 1000, 150_000])
def test_a_full_disk_leaves_the_one_before(after: int, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), path)
    done = write("full", after, path)
    assert done.returncode == 1
    assert re.search(r"cannot write .*last\.ckpt: .*\. last\.ckpt is intact, for --resume\. ", done.stderr)
    assert list(tmp_path.iterdir()) == [path]
    assert read_checkpoint(path)["global_step"] == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StepkdError, match=r"No checkpoint was written before\. That is a file"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(1), tmp_path / "file" / "last.ckpt")


def test_earlier_ones_stay_and_a_torn_last_one_sends_back_to_them(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(global_step=0, is_global_zero=True, fit_loop=SimpleNamespace(_data_fetcher=None))
    trainer.save_checkpoint = lambda path, **_: AtomicCheckpointIO().save_checkpoint(
        checkpoint(trainer.global_step), path
    )
    callback = LastCheckpoint(tmp_path / "last.ckpt", 2, keep_previous=2)
    module: Any = None
    callback.on_train_start(trainer, module)
    for step in range(1, 13):
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module, None, None, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "step=8.ckpt", "step=10.ckpt"}
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 12
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:-40])
    last = find_last_checkpoint(tmp_path)
    assert last == tmp_path / "step=10.ckpt"
    assert read_checkpoint(last)["global_step"] == 10
    again = LastCheckpoint(tmp_path / "last.ckpt", 2, keep_previous=2)  # goes on from there
    trainer.global_step = 10
    again.on_train_start(trainer, module)
    trainer.global_step = 12
    again.on_train_batch_end(trainer, module, None, None, 0)
    assert read_checkpoint(last)["global_step"] == 10
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 12


def test_the_last_save_of_all_keeps_the_one_before(tmp_path: Path) -> None:
    """And writing one step twice keeps nothing twice."""
    trainer: Any = SimpleNamespace(global_step=0, is_global_zero=True)
    trainer.save_checkpoint = lambda path, **_: AtomicCheckpointIO().save_checkpoint(
        checkpoint(trainer.global_step), path
    )
    callback = LastCheckpoint(tmp_path / "last.ckpt", 2, keep_previous=2)
    module: Any = None
    callback.on_train_start(trainer, module)
    for step in (2, 3, 3):
        trainer.global_step = step
        callback.save(trainer)
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "step=2.ckpt"}
    assert read_checkpoint(tmp_path / "step=2.ckpt")["global_step"] == 2
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3


@pytest.mark.parametrize("torn", [False, True])
def test_a_file_system_without_links(torn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are whole or not there, and a full disk is told as such."""
    saved: list[Path] = []
    trainer: Any = SimpleNamespace(global_step=4, is_global_zero=True, save_checkpoint=lambda p, **_: saved.append(p))
    last = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(2), last)
    (tmp_path / ".step=1.ckpt.77.tmp").touch()

    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    def fill(_: Path, target: Path) -> None:
        target.write_bytes(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.link", refuse)
    if torn:
        monkeypatch.setattr("shutil.copyfile", fill)
    callback = LastCheckpoint(last, 2, keep_previous=1)
    callback._saved_at = 2
    if torn:
        with pytest.raises(StepkdError, match=r"cannot write .*last\.ckpt: No space left on device.* is intact"):
            callback.save(trainer)
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    else:
        callback.save(trainer)
        assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "step=2.ckpt"}
        assert read_checkpoint(tmp_path / "step=2.ckpt")["global_step"] == 2
        assert saved == [last]
    assert read_checkpoint(last)["global_step"] == 2


def test_only_rank_zero_keeps(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(global_step=2, is_global_zero=False, save_checkpoint=lambda *_, **__: None)
    (tmp_path / "last.ckpt").write_bytes(b"x")
    callback = LastCheckpoint(tmp_path / "last.ckpt", 1, keep_previous=1)
    callback.save(trainer)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
