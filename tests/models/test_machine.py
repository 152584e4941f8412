"""Weights that do not fit are refused with the bytes that they need."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from stepkd.errors import ModelError
from stepkd.models import machine
from stepkd.models.checkpoint import save_policy
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig
from stepkd.teachers.config import Local
from stepkd.teachers.local import LocalTeacher, check_room


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("room") / "model"
    save_policy(Policy.load(PolicyConfig(path="tiny-0.1m")), path)
    return path


@pytest.mark.parametrize(("dtype", "times"), [(None, 1.0), ("float32", 1.0), ("bfloat16", 0.5), ("float64", 2.0)])
def test_memory_of_this_machine(folder: Path, dtype: str, times: float, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = int(sum(file.stat().st_size for file in folder.glob("*.safetensors")) * times)
    monkeypatch.setattr(machine, "memory_free", lambda: needed - 1)
    spec = PolicyConfig(path=str(folder), dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=rf"needs {needed:,} bytes .* this machine has {needed - 1:,}"):
        Policy.load(spec)
    monkeypatch.setattr(machine, "memory_free", lambda: needed)
    Policy.load(spec)


@pytest.mark.parametrize(("whole", "needed"), [(False, 300), (True, 1000)])
def test_the_files_that_are_read_count(
    tmp_path: Path, whole: bool, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards by their index, whatever their names; one whole file goes before them."""
    for name, size in {"part-1.safetensors": 100, "part-2.safetensors": 200, "model-old.safetensors": 5000}.items():
        (tmp_path / name).write_bytes(bytes(size))
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "part-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    if whole:
        (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(machine, "memory_free", lambda: needed - 1)
    with pytest.raises(ModelError, match=f"needs {needed:,} bytes"):
        machine.check_host_room(tmp_path, None)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_a_model_error(tmp_path: Path, folder: Path, index: str) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "part-1.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match="cannot load"):
        Policy.load(PolicyConfig(path=str(tmp_path / "model")))


def test_a_teacher_too_large_for_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_free", lambda: 1000)
    student = Policy.load(PolicyConfig(path="tiny-0.1m"))
    with pytest.raises(ModelError, match=r"needs .* bytes .* 1,000 .* free: load it in bfloat16, quantise it"):
        LocalTeacher(Local(str(folder))).bind(student.tokenizer, student.vocab_size)


def test_a_teacher_too_large_for_its_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy.load(PolicyConfig(path=str(folder)))
    needed = sum(p.numel() * p.element_size() for p in policy.parameters())
    monkeypatch.setattr("stepkd.teachers.local.device_room", lambda device: needed)
    with pytest.raises(ModelError, match=rf"needs {needed:,} bytes .* cuda:0 has {needed:,}"):
        check_room(policy, torch.device("cuda:0"))
    monkeypatch.setattr("stepkd.teachers.local.device_room", lambda device: 2 * needed)
    check_room(policy, torch.device("cuda:0"))
    check_room(policy, torch.device("cpu"))
