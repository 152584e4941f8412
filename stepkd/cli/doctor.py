"""Look at this machine, its launcher and a recipe before a job burns hours.

stepkd doctor
stepkd doctor --recipe gkd base/smollm2-135m-lora
torchrun --nproc_per_node 8 -m stepkd doctor ...        what the ranks of that launch see

With a recipe: whether it parses, and the memory it takes on each device. Where that device is here, two optimiser steps
on the largest batch are run and measured; elsewhere a lower bound is computed, parts named. Exit code 1 when something
is found that would stop a run.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import stepkd
from stepkd.cli.recipes import RecipeChoice
from stepkd.errors import ConfigError, MachineError, StepkdError, check_bounds
from stepkd.runs.launcher import check_launch, detect_launch

Level = Literal["ok", "note", "bad"]
Looked = Iterator[tuple[str, str] | tuple[str, str, Level, str]]
PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "accelerate", "jsonargparse", "math-verify")
OPTIONAL = {"trl": "vLLM, parity tests", "bitsandbytes": "policy.quantization", "gguf": ".gguf files"}
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


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(RecipeChoice):
    """Settings of ``stepkd doctor``."""

    recipe: tuple[str, ...] = ()
    """Recipe of ``stepkd fit`` whose memory is told, then its overlays: files, or names of ``stepkd recipes list``."""
    out: str = "runs"
    """Folder that runs would be written to; its disk is looked at."""
    json: bool = False
    """Print one JSON object in place of tables."""
    ranks: int | None = None
    """Processes of the run, 1 or more, over which a sharded strategy divides the model; null: those of this launch."""

    def __post_init__(self) -> None:
        check_bounds("", self, ranks="[1, inf)")


def run(config: DoctorConfig) -> int:
    """Run ``stepkd doctor``."""
    from stepkd.runs.process import quiet_libraries

    quiet_libraries()
    findings = look_around(Path(config.out))
    memory: dict[str, Any] | None = None
    if config.recipe:
        memory, more = _recipe(config.recipe_words(), config.ranks)
        findings += more
    if config.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings], "memory": memory}, indent=2))
    else:
        _show(findings, memory)
    return int(any(finding.level == "bad" for finding in findings))


def _recipe(words: Sequence[str], ranks: int | None) -> tuple[dict[str, Any], list[Finding]]:
    """The memory of a recipe, and what follows from it for this machine."""
    import torch

    from stepkd.cli.memory import ADVICE, lower_bound, measured_peak
    from stepkd.models.machine import device_room, fast_bfloat16, memory_free
    from stepkd.training.fit import check_fit

    module, data, settings = check_fit(words=words)
    precision, wanted = str(settings.get("precision") or "32-true"), str(settings.get("accelerator"))
    here = torch.cuda.is_available()
    device = "cuda" if wanted in ("gpu", "cuda") or (here and wanted != "cpu") else "cpu"
    world = detect_launch().world_size
    shards = 1
    if "FSDP2Strategy" in str(settings.get("strategy")):
        shards = world if ranks is None else ranks
    bound = lower_bound(module, data, precision=precision, shards=shards)
    memory = {"at_least_bytes": bound.at_least, "measured_bytes": None, **asdict(bound)}
    free = (device_room(torch.device("cuda", 0)) if here else None) if device == "cuda" else memory_free()
    room = "" if free is None else f" of {gib(free)} free"
    level: Level = "note"
    value, advice = f"at least {gib(bound.at_least)}{room}", "activations come on top, not measured: "
    if free is None:
        advice += f"there is no free {device} memory here"
    elif bound.at_least > free:
        level, advice = "bad", ADVICE
    elif world > 1 or shards > 1:
        advice += "a run of several processes is not tried"
    else:
        print("measuring two optimiser steps on the largest batch ...", file=sys.stderr, flush=True)
        try:
            memory["measured_bytes"] = peak = measured_peak(words, device)
            value, advice = f"{gib(peak)}{room}, measured over two optimiser steps", ""
            level = "note" if peak > 0.9 * free else "ok"
        except StepkdError as error:
            what = "two optimiser steps do not fit" if isinstance(error, MachineError) else "a run would stop"
            level, advice = "bad", f"{what}: {error}"
    findings = [Finding("recipe", "memory", value, level, advice)]
    half = "bf16" in precision or module.policy_spec.dtype == "bfloat16"
    if half and device == "cpu" and not fast_bfloat16():
        findings.append(
            Finding("recipe", "bfloat16", "emulated", "note", "this CPU computes it slowly: float32 is faster")
        )
    return memory, findings


def _show(findings: Sequence[Finding], memory: dict[str, Any] | None) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(highlight=False)
    colours = {"ok": "green", "note": "yellow", "bad": "bold red"}
    table = Table(*(Column(overflow="fold") for _ in range(4)), box=None, pad_edge=False, show_header=False)
    for before, each in zip([None, *findings], findings, strict=False):
        section = "" if before is not None and before.section == each.section else each.section
        value = Text(f"{each.value}\n{each.advice}".rstrip())
        table.add_row(Text(section, "bold"), each.name, value, Text(each.level, colours[each.level]))
    console.print(table)
    if memory is None:
        return
    title = "\nmemory on each device, at least"
    parts = Table("part", Column("bytes", justify="right"), title=title, box=None, pad_edge=False, title_justify="left")
    sizes = dict(memory["held"])
    for phase, inside in memory["phases"].items():
        sizes |= {f"{phase}: {name}": number for name, number in inside.items()}
    for name, number in {**sizes, "at least: the first, and the largest phase": memory["at_least_bytes"]}.items():
        parts.add_row(name, gib(number))
    console.print(parts)
    for name, fact in memory["facts"].items():
        console.print(f"{name}: {fact}")


def look_around(folder: Path, environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Everything that does not depend on a recipe.

    Args:
        folder: where runs would be written.
        environ: environment variables; None: those of the process.
    """
    environ = os.environ if environ is None else environ
    sections = {"versions": _versions(), "CPU": _cpu(), "GPUs": _gpus(), "attention": _attention()}
    sections |= {"launch": _launch(environ), "disk": _disk(folder, environ)}
    return [Finding(section, *looked) for section, found in sections.items() for looked in found]


def _versions() -> Looked:
    yield "python", platform.python_version()
    yield "stepkd", stepkd.__version__
    for name in (*PACKAGES, *OPTIONAL):
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            needed = name not in OPTIONAL
            advice = f"pip install {name}" if needed else f"only for {OPTIONAL[name]}"
            yield name, "not installed", "bad" if needed else "ok", advice


def _cpu() -> Looked:
    import torch

    from stepkd.models.machine import cpu_name, cpus, fast_bfloat16, memory_free, memory_limit

    yield "model", cpu_name()
    cores, threads = cpus(), torch.get_num_threads()
    value = f"{threads} of torch on {cores:g} CPU(s)"
    advice = f"set OMP_NUM_THREADS={max(int(cores), 1)}: more threads than CPUs slow each other down"
    yield ("threads", value, "note", advice) if threads > cores + 0.5 else ("threads", value)
    free, limit = memory_free(), memory_limit()
    if free is not None:
        yield "memory", f"{gib(free)} free" + ("" if limit is None else f", limit of this container {gib(limit)}")
    advice = "on this CPU float32 is many times faster: policy.dtype float32"
    slow = not fast_bfloat16() and not torch.cuda.is_available()
    value = "in hardware" if fast_bfloat16() else "emulated"
    yield ("bfloat16", value, "note", advice) if slow else ("bfloat16", value)


def _gpus() -> Looked:
    import torch

    if not torch.cuda.is_available():
        advice = "torch is built for CUDA and sees no device: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        yield ("CUDA", "none") if torch.version.cuda is None else ("CUDA", "none", "note", advice)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        advices = ["another process holds memory on it"] * (free < 0.9 * total)
        advices += ["no bfloat16: train in float32"] * (major < 8)
        value = f"{torch.cuda.get_device_name(index)}, {gib(free)} of {gib(total)} free, capability {major}.{minor}"
        yield f"cuda:{index}", value, "note" if advices else "ok", "; ".join(advices)


def _attention() -> Looked:
    import torch

    names = {"flash": "flash", "mem_efficient": "memory-efficient", "cudnn": "cudnn"}
    kernels = [name for key, name in names.items() if getattr(torch.backends.cuda, f"{key}_sdp_enabled")()]
    yield "sdpa", ", ".join(kernels) if torch.cuda.is_available() else "the CPU's kernels"
    yield "flash_attention_2", "installed" if find_spec("flash_attn") is not None else "not installed"


def _launch(environ: Mapping[str, str]) -> Looked:
    import torch

    available = torch.distributed.is_available()
    backends = [name for name in ("gloo", "nccl") if available and getattr(torch.distributed, f"is_{name}_available")()]
    value, advice = ", ".join(backends) or "none", "several GPUs need NCCL: install the CUDA build of torch"
    lacks = torch.cuda.device_count() > 1 and "nccl" not in backends
    yield ("backends", value, "bad", advice) if lacks else ("backends", value)
    try:
        info = check_launch(environ, {})
    except ConfigError as error:
        yield "launcher", "contradictions", "bad", str(error)
    else:
        yield "launcher", f"{info.launcher}: rank {info.rank} of {info.world_size}, {info.num_nodes} node(s)"


def _disk(folder: Path, environ: Mapping[str, str]) -> Looked:
    place = folder.expanduser().absolute()
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield str(folder), "not writable", "bad", "give --out another folder"
    else:
        advice = "a checkpoint holds the trained weights and twice as much of the optimiser"
        said = (str(folder), f"{gib(free)} free")
        yield (*said, "note", advice) if free < LITTLE_DISK else said
    home = Path(environ.get("HF_HOME", "~/.cache/huggingface"))
    cache = Path(environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    offline = environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    state = "there" if cache.is_dir() else "empty"
    yield "hub cache", f"{cache}: {state}" + (", offline: nothing is downloaded" if offline else "")


def gib(number: float) -> str:
    """A number of bytes for people: in GiB, below one in MiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
