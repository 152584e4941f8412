"""What this machine's processor is, and whether it multiplies bfloat16 matrices itself."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch


def fast_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 matrices.

    Without them torch emulates the type, tens to hundreds of times slower than float32. GPUs are not looked at.
    """
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "bf16" in cpu_flags()
    return any(flag in cpu_flags() for flag in ("amx_bf16", "avx512_bf16"))


def compute_dtype() -> torch.dtype:
    """Dtype for weights that are stored in a form nothing computes in (GGUF): bfloat16 where that is fast."""
    return torch.bfloat16 if torch.cuda.is_available() or fast_bfloat16() else torch.float32


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Features of the processor as Linux names them; empty where it does not say."""
    for line in _cpuinfo():
        if line.lower().startswith(("flags", "features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def cpu_name() -> str:
    """Model name of the processor."""
    names = (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
