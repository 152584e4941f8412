"""The doctor sees what a machine has, within its container, and says what to do about what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from stepkd.cli import doctor, main
from stepkd.cli.doctor import Finding, gib, look_around
from stepkd.models import machine
from stepkd.models.machine import cpus, memory_free, memory_limit, memory_used


def named(findings: list[Finding], section: str, name: str) -> Finding:
    (found,) = [each for each in findings if (each.section, each.name) == (section, name)]
    return found


def test_this_machine(tmp_path: Path) -> None:
    findings = look_around(tmp_path, {})
    assert named(findings, "versions", "torch").value == torch.__version__
    assert named(findings, "launch", "launcher").value == "plain: rank 0 of 1, 1 node(s)"
    assert "free" in named(findings, "disk", str(tmp_path)).value
    assert not [each for each in findings if each.level == "bad"]


def test_launchers_that_promise_what_lightning_ignores(tmp_path: Path) -> None:
    taken = named(look_around(tmp_path, {"ACCELERATE_MIXED_PRECISION": "bf16"}), "launch", "launcher")
    assert taken.level == "ok", "a run takes it over"
    found = named(look_around(tmp_path, {"ACCELERATE_MIXED_PRECISION": "fp16"}), "launch", "launcher")
    assert found.level == "bad"
    assert "precision" in found.advice
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
    elastic = {**ranks, "TORCHELASTIC_RUN_ID": "x"}
    assert named(look_around(tmp_path, elastic), "launch", "launcher").value == "elastic: rank 3 of 4, 2 node(s)"


def test_places_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = look_around(tmp_path / "file" / "runs", {})
    assert named(found, "disk", str(tmp_path / "file" / "runs")).level == "bad"


def test_a_missing_package_and_too_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(machine, "cpus", lambda: 0.5)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = look_around(tmp_path, {})
    missing = named(found, "versions", "no-such-package")
    assert (missing.level, missing.advice) == ("bad", "pip install no-such-package")
    if torch.get_num_threads() > 1:
        assert "OMP_NUM_THREADS=1" in named(found, "CPU", "threads").advice
    assert "policy.dtype float32" in named(found, "CPU", "bfloat16").advice
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": True})
    assert named(look_around(tmp_path, {}), "CPU", "bfloat16").value == "in hardware"


def test_limits_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both versions of control groups; file caches can be given back and do not count."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * 10**9))
    assert memory_limit(tmp_path) is None
    assert memory_free(tmp_path) == 4 * 10**9
    second = tmp_path / "second"
    second.mkdir()
    for name, text in (
        ("memory.max", "1000000000"),
        ("memory.current", "700000000"),
        ("memory.stat", "anon 1\ninactive_file 200000000"),
        ("cpu.max", "150000 100000"),
    ):
        (second / name).write_text(text + "\n")
    assert memory_limit(second) == 10**9
    assert memory_used(second) == 5 * 10**8
    assert memory_free(second) == 5 * 10**8
    assert cpus(second) <= 1.5
    (second / "memory.max").write_text("max\n")
    (second / "cpu.max").write_text("max 100000\n")
    assert memory_limit(second) is None
    assert cpus(second) == cpus(tmp_path) >= 1
    first = tmp_path / "first"
    (first / "memory").mkdir(parents=True)
    for name, text in (("limit_in_bytes", str(2**63 - 4096)), ("usage_in_bytes", "5"), ("stat", "")):
        (first / "memory" / f"memory.{name}").write_text(text)
    assert memory_limit(first) is None, "a huge number is no limit"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--out", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["memory"] is None
    assert {each["section"] for each in shown["findings"]} >= {"versions", "CPU", "GPUs", "launch", "disk"}
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--out", str(tmp_path / "file" / "x")]) == 1
    assert "not writable" in capsys.readouterr().out


def test_sizes_for_people() -> None:
    assert [gib(n) for n in (5 * 2**20, 3 * 2**29)] == ["5 MiB", "1.5 GiB"]
