"""Checkpoints that are killed or run out of disk while they are written, and earlier ones that are kept."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch

from stepkd.errors import StepkdError
from stepkd.runs.rundir import find_last_checkpoint, read_checkpoint
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
try:
    AtomicCheckpointIO().save_checkpoint(checkpoint(2, 50_000), path)
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)  # standard error is a file too
"""


def write(how: str, after: int, path: Path) -> subprocess.CompletedProcess[str]:
    script = path.parent.with_suffix(".py")
    script.write_text(WRITER.format(tests=str(Path(__file__).parent)))
    return forked.run([how, str(after), str(path)], script=script)


@pytest.mark.parametrize(
    ("how", "after"), [pytest.param("kill", 100, marks=pytest.mark.slow), ("kill", 120_000), ("rename", 0)]
)
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


@pytest.mark.parametrize("after", [0, pytest.param(1000, marks=pytest.mark.slow), 150_000])
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


def test_the_last_checkpoint_is_written_whenever_enough_steps_are_done(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(global_step=0, fit_loop=SimpleNamespace(_data_fetcher=None))
    saved: list[int] = []
    trainer.save_checkpoint = lambda path, **_: saved.append(trainer.global_step)
    callback = LastCheckpoint(tmp_path / "last.ckpt", 4)
    module: Any = None
    callback.on_train_start(trainer, module)
    for step in (1, 3, 5, 7, 8, 11, 12):  # a batch may serve several optimiser steps
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module, None, None, 0)
    assert saved == [5, 8, 12]


def test_listening_ends_once() -> None:
    """A second end would put back a handler that is not the process's any more."""
    ended: list[int] = []
    last = LastCheckpoint(Path("last.ckpt"), 1)
    last._stop_listening = lambda: ended.append(1)
    nothing: Any = None
    last.on_train_end(nothing, nothing)
    last.on_exception(nothing, nothing, RuntimeError("a logger"))
    assert ended == [1]
