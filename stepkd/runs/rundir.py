"""The folder that holds one run: made once, never silently overwritten, resumed on request.

A folder made by stepkd carries ``run.json`` (kind, when, version, command, status, process, launch). Only the process
of rank 0 creates, empties or marks folders. The other ranks decide from the flags and the environment alone, so they
neither trip over the folder that rank 0 has just made nor need a process group.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import stepkd
from stepkd.errors import ConfigError, MachineError, disk_error
from stepkd.runs.files import delete, write_json
from stepkd.runs.launcher import LaunchInfo, detect_launch
from stepkd.runs.process import live_process, this_process
from stepkd.runs.resume import find_last_checkpoint, newest_config, step_of

MARKER = "run.json"


class RunDir:
    """An opened run folder.

    Attributes:
        path: the folder.
        kind: what runs in it, "fit" or "predict".
        resume_from: the checkpoint to continue from, or None for a fresh start; the same on every rank.
        message: one sentence for the terminal about what was found and done.
    """

    def __init__(self, path: Path, kind: str, info: LaunchInfo) -> None:
        self.path = path
        self.kind = kind
        self.info = info
        self.resume_from: Path | None = None
        self.message = ""

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        kind: str = "fit",
        environ: Mapping[str, str] = os.environ,
    ) -> RunDir:
        """Create the folder, or open it again as the flags allow.

        A relaunch by the scheduler itself (torchrun ``--max-restarts``, SLURM requeue) resumes its own folder without a
        flag, and does not repeat ``--overwrite``.

        Args:
            path: the run folder (``--out``).
            resume: continue the run in the folder; starts fresh when there is nothing to continue.
            overwrite: delete what an earlier stepkd run left in the folder; other folders are never touched.
            kind: what will run; a folder of another kind is not resumed.
            environ: environment variables.

        Raises:
            ConfigError: both flags given, the folder holds something and no flag says what to do with it, it is in use
                by a live process, is not stepkd's, or is of another kind.
            MachineError: it cannot be written.
        """
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite contradict each other; give one of them")
        run = cls(Path(path).expanduser().absolute(), kind, detect_launch(environ))
        launch, restarted = _launch_identity(environ, run.info)
        if not run.info.is_rank_zero:
            # Rank 0 raises if this assumption does not hold, and the launcher then stops every rank.
            run.resume_from = find_last_checkpoint(run.checkpoints) if resume or restarted else None
            return run
        marker = read_marker(run.path)
        if restarted and marker is not None and marker.get("launch") == launch:
            resume, overwrite = True, False
        try:
            run.message = run._enter(marker, resume=resume, overwrite=overwrite)
            run.resume_from = find_last_checkpoint(run.checkpoints) if resume else None
            run._begin(marker if resume else None, launch)
        except (OSError, MachineError) as error:
            with contextlib.suppress(OSError):
                run.path.rmdir()  # if nothing is in it
            raise disk_error(error, run.path) or error from None
        return run

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def mark(self, status: Literal["finished", "stopped", "failed"], message: str = "") -> None:
        """Record in ``run.json`` how the run ended (rank 0 only).

        Args:
            status: ended as planned, stopped on request and ready to be resumed, or ended early.
            message: why.

        Raises:
            MachineError: the file cannot be written; not of a failure, which has an error of its own.
        """
        if not self.info.is_rank_zero:
            return
        marker = read_marker(self.path) or {"kind": self.kind, "stepkd": stepkd.__version__}
        marker.update(status=status, message=message, ended=_now())
        try:
            write_json(self.path / MARKER, marker)
        except (OSError, MachineError):
            if status != "failed":
                raise
            with contextlib.suppress(OSError):  # a full disk has room where the old text stands, and hides no error
                _overwrite(self.path / MARKER, marker)

    def abandon(self) -> bool:
        """Remove a folder in which nothing was done yet, so that a corrected command needs no flag.

        Returns:
            Whether it was removed: only when it holds nothing but what opening a fresh run wrote.
        """
        if not self.info.is_rank_zero or self.resume_from is not None:
            return False
        left = {entry.name for entry in self.path.iterdir()} - {MARKER, "config.yaml", "hparams.json"}
        if left - {"checkpoints"} or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir())):
            return False
        shutil.rmtree(self.path)
        return True

    def _enter(self, marker: dict[str, Any] | None, *, resume: bool, overwrite: bool) -> str:
        """Make the folder ready, or refuse; returns the sentence for the terminal."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file, not a folder; give another --out")
        # Temporary files of an interrupted `write_json` do not make a folder "in use".
        names = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        entries = [name for name in names if not name.startswith(f".{MARKER}.")]
        if not entries:
            return f"{self.path}: nothing to resume, starting fresh" if resume else f"{self.path}: new run"
        if marker is None:
            some = ", ".join(entries[:3]) + (", ..." if len(entries) > 3 else "")
            raise ConfigError(
                f"{self.path} already exists, was not made by stepkd (it has no {MARKER}) and is not empty ({some}); "
                "stepkd neither resumes nor deletes it. Give another --out"
            )
        is_running = marker.get("status") == "running"
        if (resume or overwrite) and is_running and (user := live_process(marker)) is not None:
            raise ConfigError(
                f"{self.path} is in use by process {user} on this machine (command: {marker.get('command', '?')}); "
                "wait for it, stop it, or give another --out"
            )
        if resume:
            return self._check_resume(marker)
        if overwrite:
            described = self._described(marker)
            self._empty(marker)
            return f"{self.path}: the earlier run ({described}) was deleted, starting fresh"
        raise ConfigError(
            f"{self.path} already holds a run ({self._described(marker)}). Add --resume to continue it, "
            "--overwrite to delete it and start again, or give another --out"
        )

    def _check_resume(self, marker: Mapping[str, Any]) -> str:
        if marker.get("kind") != self.kind:
            raise ConfigError(
                f"{self.path} holds a run of kind {marker.get('kind')!r}, so --resume cannot continue it as "
                f"{self.kind!r}; give another --out, or --overwrite to delete it"
            )
        if marker.get("status") == "deleting":
            raise ConfigError(
                f"{self.path} is half deleted: an earlier --overwrite was interrupted. Give --overwrite again to "
                "finish it, or another --out"
            )
        last = find_last_checkpoint(self.checkpoints)
        if last is None:
            held = sorted(entry.name for entry in self.checkpoints.glob("*") if not entry.name.startswith("."))
            if self.kind == "fit" and (held or self._has_trained(marker)):
                raise ConfigError(
                    f"{self.path} has trained and has no whole checkpoint left to resume from: {self.checkpoints} "
                    f"holds {', '.join(held[:5]) or 'nothing'}. Put one back as "
                    f"{self.checkpoints / 'last.ckpt'}, or give --overwrite to delete the run and start again"
                )
            return f"{self.path}: the earlier run left no checkpoint, starting from step 0"
        if last.name.startswith("last"):
            return f"{self.path}: resuming from {last.name}"
        lost = "is torn" if (self.checkpoints / "last.ckpt").exists() else "is missing"
        return f"{self.path}: last.ckpt {lost}, resuming from {last.name} at step {step_of(last)}"

    def _has_trained(self, marker: Mapping[str, Any]) -> bool:
        """Whether a run without a checkpoint once had one: it ended as planned, or its metrics go beyond it."""
        from stepkd.runs.logger import METRICS_FILE, read_metrics
        from stepkd.yaml_files import read_yaml

        if marker.get("status") in ("finished", "stopped"):
            return True
        config = newest_config(self.path)
        if config is None or not (self.path / METRICS_FILE).is_file():
            return False
        every = read_yaml(config, "run's settings")["checkpoint"]["every_n_steps"]
        return any(row["step"] + 1 > every for row in read_metrics(self.path))

    def _begin(self, earlier: Mapping[str, Any] | None, launch: str | None) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        now = _now()
        write_json(
            self.path / MARKER,
            {
                "kind": self.kind,
                "created": now if earlier is None else earlier.get("created", now),
                "started": now,
                "starts": 1 if earlier is None else int(earlier.get("starts", 1)) + 1,
                "stepkd": stepkd.__version__,
                "command": shlex.join(sys.argv),
                "status": "running",
                "message": "",
                **this_process(),
                "launch": launch,
            },
        )
        self.checkpoints.mkdir(exist_ok=True)

    def _described(self, marker: Mapping[str, Any]) -> str:
        last = find_last_checkpoint(self.checkpoints)
        return (
            f"kind {marker.get('kind')!r}, created {marker.get('created', 'unknown')}, status {marker.get('status')}, "
            f"last checkpoint {last.name if last else 'none'}"
        )

    def _empty(self, marker: dict[str, Any]) -> None:
        """Delete the content, the marker last, so that an interrupted deletion can be recognised and repeated."""
        write_json(self.path / MARKER, {**marker, "status": "deleting"})
        for entry in [entry for entry in self.path.iterdir() if entry.name != MARKER]:
            delete(entry)
        (self.path / MARKER).unlink()


def free_path(path: Path) -> Path:
    """The path itself, or the first numbered one (``name-2``, ``name-3``, ...) at which there is nothing."""
    free, number = path, 1
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def read_marker(path: Path) -> dict[str, Any] | None:
    """Read ``run.json`` of a run folder; None when there is none or it is not stepkd's."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and "stepkd" in marker and "kind" in marker else None


def _overwrite(path: Path, marker: dict[str, Any]) -> None:
    """Put a marker in place of one that is there: no new file, and no more than the block that it has."""
    with open(path, "r+", encoding="utf-8") as stream:
        stream.write(json.dumps(marker | {name: marker.get(name, "")[:500] for name in ("message", "command")}))
        stream.truncate()


def _launch_identity(environ: Mapping[str, str], info: LaunchInfo) -> tuple[str | None, bool]:
    """A token that a scheduler's own relaunch shares with the first launch, and whether this is such a relaunch.

    accelerate gives every job the elastic run id "none", so the agent's private log folder (part of
    ``TORCHELASTIC_ERROR_FILE``, the same for every restart of one agent) is part of the token.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        agent = environ.get("TORCHELASTIC_ERROR_FILE", "").partition("/attempt_")[0]
        restarts = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return f"elastic:{environ['TORCHELASTIC_RUN_ID']}:{agent}", restarts not in ("", "0")
    if info.launcher == "slurm" and environ.get("SLURM_JOB_ID"):
        return f"slurm:{environ['SLURM_JOB_ID']}", environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    return None, False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
