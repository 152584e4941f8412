"""Failures of the machine are told in words."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stepkd.errors import ConfigError, MachineError, StepkdError
from stepkd.runs.process import rank_name, tell_agent
from stepkd.runs.progress import PhaseTracker
from stepkd.training.failures import explained


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 79 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_memory_that_ran_out_names_three_settings(error: Exception) -> None:
    found = explained(error, SimpleNamespace(micro_batch_tokens=512))
    assert isinstance(found, MachineError)
    for words in ("micro_batch_tokens (now 512", "gradient_checkpointing: true", "policy.lora", "fsdp2.yaml", "doctor"):
        assert words in str(found)


def test_the_phase_is_named_from_the_wreck() -> None:
    phases = PhaseTracker()
    with pytest.raises(MemoryError), phases.phase("step"), phases.phase("student rollout"):
        raise MemoryError
    assert phases.interrupted is not None
    text = str(explained(MemoryError(), SimpleNamespace(phases=phases)))
    assert "in the phase 'student rollout'" in text
    assert "max_rows" in text
    assert pickle.loads(pickle.dumps(phases)).interrupted is None
    with phases.phase("training"):
        assert phases.interrupted is None


def test_the_checkpoint_is_named_where_there_is_one(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    assert "No checkpoint was written yet" in str(explained(MemoryError(), None, last))
    last.touch()
    assert f"{last} is intact: --resume continues" in str(explained(MemoryError(), None, last))
    assert "checkpoint" not in str(explained(MemoryError())).replace("gradient_checkpointing", "")


def test_a_peer_that_is_gone() -> None:
    error = RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41234\nmore")
    found = explained(error)
    assert isinstance(found, MachineError)
    assert "another process of this run has ended" in str(found)
    assert "more" not in str(found)


@pytest.mark.parametrize("error", [ValueError("out of memory"), ConfigError("broken pipe"), RuntimeError("shape")])
def test_other_errors_stay(error: Exception) -> None:
    assert explained(error) is None


def test_ranks_are_named_under_a_launcher() -> None:
    assert rank_name({}) == rank_name({"WORLD_SIZE": "1", "RANK": "0"}) == ""
    assert rank_name({"WORLD_SIZE": "4", "RANK": "3"}) == " (rank 3)"


@pytest.mark.parametrize(
    ("error", "rank", "enough"),
    [
        (ConfigError("no such recipe"), "0", False),
        (ConfigError("no such recipe"), "1", True),
        (MachineError("out of memory"), "1", False),
    ],
)
def test_an_agent_is_told_what_happened_without_a_traceback(
    error: Exception, rank: str, enough: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a mistake that all ranks find is printed by one of them."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("LOCAL_RANK", rank)
    told = None
    try:
        raise error
    except StepkdError as caught:
        told = tell_agent(caught)
    assert told == enough
    failure = ProcessFailure(local_rank=int(rank), pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    report = str(ChildFailedError("stepkd", {int(rank): failure}))
    assert f"traceback : {error}" in report
    assert "Traceback (most recent call last)" not in report


def test_other_errors_keep_their_traceback_in_the_agents_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    told = None
    try:
        raise ZeroDivisionError("why")
    except ZeroDivisionError as caught:
        told = tell_agent(caught)
    assert told is False
    assert "Traceback (most recent call last)" in (tmp_path / "error.json").read_text()


def test_without_an_agent_everything_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert not tell_agent(ConfigError("no such recipe"))
