"""What ``accelerate launch`` told this process, and which of it Lightning would silently ignore.

Read off accelerate 1.15 (``accelerate/utils/launch.py``) and off child processes started with it:

- ``--multi_gpu``, FSDP, Megatron and single-node DeepSpeed start a torch elastic agent: the child sees
  ``TORCHELASTIC_RUN_ID``, ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``LOCAL_WORLD_SIZE``.
- Every other mode starts *one* child and always sets ``ACCELERATE_USE_CPU`` (``True`` or ``False``), which the
  elastic modes never set. The process count itself is not passed on. Its only trace is that ``MASTER_ADDR`` and
  ``MASTER_PORT`` are set when more than one process or machine was asked for. Both can also be inherited from the
  user's shell, so where the parent's command line is readable (Linux, ``/proc``) and names a count, that one decides.
- ``ACCELERATE_MIXED_PRECISION=no`` and ``ACCELERATE_DYNAMO_BACKEND=NO`` are always set: the defaults, which pass.
- ``--gradient_accumulation_steps`` reaches the environment only with DeepSpeed, or when users export it by hand; in
  every mode the parent of the process is accelerate's own, so the option is read off its command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

_TRUE = frozenset({"1", "true", "t", "yes", "y", "on"})

_SHARDED = (
    ("FSDP", "ACCELERATE_USE_FSDP", "FSDP_"),
    ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_"),
    ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM", "MEGATRON_LM_"),
    ("a parallelism config", "ACCELERATE_USE_PARALLELISM_CONFIG", "PARALLELISM_CONFIG_"),
)
"""Ways of accelerate to shard a model: name, switch, and what the names of their settings start with."""

_IGNORED = {
    "MIXED_PRECISION": (
        ("", "no", "bf16"),
        "accelerate asks for mixed precision {!r} (ACCELERATE_MIXED_PRECISION), which is not supported: it needs loss "
        "scaling. Launch with `--mixed_precision bf16`, or with `no` and `trainer.precision: bf16-mixed` in the "
        "recipe.",
    ),
    "GRADIENT_ACCUMULATION_STEPS": (
        ("", "1", "auto"),
        "accelerate asks for gradient accumulation over {} batches (--gradient_accumulation_steps or "
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS), which Lightning ignores. Drop it, and set "
        "`data.init_args.global_batch_size` in the recipe: one batch is one optimiser step over all processes, and "
        "stepkd splits it into micro-batches that fit in memory.",
    ),
    "DYNAMO_BACKEND": (
        ("", "no"),
        "accelerate asks for compilation with the dynamo backend {!r} (ACCELERATE_DYNAMO_BACKEND), which Lightning "
        "ignores. Launch with `--dynamo_backend no`; nothing in the recipe needs to change.",
    ),
}
"""Settings that are single values, by the names that follow ``ACCELERATE_``: which are neutral, and what to say of
others."""


def is_true(value: str | None) -> bool:
    """Whether accelerate reads the text of a variable as true."""
    return value is not None and value.strip().lower() in _TRUE


def ignored_settings(environ: Mapping[str, str], parent_command: Sequence[str] = ()) -> list[str]:
    """List the accelerate settings in force that Lightning would ignore, each with what to do instead.

    Args:
        environ: environment variables of this process.
        parent_command: words of the parent's command line, empty when it cannot be read.

    Returns:
        One sentence or two per setting, empty when all are at their neutral value.
    """
    asked = {name: environ.get(f"ACCELERATE_{name}", "").strip() for name in _IGNORED}
    steps = launch_options(parent_command).get("gradient_accumulation_steps", "")
    asked["GRADIENT_ACCUMULATION_STEPS"] = asked["GRADIENT_ACCUMULATION_STEPS"] or steps
    found = [
        text.format(asked[name]) for name, (neutral, text) in _IGNORED.items() if asked[name].lower() not in neutral
    ]
    return found + [sentence for names in _SHARDED if (sentence := _sharding(environ, *names))]


def asks_for_bf16(environ: Mapping[str, str]) -> bool:
    """Whether accelerate was asked for mixed precision with bfloat16, which ``trainer.precision`` takes over."""
    return environ.get("ACCELERATE_MIXED_PRECISION", "").strip().lower() == "bf16"


def _sharding(environ: Mapping[str, str], what: str, flag: str, prefix: str) -> str | None:
    seen = sorted(name for name, value in environ.items() if value and name.startswith(prefix))
    if flag in environ:
        # accelerate reads a false flag as "off", whatever else the section holds.
        if not is_true(environ[flag]):
            return None
        seen.insert(0, flag)
    if not seen:
        return None
    listed = ", ".join(seen[:3]) + (f" and {len(seen) - 3} more" if len(seen) > 3 else "")
    return (
        f"accelerate asks for {what} ({listed}), which Lightning ignores, while transformers obeys parts of it when it "
        "loads weights. Launch with `accelerate launch --multi_gpu --num_processes N -m stepkd ...` (or torchrun), and "
        "to shard weights, gradients and optimiser state add `--config recipes/strategy/fsdp2.yaml`"
        + " (recipes/strategy/deepspeed_zero2.yaml and deepspeed_zero3.yaml are untested)" * (what == "DeepSpeed")
        + "."
        + ("" if flag in environ else f" If {seen[0]} is left over from another job, unset it.")
    )


def single_child_count(environ: Mapping[str, str], parent_command: Sequence[str] = ()) -> int | None:
    """How many processes the user asked of an ``accelerate launch`` mode that starts only one.

    Args:
        environ: environment variables of this process.
        parent_command: words of the parent's command line, empty when it cannot be read.

    Returns:
        None when this process was not started by accelerate's single-child launcher; 1 when one process was asked
        for; the number asked for when it is known; 0 when it is more than one but the number cannot be seen.
    """
    if "ACCELERATE_USE_CPU" not in environ or "TORCHELASTIC_RUN_ID" in environ or "LOCAL_RANK" in environ:
        return None
    options = launch_options(parent_command)
    if options.get("num_processes", "").isdigit():
        machines = options.get("num_machines", "")
        return max(int(options["num_processes"]), int(machines) if machines.isdigit() else 1, 1)
    return 0 if "MASTER_ADDR" in environ and "MASTER_PORT" in environ else 1


def launch_options(command: Sequence[str]) -> dict[str, str]:
    """Options of an ``accelerate launch`` command line, by name with underscores; empty for any other command."""
    words = list(command)
    names = [os.path.basename(word) for word in words]
    if "accelerate" in names and "launch" in words:
        words = words[words.index("launch") + 1 :]
    elif ours := {"accelerate.commands.launch", "accelerate-launch"}.intersection(names):
        words = words[names.index(ours.pop()) + 1 :]
    else:
        return {}
    options: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in ("-m", "--module"):
            break  # what follows belongs to the script
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            options.setdefault(name[2:].replace("-", "_"), value if equals else following)
    return options


def read_parent_command() -> tuple[str, ...]:
    """Words of the parent's command line from ``/proc``; empty where that is not available."""
    try:
        with open(f"/proc/{os.getppid()}/cmdline", "rb") as stream:
            return tuple(part.decode(errors="replace") for part in stream.read().split(b"\0") if part)
    except OSError:
        return ()
