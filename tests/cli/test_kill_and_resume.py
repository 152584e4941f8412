"""Every method, killed or asked to stop at some points and resumed, ends with the weights of an uninterrupted run.

The points are drawn once, by the method's name. No sample is lost or trained on twice.
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

METHODS = ["gkd", "self_distill", "kdrl", "grpo", "prm", "step_kto"]  # SFT: test_fit_command.py


def same_state(a: Any, b: Any) -> bool:
    """Nested values alike, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_state(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return bool(a == b)


def assert_alike(runs: Any, name: str, other: str) -> None:
    a, b = runs.last(name), runs.last(other)
    assert a["global_step"] == b["global_step"] == runs.steps
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "stepkd"):
        assert same_state(a[part], b[part]), part
    assert runs.batches(name) == runs.batches(other)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_and_asked_to_stop(method: str, kept: Callable[[str], Any]) -> None:
    """SIGKILL at one point, SIGTERM at a later one, then to the end: three processes make one run."""
    made = kept(method)
    draw = random.Random(method)
    killed_at, stopped_at = (made.inner * draw.choice(steps) for steps in ((1, 2), (3, 4)))
    phases = ["optimizer", "rollout" if method in ("kdrl", "grpo") else "batch_end"]
    draw.shuffle(phases)
    killed = made.fit("torn", stop_at=f"{phases[0]}:{killed_at}:SIGKILL")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    stopped = made.fit("torn", "--resume", stop_at=f"{phases[1]}:{stopped_at}:SIGTERM")
    assert stopped.returncode == 0, stopped.stderr[-3000:]
    assert "asked to stop by SIGTERM" in stopped.stdout
    assert made.last("torn")["global_step"] - stopped_at in (0, made.inner)  # the step under way may end
    done = made.fit("torn", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_alike(made, "torn", made.whole())


@pytest.mark.slow
def test_one_rank_is_asked_and_all_stop(kept: Callable[[str], Any]) -> None:
    """The ranks agree before a batch's first step: none waits for another, and two processes go on from one state."""
    made = kept("kdrl")
    stopped = made.fit("asked", ranks=2, stop_at="rollout:3:SIGTERM", stop_rank=1)
    assert stopped.returncode == 0, stopped.stderr[-3000:]
    assert "asked to stop by a signal to another rank" in stopped.stdout
    assert made.last("asked")["global_step"] == 3
    done = made.fit("asked", "--resume", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_alike(made, "asked", made.whole(ranks=2))


@pytest.mark.slow
def test_sampling_breaks_off(runs: Callable[[str], Any]) -> None:
    """A request in the middle of a rollout ends it within a token, gives up the batch, and keeps the steps before."""
    made = runs("kdrl")
    made.overlay["model"]["init_args"]["engine"] = {"class_path": "Transformers", "init_args": {"max_rows": 4}}
    stopped = made.fit("run", stop_at="rollout:3:SIGTERM", preempted_exit_code=75)
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    assert "SIGTERM: stopping after this step" in stopped.stderr
    assert "holds the state after 3 steps" in stopped.stdout
    assert made.last("run")["global_step"] == 3
    assert json.loads((made.folder / "run" / "run.json").read_text())["status"] == "stopped"
