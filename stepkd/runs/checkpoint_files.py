"""Which checkpoint to continue from: the newest whole one."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

from stepkd.errors import ModelError

_LAST = re.compile(r"^last(?:-v(\d+))?(?:\.ckpt)?$")
_STEP = re.compile(r"(?:^|[-_])step[=_-]?(\d+)")


def find_last_checkpoint(folder: Path) -> Path | None:
    """Find the checkpoint to continue from.

    Args:
        folder: the folder of checkpoints; it need not exist.

    Returns:
        ``last.ckpt`` (of ``last-vN.ckpt`` the highest N) when it is whole, else of ``best.ckpt`` and those with
        ``step=N`` in their names the whole one with the highest step, else None. Torn files, temporary names and empty
        folders are passed over.
    """
    if not folder.is_dir():
        return None
    ranked: list[tuple[bool, int, str]] = []
    for entry in folder.iterdir():
        if entry.name.startswith(".") or entry.name.endswith((".tmp", ".partial")):
            continue
        if last := _LAST.match(entry.name):
            ranked.append((True, int(last.group(1) or 0), entry.name))
        elif (step := step_of(entry)) is not None:
            ranked.append((False, step, entry.name))
    for _, _, name in sorted(ranked, reverse=True):
        if is_whole(folder / name):
            return folder / name
    return None


def step_of(checkpoint: Path) -> int | None:
    """The optimiser step in a checkpoint's name, or that ``best.ckpt`` or ``last.ckpt`` holds; None where none is."""
    if step := _STEP.search(checkpoint.name):
        return int(step.group(1))
    if checkpoint.name not in ("best.ckpt", "last.ckpt") or not checkpoint.is_file():
        return None
    try:
        return int(read_checkpoint(checkpoint)["global_step"])
    except (ModelError, KeyError):
        return None


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, as far as its form tells.

    A file must be in torch's zip format, whose directory is written last. A folder must hold something, and a folder
    of torch's distributed shards must hold their index, which is also written last.
    """
    if checkpoint.is_file():
        return zipfile.is_zipfile(checkpoint)
    files = [entry for entry in checkpoint.rglob("*") if entry.is_file()] if checkpoint.is_dir() else []
    if any(entry.suffix == ".distcp" for entry in files):
        return any(entry.name == ".metadata" for entry in files)
    return any(entry.stat().st_size > 0 for entry in files)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a ``.ckpt`` file written by a stepkd run.

    Raises:
        ModelError: no such file, not a whole checkpoint, or one that asks to execute code.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than tensors and plain values, and loading it would execute code: refused. Only load "
            "checkpoints that stepkd wrote"
        ) from error
    except Exception as error:  # torch raises many classes for a torn or foreign file
        raise ModelError(f"{path} is not a whole checkpoint ({type(error).__name__}): use an earlier one") from error
    extra = checkpoint.get("stepkd") if isinstance(checkpoint, dict) else None
    if not isinstance(extra, dict) or "policy" not in extra or "state_dict" not in checkpoint:
        raise ModelError(f"{path} is not a stepkd checkpoint: it has no 'stepkd' section")
    return checkpoint
