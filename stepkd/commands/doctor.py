"""Look at this machine, its launcher and a recipe before a job burns hours.

stepkd doctor
stepkd doctor --config recipes/gkd.yaml --config recipes/base/smollm2-135m-lora.yaml
torchrun --nproc_per_node 8 -m stepkd doctor ...        what the ranks of that launch see

With a recipe: whether it parses, and an estimate of the memory it takes on each device, parts named. Exit code 1 when
something is found that would stop a run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepkd.commands.recipe_options import add_recipe_arguments, recipe_words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``stepkd doctor``."""
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where runs would be written (default: runs)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--ranks", type=int, help="processes of the run, for a sharded strategy (default: those of this launch)"
    )
    add_recipe_arguments(parser, required=False)


def run(arguments: argparse.Namespace) -> int:
    """Run ``stepkd doctor``."""
    from stepkd.doctor.environment import look_around
    from stepkd.runs.process import quiet_libraries

    quiet_libraries()
    findings = look_around(arguments.out)
    estimate: dict[str, Any] | None = None
    if arguments.config:
        estimate, more = _recipe(recipe_words(arguments), arguments.ranks)
        findings += more
    if arguments.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings], "memory": estimate}, indent=2))
    else:
        _show(findings, estimate)
    return int(any(finding.level == "bad" for finding in findings))


def _recipe(words: Sequence[str], ranks: int | None) -> tuple[dict[str, Any], list[Any]]:
    """Estimate of a recipe, and what follows from it for this machine."""
    import torch

    from stepkd.doctor.environment import Finding, gib
    from stepkd.doctor.footprint import footprint
    from stepkd.errors import ConfigError
    from stepkd.models.cpu import fast_bfloat16
    from stepkd.models.limits import memory_free
    from stepkd.models.room import device_room
    from stepkd.runs import detect_launch
    from stepkd.training.fit import check_fit

    module, data, settings = check_fit(words=words)
    precision = str(settings.get("precision") or "32-true")
    on_gpu = torch.cuda.is_available() and settings.get("accelerator") != "cpu"
    shards = 1
    if "FSDP2Strategy" in str(settings.get("strategy")):
        shards = detect_launch().world_size if ranks is None else ranks
        if shards < 1:
            raise ConfigError(f"--ranks {ranks}: must be at least 1")
    found = footprint(module, data, precision=precision, device="cuda" if on_gpu else "cpu", shards=shards)
    free = device_room(torch.device("cuda", 0)) if on_gpu else memory_free()
    findings = []
    if free is not None:
        value = f"about {gib(found.peak)} of {gib(free)} free"
        if found.peak > free:
            advice = "take a smaller model.init_args.micro_batch_tokens or chunk_size, "
            advice += "policy.gradient_checkpointing: true, or LoRA with policy.dtype bfloat16"
            findings.append(Finding("recipe", "memory", value, "bad", advice))
        else:
            findings.append(Finding("recipe", "memory", value, "note" if found.peak > 0.9 * free else "ok"))
    half = "bf16" in precision or module.policy_spec.dtype == "bfloat16"
    if half and not on_gpu and not fast_bfloat16():
        findings.append(
            Finding("recipe", "bfloat16", "emulated", "note", "this processor computes it slowly: float32 is faster")
        )
    return {"peak_bytes": found.peak, **asdict(found)}, findings


def _show(findings: Sequence[Any], estimate: dict[str, Any] | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from stepkd.doctor.environment import gib

    console = Console(highlight=False)
    signs = {"ok": Text("ok", "green"), "note": Text("note", "yellow"), "bad": Text("bad", "bold red")}
    table = Table(box=None, pad_edge=False)
    for name in ("", "", "", ""):
        table.add_column(name, overflow="fold")
    section = ""
    for finding in findings:
        shown = finding.section if finding.section != section else ""
        section = finding.section
        value = finding.value if not finding.advice else f"{finding.value}\n{finding.advice}"
        table.add_row(Text(shown, "bold"), finding.name, Text(value), signs[finding.level])
    console.print(table)
    if estimate is None:
        return
    memory = Table(title="memory on each device, estimated", box=None, pad_edge=False, title_justify="left")
    memory.add_column("part")
    memory.add_column("bytes", justify="right")
    for name, number in estimate["held"].items():
        memory.add_row(name, gib(number))
    for phase, parts in estimate["phases"].items():
        for name, number in parts.items():
            memory.add_row(f"{phase}: {name}", gib(number))
    memory.add_row(Text("peak: the first, and the larger phase", "bold"), Text(gib(estimate["peak_bytes"]), "bold"))
    console.print()
    console.print(memory)
    for name, fact in estimate["facts"].items():
        console.print(f"{name}: {fact}")
