"""Versions, devices, launcher, disk: what is there, and what to do about what is not."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

import stepkd
from stepkd.errors import ConfigError
from stepkd.models.cpu import cpu_name, fast_bfloat16
from stepkd.models.limits import memory_free, memory_limit, processors
from stepkd.runs.launcher import check_launch

Level = Literal["ok", "note", "bad"]
PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "accelerate", "jsonargparse", "math-verify")
OPTIONAL = {"trl": "vLLM rollouts, parity tests", "bitsandbytes": "policy.quantization", "gguf": ".gguf files"}
LITTLE_DISK = 10 * 2**30
"""Free bytes below which checkpoints of a small model may not fit."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    section: str
    name: str
    value: str
    level: Level = "ok"
    """``note``: works, but not as one may think; ``bad``: a run would fail."""
    advice: str = ""
    """What to do about it."""


def look_around(folder: Path, environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Everything that does not depend on a recipe.

    Args:
        folder: where runs would be written.
        environ: environment variables; None: those of the process.
    """
    environ = os.environ if environ is None else environ
    return [
        *_versions(),
        *_processor(),
        *_gpus(),
        *_attention(),
        *_launch(environ),
        *_disk(folder, environ),
    ]


def _versions() -> Iterator[Finding]:
    section = "versions"
    yield Finding(section, "python", platform.python_version())
    yield Finding(section, "stepkd", stepkd.__version__)
    for name in PACKAGES:
        version = _version(name)
        if version is None:
            yield Finding(section, name, "missing", "bad", f"pip install {name}")
        else:
            yield Finding(section, name, version)
    for name, use in OPTIONAL.items():
        version = _version(name)
        yield Finding(section, name, version or "not installed", "ok", "" if version else f"only for {use}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> Iterator[Finding]:
    section = "processor"
    yield Finding(section, "model", cpu_name())
    cores, threads = processors(), torch.get_num_threads()
    many = threads > cores + 0.5
    yield Finding(
        section,
        "threads",
        f"{threads} of torch on {cores:g} processor(s)",
        "note" if many else "ok",
        f"set OMP_NUM_THREADS={max(int(cores), 1)}: more threads than processors slow each other down" if many else "",
    )
    free, limit = memory_free(), memory_limit()
    if free is not None:
        inside = "" if limit is None else f", limit of this container {gib(limit)}"
        yield Finding(section, "memory", f"{gib(free)} free{inside}")
    if fast_bfloat16():
        yield Finding(section, "bfloat16", "in hardware")
    elif torch.cuda.is_available():
        yield Finding(section, "bfloat16", "emulated")
    else:
        advice = "on this processor float32 is many times faster: policy.dtype float32"
        yield Finding(section, "bfloat16", "emulated", "note", advice)


def _gpus() -> Iterator[Finding]:
    section = "GPUs"
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        advice = (
            "torch is built for CUDA and sees no device: look at nvidia-smi and CUDA_VISIBLE_DEVICES" if built else ""
        )
        yield Finding(section, "CUDA", "none", "note" if built else "ok", advice)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        taken = free < 0.9 * total
        advices = ["another process holds memory on it"] * taken + ["no bfloat16: train in float32"] * (major < 8)
        yield Finding(
            section,
            f"cuda:{index}",
            f"{torch.cuda.get_device_name(index)}, {gib(free)} of {gib(total)} free, capability {major}.{minor}",
            "note" if advices else "ok",
            "; ".join(advices),
        )


def _attention() -> Iterator[Finding]:
    section = "attention"
    names = {"flash": "flash", "mem_efficient": "memory-efficient", "cudnn": "cudnn"}
    kernels = [name for key, name in names.items() if getattr(torch.backends.cuda, f"{key}_sdp_enabled")()]
    on_gpu = torch.cuda.is_available()
    yield Finding(section, "sdpa", ", ".join(kernels) if on_gpu else "the processor's kernels")
    known = find_spec("flash_attn") is not None
    yield Finding(section, "flash_attention_2", "installed" if known else "not installed")


def _launch(environ: Mapping[str, str]) -> Iterator[Finding]:
    section = "launch"
    available = torch.distributed.is_available()
    backends = [name for name in ("gloo", "nccl") if available and getattr(torch.distributed, f"is_{name}_available")()]
    alone = torch.cuda.device_count() > 1 and "nccl" not in backends
    yield Finding(
        section,
        "backends",
        ", ".join(backends) or "none",
        "bad" if alone else "ok",
        "several GPUs need NCCL: install the CUDA build of torch" if alone else "",
    )
    try:
        info = check_launch(environ, {})
    except ConfigError as error:
        yield Finding(section, "launcher", "contradictions", "bad", str(error))
        return
    ranks = f"rank {info.rank} of {info.world_size}, {info.num_nodes} node(s)"
    yield Finding(section, "launcher", f"{info.launcher}: {ranks}")


def _disk(folder: Path, environ: Mapping[str, str]) -> Iterator[Finding]:
    section = "disk"
    place = folder.expanduser().absolute()
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield Finding(section, str(folder), "not writable", "bad", "give --out another folder")
    else:
        little = free < LITTLE_DISK
        advice = "a checkpoint holds the trained weights and twice as much of the optimiser" if little else ""
        yield Finding(section, str(folder), f"{gib(free)} free", "note" if little else "ok", advice)
    cache = Path(
        environ.get("HF_HUB_CACHE") or Path(environ.get("HF_HOME", "~/.cache/huggingface")) / "hub"
    ).expanduser()
    offline = environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    state = "there" if cache.is_dir() else "empty"
    yield Finding(section, "hub cache", f"{cache}: {state}" + (", offline: nothing is downloaded" if offline else ""))


def gib(number: float) -> str:
    """A number of bytes for people: in GiB, below one in MiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
