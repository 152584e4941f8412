"""Two processes under a launcher train as one does: the same samples, the same losses, for every kind of method."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stepkd.runs.launcher import ignored_settings
from stepkd.runs.logger import read_metrics
from stepkd.runs.rundir import read_marker

METHODS = ["prm", "step_kto", "gkd", "kdrl"]


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(folder) if "train/loss" in row]


def tokens(made: Any, name: str) -> dict[int, list[Any]]:
    """The completions that every step was taken on, of all ranks."""
    found: dict[int, list[Any]] = {}
    for file in sorted(made.folder.glob(f"{name}.tokens.*")):
        for step, rows in map(json.loads, file.read_text().splitlines()):
            found.setdefault(step, []).extend(rows)
    return {step: sorted(rows) for step, rows in found.items()}


def assert_same_training(made: Any, name: str, other: str) -> None:
    assert tokens(made, name) == tokens(made, other)
    assert losses(made.folder / name) == pytest.approx(losses(made.folder / other), rel=1e-5)
    assert_same_weights(made.last(name)["state_dict"], made.last(other)["state_dict"])


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """To 1e-4 of each tensor's norm: AdamW makes a whole step of a gradient that is rounding error."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 1e-4 * value.norm(), name


def seconds_since_the_end(made: Any, name: str) -> float:
    """How long ago a rank ended, or was ended."""
    return time.time() - (made.folder / f"{name}.ended").stat().st_mtime


def assert_done(done: Any) -> None:
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one(method: str, kept: Callable[[str], Any]) -> None:
    made = kept(method)
    one = made.whole()
    assert len(losses(made.folder / one)) == 6
    for strategy in ("ddp", "fsdp2") if method == "kdrl" else ("fsdp2",):  # DDP: tests/modules/test_invariance.py
        assert_same_training(made, made.whole(strategy=strategy, ranks=2), one)


@pytest.mark.slow
def test_what_the_launch_guard_advises_trains_as_one(kept: Callable[[str], Any]) -> None:
    """The overlay that it names to those who ask accelerate for FSDP; and options of DDP that are allowed."""
    (message,) = ignored_settings({"ACCELERATE_USE_FSDP": "true"})
    (advised,) = re.findall(r"recipes/strategy/(\w+)\.yaml", message)
    options = {"find_unused_parameters": True, "gradient_as_bucket_view": True}
    ddp = ("--trainer.strategy", json.dumps({"class_path": "DDPStrategy", "dict_kwargs": options}))
    made = kept("sft")
    one = made.whole()
    assert_done(made.fit("advised", ranks=2, strategy=advised))
    assert_done(made.fit("options", *ddp, ranks=2))
    for name in ("advised", "options"):
        assert_same_training(made, name, one)
        norms = [[row["train/grad_norm"] for row in read_metrics(made.folder / each)] for each in (name, one)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.slow
def test_a_running_average_is_sharded_too(kept: Callable[[str], Any]) -> None:
    """A teacher that is the student's average; resumed in the middle."""
    made = kept("self_distill")
    one = made.whole()
    assert_done(made.fit("two", ranks=2, strategy="fsdp2", stop_at="batch_end:3:SIGTERM"))
    assert_done(made.fit("two", "--resume", ranks=2, strategy="fsdp2"))
    assert_same_training(made, "two", one)
    ours, theirs = (made.last(name)["stepkd"]["method_state"]["teacher"]["weights"] for name in ("two", one))
    assert_same_weights(ours, theirs)


@pytest.mark.slow
def test_a_cached_reference_gathers_nothing(runs: Callable[[str], Any]) -> None:
    """Without reference points nothing is computed before a step: the reference comes from the cache."""
    made = runs("step_kto")
    cached = ("--model.init_args.reference.cache", "true")
    cached += ("--model.init_args.reference_point", '{"outcome": "zero", "step": "zero"}')
    assert_done(made.fit("one", *cached))
    assert_done(made.fit("two", *cached, ranks=2, strategy="fsdp2"))
    assert_same_training(made, "two", "one")


@pytest.mark.slow
def test_half_precision_in_parts(runs: Callable[[str], Any]) -> None:
    """What is gathered in bfloat16 is looked at in tests/models/test_sharding.py."""
    made = runs("sft")
    mixed = ("--trainer.precision", "bf16-mixed")
    assert_done(made.fit("one", *mixed))
    asked = made.fit("two", ranks=2, strategy="fsdp2", launcher="accelerate-bf16")
    assert_done(asked)
    assert asked.stdout.count("trainer.precision: bf16-mixed (accelerate asks") == 1
    assert "precision: bf16-mixed" in (made.folder / "two" / "config.yaml").read_text()
    assert losses(made.folder / "two") == pytest.approx(losses(made.folder / "one"), rel=0.02)
    assert {value.dtype for value in made.last("two")["state_dict"].values()} == {torch.float32}
    refused = made.fit("half", "--model.init_args.policy.dtype", "bfloat16", ranks=2, strategy="fsdp2")
    assert refused.returncode != 0
    assert "trained weights are bfloat16" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gkd", "kdrl"])
def test_a_teacher_can_be_cut_up_too(method: str, kept: Callable[[str], Any]) -> None:
    made = kept(method)
    sharded = ("--model.init_args.teacher.sharded", "true")
    assert_done(made.fit("sharded-teacher", *sharded, ranks=2, strategy="fsdp2"))
    assert_same_training(made, "sharded-teacher", made.whole())
    refused = made.fit("alone", *sharded)
    assert refused.returncode == 2
    assert "teacher.sharded: true needs several ranks under recipes/strategy/fsdp2.yaml" in refused.stderr


@pytest.mark.slow
def test_from_two_processes_to_one_and_back(kept: Callable[[str], Any]) -> None:
    """A sharded run is asked to stop, goes on alone, then sharded again: samples and losses of one that did not."""
    made = kept("kdrl")
    for stop_at, ways in (
        ("batch_end:2:SIGTERM", {"ranks": 2, "strategy": "fsdp2"}),
        ("batch_end:4:SIGTERM", {}),
        ("", {"ranks": 2, "strategy": "fsdp2"}),
    ):
        assert_done(made.fit("to-and-fro", "--resume", stop_at=stop_at, **ways))
    assert_same_training(made, "to-and-fro", made.whole())
    assert made.last("to-and-fro")["global_step"] == made.last(made.whole())["global_step"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["optimizer", "rollout"])
def test_a_killed_sharded_run_goes_on(phase: str, kept: Callable[[str], Any]) -> None:
    """One of two ranks is killed: both are gone within a minute, and the next start ends as if nothing had been."""
    made, name = kept("kdrl"), f"killed-{phase}"
    ways = {"ranks": 2, "strategy": "fsdp2"}
    killed = made.fit(name, **ways, stop_at=f"{phase}:3:SIGKILL", stop_rank=1)
    assert killed.returncode != 0
    assert seconds_since_the_end(made, name) < 60
    assert_done(made.fit(name, "--resume", **ways))
    ours, theirs = made.last(name), made.last(made.whole(**ways))
    for part in ("state_dict", "optimizer_states"):
        assert all(torch.equal(*pair) for pair in zip(leaves(ours[part]), leaves(theirs[part]), strict=True))


def leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in leaves(value[key])]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [torch.as_tensor(value)] if isinstance(value, torch.Tensor | float | int) else []


@pytest.mark.slow
def test_the_error_of_the_rank_that_failed_is_on_top(runs: Callable[[str], Any]) -> None:
    made = runs("kdrl")
    ways = {"ranks": 2, "launcher": "torchrun", "strategy": "fsdp2"}
    done = made.fit("run", **ways, stop_at="rollout:2:MEMORY", stop_rank=1)
    assert seconds_since_the_end(made, "run") < 60
    assert done.returncode != 0
    assert "stepkd fit (rank 1): out of memory in the phase 'rollout'. Three settings take less" in done.stderr
    summary = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in summary
    assert "out of memory in the phase 'rollout'" in summary
    assert made.last("run")["global_step"] == 2


@pytest.mark.slow
def test_memory_that_runs_out_in_the_first_step(runs: Callable[[str], Any]) -> None:
    """It is no mistake in the command: the folder stays and says what happened."""
    made = runs("sft")
    done = made.fit("run", stop_at="optimizer:0:MEMORY")
    assert done.returncode == 1
    assert "stepkd fit: out of memory. Three settings take less" in done.stderr
    assert "No checkpoint was written yet." in done.stderr
    marker = read_marker(made.folder / "run")
    assert marker is not None
    assert marker["status"] == "failed"
    assert "out of memory" in marker["message"]
    assert_done(made.fit("run", "--resume"))


@pytest.mark.slow
def test_a_rank_without_validation_rows_does_not_hold_up_the_other(runs: Callable[[str], Any]) -> None:
    """One row for two ranks that hold half a model each: loss, samples and fidelity are those of one process."""
    made = runs("gkd")
    made.overlay["data"]["init_args"] = made.overlay["data"]["init_args"] | {"validation": {"options": {"n": 1}}}
    made.overlay["trainer"]["val_check_interval"] = 3
    made.overlay["model"]["init_args"] |= {
        "fidelity": {},
        "validation": {"sampling": {"n": 1, "temperature": 0.0, "max_new_tokens": 12}},
    }
    rows = []
    for name, ways in (("one", {}), ("two", {"ranks": 2, "strategy": "fsdp2"})):
        assert_done(made.fit(name, **ways))
        rows.append([row for row in read_metrics(made.folder / name) if "val/loss" in row])
    assert len(rows[0]) == 2
    names = {name for name in rows[0][0] if name.startswith("val/")}
    assert len(names) > 6
    for ours, theirs in zip(*rows, strict=True):
        assert names <= ours.keys() & theirs.keys()
        assert all(ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4, nan_ok=True) for name in names)
