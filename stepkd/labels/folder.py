"""The folder of a job of ``stepkd label``, shared by several ranks that do not talk to each other.

Rank 0 begins the folder, goes on with it, or empties it; the others wait for the manifest that it leaves.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stepkd.data.spec import LABELS_NAME, PAIRS_NAME
from stepkd.errors import ConfigError, StepkdError
from stepkd.evaluation.folder import SUMMARY_NAME
from stepkd.evaluation.lock import FileLock
from stepkd.evaluation.manifest import MANIFEST_NAME, check_resumable, read_manifest, write_manifest
from stepkd.labels.shards import SHARD_FOLDER

THRESHOLD_NAME = "threshold.json"
KIND, PAIR_KIND = "labels", "pairs"
KINDS = {KIND: "labelling job", PAIR_KIND: "pair job"}
"""What the folder's job makes, and how messages call it."""

_ROW_NAMES = {KIND: LABELS_NAME, PAIR_KIND: PAIRS_NAME}
_COMMON_NAMES = frozenset({MANIFEST_NAME, SUMMARY_NAME, THRESHOLD_NAME, SHARD_FOLDER})


def check_job_folder(out: str | Path, *, overwrite: bool = False, kind: str = KIND) -> None:
    """Refuse a folder that cannot take a job of a kind, before anything slow is loaded and without changing anything.

    Raises:
        ConfigError: not a folder, files of something else in it, or (``overwrite``) more than such a job in it.
    """
    out, job, own = Path(out), KINDS[kind], _own_names(kind)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: give a folder")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    foreign = [name for name in names if name not in own and not _is_temporary(name, own)]
    if not (out / MANIFEST_NAME).is_file():
        if found := foreign or [name for name in names if name in own]:
            raise ConfigError(
                f"{out} is not empty ({', '.join(found[:3])}) and holds no {job} (no {MANIFEST_NAME}): give "
                "another --out"
            )
    elif read_manifest(out).get("kind") != kind:
        raise ConfigError(f"{out} holds something else than a {job}: give another --out")
    elif overwrite and foreign:
        raise ConfigError(
            f"{out} holds more than a {job} ({', '.join(foreign[:3])}), so --overwrite does not touch it: move "
            "those files away, or give another --out"
        )


def prepare_job_folder(
    out: str | Path,
    manifest: Mapping[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    launch: str | None = None,
    overwrite: bool = False,
    wait_s: float = 1800.0,
    say: Callable[[str], None] | None = None,
) -> None:
    """Make the folder ready for this job: begin it, go on with it, or delete an earlier one (rank 0), or wait for that.

    Args:
        out: the folder, on a file system that all ranks share.
        manifest: what decides the result; its ``kind`` says what the job makes.
        rank, world_size: this process among those at work.
        launch: a word that all ranks of this launch share and no other launch has; None: not known.
        overwrite: delete an earlier job's files first; with several ranks this needs ``launch``. A rank that is started
            again by the same launch goes on in place of deleting twice.
        wait_s: longest wait for rank 0 (s).
        say: told what is waited for.

    Raises:
        ConfigError: the folder holds a job with other settings (they are named), or something else.
        StepkdError: the folder cannot be written, another process writes there, or rank 0 does not come.
    """
    out, kind = Path(out), str(manifest["kind"])
    if overwrite and world_size > 1 and launch is None:
        raise ConfigError(
            f"--overwrite with {world_size} processes that share no run id cannot tell who deletes what: delete {out} "
            "yourself, or start with torchrun --standalone"
        )
    if rank != 0:
        _await_manifest(out, rank, launch if overwrite else None, wait_s, say)
    check_job_folder(out, overwrite=overwrite, kind=kind)
    found = (out / MANIFEST_NAME).is_file()
    if rank == 0 and overwrite and found and (launch is None or read_manifest(out).get("launch") != launch):
        _empty(out, _own_names(kind))
        found = False
    if found:
        check_resumable(_settings(read_manifest(out)), _settings(manifest))
    if rank == 0 and not found:
        write_manifest(out, dict(manifest) | {"launch": launch})


def _settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if name != "launch"}


def _await_manifest(out: Path, rank: int, launch: str | None, wait_s: float, say: Callable[[str], None] | None) -> None:
    start, told = time.monotonic(), False
    while True:
        if (out / MANIFEST_NAME).is_file() and (launch is None or read_manifest(out).get("launch") == launch):
            return
        if time.monotonic() - start >= wait_s:
            raise StepkdError(f"rank 0 did not begin {out} within {wait_s:g} s: is it running, on the same disk?")
        if say is not None and not told:
            say(f"rank {rank} waits for rank 0 to begin {out}")
            told = True
        time.sleep(min(0.2, wait_s))


def _own_names(kind: str) -> frozenset[str]:
    return _COMMON_NAMES | {_ROW_NAMES[kind]}


def _is_temporary(name: str, own_names: frozenset[str]) -> bool:
    """What a kill in the middle of an atomic write leaves behind."""
    return name.endswith(".tmp") and any(name.startswith(f".{own}.") for own in own_names)


def _empty(out: Path, own_names: frozenset[str]) -> None:
    """Delete a job's files, the manifest last, so that an interrupted deletion can be repeated."""
    locks = [
        FileLock(path.with_name(path.name + ".lock"), purpose=str(path))
        for path in sorted((out / SHARD_FOLDER).glob("*.jsonl"))
    ]
    try:
        for path in [path for path in out.iterdir() if _is_temporary(path.name, own_names)]:
            path.unlink()
        for name in sorted(own_names - {MANIFEST_NAME, SHARD_FOLDER}):
            (out / name).unlink(missing_ok=True)
        for path in sorted((out / SHARD_FOLDER).glob("*.jsonl")):
            path.unlink()
    finally:
        for lock in locks:
            lock.release()
    shutil.rmtree(out / SHARD_FOLDER, ignore_errors=True)
    (out / MANIFEST_NAME).unlink(missing_ok=True)
