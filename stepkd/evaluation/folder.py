"""The output folder of an evaluation: who may write into it, and what may be deleted from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from stepkd.errors import ConfigError
from stepkd.evaluation.lock import FileLock
from stepkd.evaluation.manifest import MANIFEST_NAME, RESULTS_NAME, check_resumable, read_manifest, write_manifest

SUMMARY_NAME = "summary.json"
COMPARISON_NAME = "comparison.json"
_LOCK_NAME = f"{RESULTS_NAME}.lock"
_OWN_NAMES = frozenset({MANIFEST_NAME, RESULTS_NAME, SUMMARY_NAME, COMPARISON_NAME, _LOCK_NAME})


def check_folder(out: str | Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that cannot take this evaluation, before anything slow is loaded and without changing anything.

    Args:
        out: the folder; it need not exist.
        overwrite: whether an earlier evaluation there is to be deleted.

    Raises:
        ConfigError: not a folder, files of something else in it, or (``overwrite``) more than an evaluation in it.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: give a folder")
    if not (out / MANIFEST_NAME).is_file():
        # Results without a manifest count as foreign: nothing says what they are.
        if foreign := _others(out, {_LOCK_NAME, COMPARISON_NAME}):
            raise ConfigError(
                f"{out} is not empty ({foreign}) and holds no evaluation (no {MANIFEST_NAME}): give another --out"
            )
    elif overwrite:
        read_manifest(out)  # a manifest.json of something else is not ours to delete
        if foreign := _others(out, _OWN_NAMES):
            raise ConfigError(
                f"{out} holds more than an evaluation ({foreign}), so --overwrite does not touch it: move those files "
                "away, or give another --out"
            )


def prepare_folder(out: str | Path, manifest: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Make the folder ready for this evaluation: begin it, go on with it, or delete an earlier one.

    Args:
        out: the folder.
        manifest: what decides the results.
        overwrite: delete an earlier evaluation's files first.

    Raises:
        ConfigError: the folder holds another evaluation or something else.
        StepkdError: the folder cannot be written, or another process writes an evaluation there.
    """
    out = Path(out)
    check_folder(out, overwrite=overwrite)
    if overwrite and (out / MANIFEST_NAME).is_file():
        _delete(out)
    if (out / MANIFEST_NAME).is_file():
        check_resumable(read_manifest(out), manifest)
    else:
        write_manifest(out, manifest)


def _others(out: Path, allowed: Collection[str]) -> str:
    """The first few names in the folder besides these and left-over temporary files; empty when there are none."""
    if not out.is_dir():
        return ""
    names = sorted(path.name for path in out.iterdir() if path.name not in allowed and not _is_temporary(path.name))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _is_temporary(name: str) -> bool:
    """What a kill in the middle of an atomic write leaves behind."""
    return name.endswith(".tmp") and any(name.startswith(f".{own}.") for own in _OWN_NAMES)


def _delete(out: Path) -> None:
    lock = FileLock(out / _LOCK_NAME, purpose=str(out))
    try:
        # The manifest goes last: a kill in between leaves a folder that --overwrite still accepts.
        names = (SUMMARY_NAME, COMPARISON_NAME, RESULTS_NAME, MANIFEST_NAME)
        for path in [path for path in out.iterdir() if _is_temporary(path.name)] + [out / name for name in names]:
            path.unlink(missing_ok=True)
    finally:
        lock.release()
