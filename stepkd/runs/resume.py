"""Resuming: the newest whole checkpoint, and which settings may change; what decides the next weights is refused."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stepkd.errors import ConfigError, ModelError
from stepkd.runs.job import ABSENT, differences, flat

_STEP = re.compile(r"(?:^|[-_])step[=_-]?(\d+)")
_FREE = re.compile(
    r"trainer\.(?!precision|limit_train_batches).*|checkpoint\.(?!monitor|mode).*|data\.(test|predict)\b.*"
    r"|(micro_batch_tokens|chunk_size|policy\.(gradient_checkpointing|allow_low_precision)|samples\b.*)"
    r"|(.+\.)?(max_rows|server|url|gpu_memory|group_port|timeout_s|requests)"
)
"""Settings that a resumed run takes as they are: how long it runs, what it logs, on what hardware."""


def short_name(key: str) -> str:
    """A setting of a recipe under the name that the module itself gives it."""
    return re.sub(r"^model\.init_args\.|\binit_args\.", "", key).replace("seed_everything", "seed")


def recipe_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`flat` settings of a ``config.yaml``, under short names; the seeds that are linked to one are that one."""
    linked = ("model.init_args.seed", "data.init_args.seed")
    found = {short_name(key): value for key, value in flat(config).items() if key not in linked}
    if found.get("trainer.precision") is None:
        found["trainer.precision"] = "32-true"
    return found


def check_changes(then: Mapping[str, Any], now: Mapping[str, Any], named: Iterable[str], run: str) -> list[str]:
    """Compare the settings of a run with those that it is to be resumed with.

    Args:
        then, now: dotted names and values.
        named: settings, or groups of them, that may change although they decide what the run learns.
        run: what is resumed, for the message.

    Returns:
        One line per setting that changes.

    Raises:
        ConfigError: a setting that decides what the run learns differs and is not named.
    """
    free: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, (old, new) in differences(then, now).items():
        if ABSENT in (old, new) and any(value in (None, {}, []) for value in (old, new)):
            continue  # a group that was null, or a setting that a version lacks
        allowed = any(name == each or name.startswith(f"{each}.") for each in named)
        (free if allowed or _FREE.fullmatch(name) else refused)[name] = f"{name}: {_said(old)} then, {_said(new)} now"
    if refused:
        raise ConfigError(
            f"{run} cannot be resumed, because what decides its next batches or weights changed:\n  "
            + "\n  ".join(refused.values())
            + f"\nGive the old settings again, name what you mean to change (--resume_with {','.join(refused)}), "
            "or start a new run in another --out"
        )
    return list(free.values())


def _said(value: Any) -> str:
    text = "not set" if value == ABSENT else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def newest_config(folder: Path) -> Path | None:
    """The settings that a run was last started with: of ``config.yaml``, ``config-2.yaml``, ... the last."""
    found = [path for path in folder.glob("config*.yaml") if re.fullmatch(r"config(-\d+)?\.yaml", path.name)]
    return max(found, key=lambda path: int(path.stem.partition("-")[2] or 1), default=None)


def find_last_checkpoint(folder: Path) -> Path | None:
    """Find the checkpoint to continue from.

    Args:
        folder: the folder of checkpoints; it need not exist.

    Returns:
        ``last.ckpt`` when it is whole, else of ``best.ckpt`` and those with ``step=N`` in their names the whole one
        with the highest step, else None. Torn files, temporary names and empty folders are passed over.
    """
    if is_whole(last := folder / "last.ckpt"):
        return last
    entries = [each for each in folder.iterdir() if each.name[0] != "." and is_whole(each)] if folder.is_dir() else []
    steps = {each: step for each in entries if (step := step_of(each)) is not None}
    return max(steps, key=lambda each: (steps[each], each.name), default=None)


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

    A file must be in torch's zip format, whose directory is written last; a folder (of DeepSpeed) must hold something.
    """
    if checkpoint.is_dir():
        return any(entry.is_file() and entry.stat().st_size > 0 for entry in checkpoint.rglob("*"))
    return zipfile.is_zipfile(checkpoint)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a ``.ckpt`` file written by a stepkd run.

    Raises:
        ModelError: no such file, not a whole checkpoint, one of stepkd 0.1, or one that asks to execute code.
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
    if extra.get("format") == 1:
        raise ModelError(f"{path} was written by stepkd 0.1: export it with that version, exports still load")
    return checkpoint
