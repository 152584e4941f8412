"""What ``accelerate launch`` told this process, and which of it Lightning would silently ignore.

Read off accelerate 1.15 (``accelerate/utils/launch.py``) and off child processes started with it:

- ``--multi_gpu``, FSDP, Megatron and single-node DeepSpeed start a torch elastic agent: the child sees
  ``TORCHELASTIC_RUN_ID``, ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``LOCAL_WORLD_SIZE``.
- Every other mode starts *one* child and always sets ``ACCELERATE_USE_CPU`` (``True`` or ``False``), which the
  elastic modes never set. The process count itself is not passed on. Its only trace is that ``MASTER_ADDR`` and
  ``MASTER_PORT`` are set when more than one process or machine was asked for. Both can also be inherited from the
  user's shell, so where the parent's command line is readable (Linux, ``/proc``) and names a count, that one decides.
- ``ACCELERATE_MIXED_PRECISION=no`` and ``ACCELERATE_DYNAMO_BACKEND=NO`` are always set: the defaults, which pass.
- ``--gradient_accumulation_steps`` reaches the environment only with DeepSpeed; users also export it by hand.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

_TRUE = frozenset({"1", "true", "t", "yes", "y", "on"})

_FSDP2 = "`trainer.strategy` with class_path lightning.pytorch.strategies.ModelParallelStrategy (FSDP2)"


def is_true(value: str | None) -> bool:
    """Whether accelerate reads the text of a variable as true."""
    return value is not None and value.strip().lower() in _TRUE


def ignored_settings(environ: Mapping[str, str]) -> list[str]:
    """List the accelerate settings in force that Lightning would ignore, each with what to do instead.

    Args:
        environ: environment variables of this process.

    Returns:
        One sentence or two per setting, empty when all are at their neutral value.
    """
    found = [_mixed_precision(environ), _accumulation(environ), _dynamo(environ)]
    found.append(
        _sharding(
            environ,
            "FSDP",
            "ACCELERATE_USE_FSDP",
            ("FSDP_",),
            f"Launch with `accelerate launch --multi_gpu` (or torchrun) and put sharding in the recipe: {_FSDP2}.",
        )
    )
    found.append(
        _sharding(
            environ,
            "DeepSpeed",
            "ACCELERATE_USE_DEEPSPEED",
            ("ACCELERATE_DEEPSPEED_",),
            "Launch with `accelerate launch --multi_gpu` (or torchrun) and put the strategy in the recipe: "
            f"{_FSDP2}, or lightning.pytorch.strategies.DeepSpeedStrategy (not tested by this project).",
        )
    )
    found.append(
        _sharding(
            environ,
            "Megatron-LM",
            "ACCELERATE_USE_MEGATRON_LM",
            ("MEGATRON_LM_",),
            f"stepkd has no Megatron support. Launch with `accelerate launch --multi_gpu`; to shard, set {_FSDP2}.",
        )
    )
    found.append(
        _sharding(
            environ,
            "a parallelism config",
            "ACCELERATE_USE_PARALLELISM_CONFIG",
            ("PARALLELISM_CONFIG_",),
            f"Launch without `--use_parallelism_config` and put the mesh in the recipe: {_FSDP2}.",
        )
    )
    return [sentence for sentence in found if sentence]


def _mixed_precision(environ: Mapping[str, str]) -> str | None:
    value = environ.get("ACCELERATE_MIXED_PRECISION", "").strip().lower()
    if value in ("", "no"):
        return None
    advice = {
        "bf16": "put `trainer.precision: bf16-mixed` in the recipe",
        "fp16": "put `trainer.precision: bf16-mixed` in the recipe (float16 is not supported)",
    }.get(value, "put `trainer.precision: bf16-mixed` in the recipe")
    return (
        f"accelerate asks for mixed precision {value!r} (ACCELERATE_MIXED_PRECISION), which Lightning ignores. "
        f"Launch with `--mixed_precision no` and {advice}."
    )


def _accumulation(environ: Mapping[str, str]) -> str | None:
    value = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "").strip()
    if value in ("", "1", "auto"):
        return None
    return (
        f"accelerate asks for gradient accumulation over {value} batches (ACCELERATE_GRADIENT_ACCUMULATION_STEPS), "
        "which Lightning ignores. Unset it, and set the global batch size in the recipe's `data` section: one batch "
        "is one optimiser step, and stepkd splits it into micro-batches that fit in memory."
    )


def _dynamo(environ: Mapping[str, str]) -> str | None:
    value = environ.get("ACCELERATE_DYNAMO_BACKEND", "").strip()
    if value.lower() in ("", "no"):
        return None
    return (
        f"accelerate asks for compilation with the dynamo backend {value!r} (ACCELERATE_DYNAMO_BACKEND), which "
        "Lightning ignores. Launch with `--dynamo_backend no`; nothing in the recipe needs to change."
    )


def _sharding(environ: Mapping[str, str], what: str, flag: str, prefixes: tuple[str, ...], advice: str) -> str | None:
    seen = sorted(name for name, value in environ.items() if value and name.startswith(prefixes))
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
        f"loads weights. {advice}"
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
    asked = _counts_in(parent_command)
    if asked is not None:
        return asked
    return 0 if "MASTER_ADDR" in environ and "MASTER_PORT" in environ else 1


def _counts_in(command: Sequence[str]) -> int | None:
    """The process count named by an ``accelerate launch`` command line, or None."""
    words = list(command)
    if "launch" in words and any(os.path.basename(word) == "accelerate" for word in words):
        words = words[words.index("launch") + 1 :]
    elif any(word in ("accelerate.commands.launch", "accelerate-launch") for word in map(os.path.basename, words)):
        pass
    else:
        return None
    values: dict[str, int] = {}
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        name = name.replace("-", "_").lstrip("_")
        if not word.startswith("--") or name not in ("num_processes", "num_machines") or name in values:
            continue
        text = value if equals else (words[index + 1] if index + 1 < len(words) else "")
        if text.isdigit():
            values[name] = int(text)
    if "num_processes" not in values:
        return None
    return max(values["num_processes"], values.get("num_machines", 1), 1)


def read_parent_command() -> tuple[str, ...]:
    """Words of the parent's command line from ``/proc``; empty where that is not available."""
    try:
        with open(f"/proc/{os.getppid()}/cmdline", "rb") as stream:
            return tuple(part.decode(errors="replace") for part in stream.read().split(b"\0") if part)
    except OSError:
        return ()
