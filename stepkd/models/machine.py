"""What this machine can do: memory and CPUs that this process may really use, what fits, and bfloat16.

A container often has less than its machine. Weights that do not fit are refused before the machine swaps itself to
death, or a kernel kills the process without a word. Only folders are looked at for that, not hub ids that are still to
be downloaded.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from stepkd.errors import ModelError

_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED = 2**60  # version 1 of control groups writes a huge number where there is no limit
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def memory_limit(root: Path = _ROOT) -> int | None:
    """Bytes that the control group of this process may take, or None without a limit."""
    return _number(root / "memory.max") or _number(root / "memory" / "memory.limit_in_bytes")


def memory_used(root: Path = _ROOT) -> int | None:
    """Bytes that the control group takes now, without what is only cached from files."""
    for used, stat, name in (
        (root / "memory.current", root / "memory.stat", "inactive_file"),
        (root / "memory" / "memory.usage_in_bytes", root / "memory" / "memory.stat", "total_inactive_file"),
    ):
        current = _number(used)
        if current is not None:
            return max(current - _field(stat, name), 0)
    return None


def memory_free(root: Path = _ROOT) -> int:
    """Bytes that this process can still get: of the machine, and within its control group."""
    machine = int(psutil.virtual_memory().available)
    limit, used = memory_limit(root), memory_used(root)
    return machine if limit is None or used is None else min(machine, max(limit - used, 0))


def memory_peak() -> int | None:
    """Bytes of this process's largest resident set so far; unlike ``getrusage``'s, not that of the process before."""
    return _field(Path("/proc/self/status"), "VmHWM:") * 1024 or None


def cpus(root: Path = _ROOT) -> float:
    """CPUs that this process may use: those it is bound to, within its control group's share."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (root / "cpu.max").read_text(encoding="ascii").split()
        return float(bound) if quota == "max" else min(float(bound), int(quota) / int(period))
    except (OSError, ValueError):
        return float(bound)


def _number(path: Path) -> int | None:
    try:
        value = int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return value if value < _UNLIMITED else None


def _field(path: Path, name: str) -> int:
    """The number behind a name in a file of such lines, 0 when it is not there."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)


def check_host_room(folder: Path, dtype: str | None) -> None:
    """Refuse to load a folder's weights that are larger than the memory that is free.

    Args:
        folder: a transformers model folder.
        dtype: what they become in memory; None: as stored.

    Raises:
        ModelError: names the bytes needed and free.
    """
    # What transformers reads, not every copy of the weights that lies there.
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        files = []
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):  # broken: loading it will say so
            names = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
            files = [folder / name for name in names if (folder / name).is_file()]
    else:
        files = [*folder.glob("model.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    needed = sum(file.stat().st_size for file in files)
    if dtype is not None:
        needed = needed * _BYTES[dtype] // _BYTES.get(_stored_dtype(folder), _BYTES[dtype])
    free = memory_free()
    if needed > free:
        raise ModelError(
            f"{folder} needs {needed:,} bytes ({needed / 2**30:.1f} GiB) for its weights (dtype "
            f"{dtype or 'as stored'}), and this machine has {free:,} ({free / 2**30:.1f} GiB) free: "
            "load it in bfloat16, quantise it, or take a smaller model"
        )


def device_room(device: torch.device) -> int:
    """Free memory of a CUDA device, in bytes."""
    return int(torch.cuda.mem_get_info(device)[0])


def _stored_dtype(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(config.get("dtype") or config.get("torch_dtype") or "")


def fast_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 matrices.

    Without them torch emulates the type, tens to hundreds of times slower than float32. GPUs are not looked at.
    """
    return any(torch.cpu.get_capabilities().get(flag) for flag in ("amx_bf16", "avx512_bf16", "bf16"))


def compute_dtype() -> torch.dtype:
    """Dtype for weights that are stored in a form nothing computes in (GGUF): bfloat16 where that is fast."""
    return torch.bfloat16 if torch.cuda.is_available() or fast_bfloat16() else torch.float32
