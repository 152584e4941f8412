"""The folder of one training run: made once, never silently overwritten, and how ``fit --resume`` goes on from it.

- ``run.json`` is the mark of a run: kind, when, version, command, status, process, launch.
- ``config.yaml`` are the settings that it was started with, ``config-2.yaml``, ... those of every later start.
- ``checkpoints/last.ckpt`` is written every ``checkpoint.every_n_steps``, at the end and when a signal stops the run,
  ``best.ckpt`` after a validation, each whole or not at all (:mod:`stepkd.training.checkpoints`).
- ``metrics.jsonl`` is only appended to (:mod:`stepkd.runs.logger`).

What ``stepkd fit --resume`` does, in this order:

1. :mod:`stepkd.training.fit` has the settings compared with those of the last start (:func:`changed_settings`): what
   decides the next weights may change only where ``--resume_with`` names it.
2. :meth:`RunDir.open` refuses a folder that is in use or no run's, and takes ``last.ckpt``, or where that is torn or
   missing the newest whole checkpoint (:func:`find_last_checkpoint`).
3. Lightning reads it (:func:`read_checkpoint`: no code is executed) and gives each its part back: weights, optimiser,
   counters and frozen models' fingerprints, compared once more, to the module
   (:meth:`stepkd.modules.policy_module.PolicyModule.on_load_checkpoint`); the place in the data to the data module
   (:mod:`stepkd.data.batching`), which follows from the module's counters; the best score to ``BestCheckpoint``.
4. Noise is keyed by step and sample, so the run ends as one that was never interrupted: bit for bit on a CPU with one
   thread count.

Only the process of rank 0 creates, empties or marks folders. The other ranks decide from the flags and the environment
alone, so they neither trip over the folder that rank 0 has just made nor need a process group.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shlex
import shutil
import sys
import zipfile
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import stepkd
from stepkd.errors import ConfigError, MachineError, ModelError, disk_error
from stepkd.runs.files import delete, write_json
from stepkd.runs.job import ABSENT, differences, flat, some
from stepkd.runs.launcher import LaunchInfo, detect_launch
from stepkd.runs.process import check_unused, this_process
from stepkd.yaml_files import read_yaml

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
            run._begin((marker or {}) if resume else {}, launch)
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
        write = _write_anyhow if status == "failed" else write_json  # a full disk hides no error
        write(self.path / MARKER, marker)

    def abandon(self) -> bool:
        """Remove a folder in which nothing was done yet, so that a corrected command needs no flag.

        Returns:
            Whether it was removed: only when it holds nothing but what opening a fresh run wrote.
        """
        if not self.info.is_rank_zero or self.resume_from is not None:
            return False
        left = {entry.name for entry in self.path.iterdir()} - {MARKER, "config.yaml"}
        if left - {"checkpoints"} or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir())):
            return False
        shutil.rmtree(self.path)
        return True

    def _enter(self, marker: Mapping[str, Any] | None, *, resume: bool, overwrite: bool) -> str:
        """Make the folder ready, or refuse; returns the sentence for the terminal."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file, not a folder; give another --out")
        # Temporary files of an interrupted `write_json` do not make a folder "in use".
        names = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        entries = [name for name in names if not name.startswith(f".{MARKER}.")]
        if not entries:
            return f"{self.path}: nothing to resume, starting fresh" if resume else f"{self.path}: new run"
        if marker is None:
            raise ConfigError(
                f"{self.path} already exists, was not made by stepkd (it has no {MARKER}) and is not empty "
                f"({some(entries)}); stepkd neither resumes nor deletes it. Give another --out"
            )
        last = find_last_checkpoint(self.checkpoints)
        described = (
            f"kind {marker['kind']!r}, created {marker.get('created', 'unknown')}, status {marker.get('status')}, last "
            f"checkpoint {last.name if last else 'none'}"
        )
        if not resume and not overwrite:
            raise ConfigError(
                f"{self.path} already holds a run ({described}). Add --resume to continue it, --overwrite to delete it "
                "and start again, or give another --out"
            )
        if marker.get("status") == "running":
            check_unused(self.path, marker)
        if overwrite:
            _write_anyhow(self.path / MARKER, {**marker, "status": "deleting"})
            for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == MARKER):
                delete(entry)  # the marker last, so that an interrupted deletion is recognised and can be repeated
            return f"{self.path}: the earlier run ({described}) was deleted, starting fresh"
        if marker["kind"] != self.kind:
            raise ConfigError(
                f"{self.path} holds a run of kind {marker['kind']!r}, so --resume cannot continue it as {self.kind!r}; "
                "give another --out, or --overwrite to delete it"
            )
        if marker.get("status") == "deleting":
            raise ConfigError(
                f"{self.path} is half deleted: an earlier --overwrite was interrupted. Give --overwrite again to "
                "finish it, or another --out"
            )
        if last is not None:
            lost = "" if last.stem == "last" else f"{_at_step(last)} (last.ckpt is torn or missing)"
            return f"{self.path}: resuming from {last.name}{lost}"
        held = sorted(entry.name for entry in self.checkpoints.glob("*") if not entry.name.startswith("."))
        if self.kind == "fit" and (held or self._has_trained(marker)):
            raise ConfigError(
                f"{self.path} has trained and has no whole checkpoint left to resume from: {self.checkpoints} holds "
                f"{some(held) or 'nothing'}. Put one back as {self.checkpoints / 'last.ckpt'}, or give --overwrite to "
                "delete the run and start again"
            )
        return f"{self.path}: the earlier run left no checkpoint, starting from step 0"

    def _has_trained(self, marker: Mapping[str, Any]) -> bool:
        """Whether a run without a checkpoint once had one: it ended as planned, or its metrics go beyond it."""
        from stepkd.runs.logger import METRICS_FILE, read_metrics

        config = newest_config(self.path)
        every = 1 if config is None else read_yaml(config, "run's settings")["checkpoint"]["every_n_steps"]
        if every is None:  # it keeps none, and starts again whenever it is queued again before its end
            return marker.get("status") == "finished"
        if marker.get("status") in ("finished", "stopped"):
            return True
        if config is None or not (self.path / METRICS_FILE).is_file():
            return False
        return any(row["step"] + 1 > every for row in read_metrics(self.path))

    def _begin(self, earlier: Mapping[str, Any], launch: str | None) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        now = _now()
        write_json(
            self.path / MARKER,
            {
                "kind": self.kind,
                "created": earlier.get("created", now),
                "started": now,
                "starts": int(earlier.get("starts", 0)) + 1,
                "stepkd": stepkd.__version__,
                "command": shlex.join(sys.argv),
                "status": "running",
                "message": "",
                **this_process(),
                "launch": launch,
            },
        )
        self.checkpoints.mkdir(exist_ok=True)


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


def _write_anyhow(path: Path, marker: dict[str, Any]) -> None:
    """Write a marker; on a full disk in place of the one that is there, with no more than the block that it has."""
    try:
        write_json(path, marker)
    except MachineError:
        with contextlib.suppress(OSError), open(path, "r+", encoding="utf-8") as stream:
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


_FREE = re.compile(
    r"trainer\.(?!precision|limit_train_batches).*|checkpoint\.(?!monitor|mode).*|data\.(test|predict)\b.*"
    r"|(micro_batch_tokens|chunk_size|policy\.(gradient_checkpointing|allow_low_precision)|samples\b.*)"
    r"|(.+\.)?(max_rows|server|urls|gpu_memory|timeout_s|requests|engine\.(weights|completions))"
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


def changed_settings(run: Path, now: Mapping[str, Any], named: Iterable[str]) -> list[str]:
    """:func:`check_changes` of a run since its last start, where a checkpoint is left of it.

    Args:
        run: its folder.
        now: :func:`recipe_settings` of this start.
        named: as for :func:`check_changes`.
    """
    earlier = newest_config(run)
    if earlier is None or find_last_checkpoint(run / "checkpoints") is None:
        return []
    return check_changes(recipe_settings(read_yaml(earlier, "run's settings")), now, named, str(run))


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
        ``last.ckpt`` when it is whole, else of the names that end in ``.ckpt`` the whole one that was written last,
        else None. Torn files, temporary names and empty folders are passed over.
    """
    names = [each for each in folder.glob("*.ckpt") if each.name[0] != "." and _is_whole(each)]
    return max(names, key=lambda each: (each.stem == "last", each.stat().st_mtime, each.name), default=None)


def _at_step(checkpoint: Path) -> str:
    """`` at step N``, which says how much is lost; nothing where the checkpoint does not tell (a sharded one)."""
    try:
        return f" at step {read_checkpoint(checkpoint)['global_step']}"
    except (ModelError, KeyError):
        return ""


def _is_whole(checkpoint: Path) -> bool:
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
