"""Processes that trained with others end as they should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from stepkd.runs.process import leave_group

WORKER = Path(__file__).with_name("leaving_worker.py")
PAIRS = 12


def test_nothing_to_leave() -> None:
    assert not dist.is_initialized()
    leave_group()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the worker forks")
def test_threads_of_the_group_end_before_python_does(tmp_path: Path) -> None:
    """Without it about every third of these pairs ends with SIGABRT, after all its work is done."""
    done = subprocess.run(
        [sys.executable, str(WORKER), str(PAIRS), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["0"] * (2 * PAIRS), done.stderr[-3000:]
