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
from pathlib import Path
from typing import Literal

import stepkd
from stepkd.cli.recipes import RecipeChoice
from stepkd.errors import ConfigError, MachineError, ModelError, StepkdError, check_bounds
from stepkd.runs.launcher import check_launch, detect_launch

Level = Literal["ok", "note", "bad"]
Looked = Iterator[tuple[str, str] | tuple[str, str, Level, str]]
PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "accelerate", "jsonargparse", "math-verify")
OPTIONAL = {
    "trl": "vLLM, parity tests",
    "bitsandbytes": "policy.quantization",
    "gguf": ".gguf files",
    "flash-attn": "policy.attention flash_attention_2",
}
MEASURED = "measured"


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
    memory: dict[str, int] | None = None
    if config.recipe:
        try:
            memory, found = _recipe(config.recipe_words(), config.ranks)
        except ModelError as error:  # what else was looked at is told all the same
            memory, found = {}, Finding("recipe", "memory", "not known", "bad", str(error))
        findings += [Finding("memory, at least", name, gib(size)) for name, size in memory.items() if name != MEASURED]
        findings.append(found)
    if config.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings], "memory": memory}, indent=2))
    else:
        _show(findings)
    return int(any(finding.level == "bad" for finding in findings))


def _recipe(words: Sequence[str], ranks: int | None) -> tuple[dict[str, int], Finding]:
    """The memory of a recipe in parts, and what follows from it for this machine."""
    import torch

    from stepkd.cli.memory import ADVICE, in_own_process, lower_bound, two_steps
    from stepkd.models.machine import device_room, memory_free
    from stepkd.training.fit import check_fit

    module, _, settings = check_fit(words=words)
    wanted, here = str(settings.get("accelerator")), torch.cuda.is_available()
    device = "cuda" if wanted in ("gpu", "cuda") or (here and wanted != "cpu") else "cpu"
    world = detect_launch().world_size
    shards = (ranks or world) if "FSDP2Strategy" in str(settings.get("strategy")) else 1
    memory = lower_bound(module, shards)
    least = sum(memory.values())
    free = (device_room(torch.device("cuda", 0)) if here else None) if device == "cuda" else memory_free()
    room = "" if free is None else f" of {gib(free)} free"
    level: Level = "note"
    value, advice = f"at least {gib(least)}{room}", "activations, logits and samples come on top, not measured: "
    if free is None:
        advice += f"there is no free {device} memory here"
    elif least > free:
        level, advice = "bad", ADVICE
    elif world > 1 or shards > 1:
        advice += "a run of several processes is not tried"
    else:
        print("measuring two optimiser steps on the largest batch ...", file=sys.stderr, flush=True)
        try:
            memory[MEASURED] = peak = in_own_process(two_steps, [*words], device)
            value, advice = f"{gib(peak)}{room}, measured over two optimiser steps", ""
            level = "note" if peak > 0.9 * free else "ok"
        except StepkdError as error:
            what = "two optimiser steps do not fit" if isinstance(error, MachineError) else "a run would stop"
            level, advice = "bad", f"{what}: {error}"
    return memory, Finding("recipe", "memory", value, level, advice)


def _show(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    colours = {"ok": "green", "note": "yellow", "bad": "bold red"}
    table = Table(*(Column(overflow="fold") for _ in range(4)), box=None, pad_edge=False, show_header=False)
    for before, each in zip(["", *(each.section for each in findings)], findings, strict=False):
        section = "" if before == each.section else each.section
        value = Text(f"{each.value}\n{each.advice}".rstrip())
        table.add_row(Text(section, "bold"), each.name, value, Text(each.level, colours[each.level]))
    Console(highlight=False).print(table)


def look_around(folder: Path, environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Everything that does not depend on a recipe.

    Args:
        folder: where runs would be written.
        environ: environment variables; None: those of the process.
    """
    environ = os.environ if environ is None else environ
    sections = {"versions": _versions(), "CPU": _cpu(), "GPUs": _gpus(), "launch": _launch(environ)}
    sections["disk"] = _disk(folder)
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

    from stepkd.models.machine import cpus, fast_bfloat16, memory_free, memory_limit

    yield "model", str(torch.cpu.get_capabilities().get("cpu_name") or platform.machine())
    cores, threads = cpus(), torch.get_num_threads()
    value = f"{threads} of torch on {cores:g} CPU(s)"
    advice = f"set OMP_NUM_THREADS={max(int(cores), 1)}: more threads than CPUs slow each other down"
    yield ("threads", value, "note", advice) if threads > cores + 0.5 else ("threads", value)
    limit = memory_limit()
    yield "memory", f"{gib(memory_free())} free" + ("" if limit is None else f", limit of this container {gib(limit)}")
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


def _launch(environ: Mapping[str, str]) -> Looked:
    try:
        info = check_launch(environ, {})
    except ConfigError as error:
        yield "launcher", "contradictions", "bad", str(error)
    else:
        yield "launcher", f"{info.launcher}: rank {info.rank} of {info.world_size}, {info.num_nodes} node(s)"


def _disk(folder: Path) -> Looked:
    place = folder.expanduser().absolute()
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield str(folder), "not writable", "bad", "give --out another folder"
    else:
        yield str(folder), f"{gib(free)} free"


def gib(number: float) -> str:
    """A number of bytes for people: in GiB, below one in MiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
