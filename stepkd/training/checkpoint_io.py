"""Checkpoints that are whole or not there, and that execute nothing when they are loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from stepkd.errors import disk_error
from stepkd.runs.checkpoint_files import find_last_checkpoint, read_checkpoint
from stepkd.runs.files import replaced


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Writing a checkpoint, with its failures in words.

    Raises:
        MachineError: the disk is full or the folder cannot be written; a checkpoint that was there is intact.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        last = find_last_checkpoint(path.parent)
        kept = "No checkpoint was written before. " if last is None else f"{last.name} is intact, for --resume. "
        if words := disk_error(error, path, kept):
            raise words from error
        raise


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write to a temporary file in the same folder, sync, rename; load with ``weights_only``.

    Lightning's own writer goes through the system's temporary folder, so that on another file system the last step is
    a copy, which a kill can cut in half.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint durably.

        Raises:
            MachineError: the disk is full or the folder cannot be written; the previous checkpoint is intact.
        """
        path = Path(path)
        with told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{path.name}.*.tmp"):
                left.unlink(missing_ok=True)  # of a process that was killed while it wrote
            with replaced(path) as temporary, open(temporary, "wb") as stream:
                torch.save(checkpoint, stream)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read a checkpoint; see :func:`stepkd.models.checkpoint.read_checkpoint`."""
        return read_checkpoint(path)
