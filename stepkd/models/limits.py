"""How much memory and how many processors this process may really use: a container often has less than its machine.

Only the standard library and ``/proc`` and ``/sys``; None where a system does not say.
"""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED = 2**60  # version 1 of control groups writes a huge number where there is no limit


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


def memory_free(root: Path = _ROOT, meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that this process can still get: of the machine, and within its control group."""
    machine = _field(meminfo, "MemAvailable:") * 1024 or None
    limit, used = memory_limit(root), memory_used(root)
    within = None if limit is None or used is None else max(limit - used, 0)
    known = [number for number in (machine, within) if number is not None]
    return min(known) if known else None


def memory_peak() -> int | None:
    """Bytes of this process's largest resident set so far; unlike ``getrusage``'s, not that of the process before."""
    return _field(Path("/proc/self/status"), "VmHWM:") * 1024 or None


def processors(root: Path = _ROOT) -> float:
    """Processors that this process may use: those it is bound to, within its control group's share."""
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
