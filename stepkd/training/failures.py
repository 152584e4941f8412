"""What ended a run, in words: memory that ran out, or another rank that is gone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stepkd.errors import MachineError, StepkdError, disk_error

_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
_PEER = re.compile(
    r"connection closed by peer|connection reset by peer|remote process exited|ncclRemoteError|broken pipe",
    re.IGNORECASE,
)


def explained(error: BaseException, module: Any = None, last: Path | None = None) -> MachineError | None:
    """The same failure in words, where it is one of the machine and not of the code; else None.

    Args:
        error: what was raised.
        module: the training module, for its phase and settings; None before there is one.
        last: where the run keeps its last checkpoint, if it keeps one.
    """
    if words := disk_error(error):
        return words
    if not isinstance(error, RuntimeError | MemoryError) or isinstance(error, StepkdError):
        return None
    text = str(error)
    if isinstance(error, MemoryError) or _MEMORY.search(text):
        return MachineError(_memory(text, module, last))
    if _PEER.search(text):
        return MachineError(
            "another process of this run has ended, and this one waited for it: its own error says why (the launcher "
            f"reports the first that failed as the root cause). Here it came as: {_first_line(text)}"
        )
    return None


def _memory(text: str, module: Any, last: Path | None) -> str:
    phase = getattr(getattr(module, "phases", None), "interrupted", None)
    where = "" if phase is None else f" in the phase {phase.name!r}"
    now = getattr(module, "micro_batch_tokens", "unknown")
    kept = "No checkpoint was written yet. " if last is not None else ""
    if last is not None and last.is_file():
        kept = f"{last} is intact: --resume continues from it. "
    return (
        f"out of memory{where}. Three settings take less, in this order: model.init_args.micro_batch_tokens (now {now};"
        " half of it, the gradient stays the same), while sampling engine.max_rows (of VLLM engine.gpu_memory); "
        "model.init_args.policy.gradient_checkpointing: true; LoRA (policy.lora) or a sharded strategy "
        "(recipes/strategy/fsdp2.yaml) in place of all weights on every device. `stepkd doctor --recipe ...` measures "
        f"the need. {kept}({_first_line(text)})"
    )


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "no message"
