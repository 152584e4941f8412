"""Checkpoints: written whole or not at all, loaded without executing anything, and when: ``last.ckpt``, ``best.ckpt``,
and before a run stops on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint

from stepkd.errors import check_bounds, disk_error
from stepkd.runs.files import replaced
from stepkd.runs.process import STOP_REQUEST, Preempted
from stepkd.runs.resume import find_last_checkpoint, read_checkpoint


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written."""

    every_n_steps: int = 100
    """``last.ckpt`` is written every so many optimiser steps, and at the end."""
    monitor: str | None = "val/loss"
    """``best.ckpt`` is the checkpoint with the best value of this; needs validation data. Null: there is none."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller (``min``) or larger (``max``) value is better."""
    preempted_exit_code: int = 0
    """Exit code of a run that SIGTERM stopped with its state saved, 0 to 255. Some schedulers read 0 as finished and do
    not start the job again. Under torchrun and accelerate the agent's own code is what they see."""

    def __post_init__(self) -> None:
        check_bounds("checkpoint.", self, every_n_steps="[1, inf)", preempted_exit_code="[0, 255]")


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
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{path.name}.*.tmp"):
                left.unlink(missing_ok=True)  # of a process that was killed while it wrote
            with replaced(path) as temporary, open(temporary, "wb") as stream:
                torch.save(checkpoint, stream)
        except (OSError, RuntimeError) as error:
            last = find_last_checkpoint(path.parent)
            kept = "No checkpoint was written before. " if last is None else f"{last.name} is intact, for --resume. "
            if words := disk_error(error, path, kept):
                raise words from error
            raise

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read a checkpoint; see :func:`stepkd.runs.resume.read_checkpoint`."""
        return read_checkpoint(path)


class LastCheckpoint(Checkpoint):
    """Write ``last.ckpt`` whenever another ``every_n_steps`` optimiser steps are done.

    When a validation follows the step, the checkpoint is written after it, so that a run killed while it validates goes
    back to before the step and validates again: ``best.ckpt`` then ends the same as without the kill. A batch that
    serves several optimiser steps counts as soon as it crosses a multiple.

    Args:
        path: the file.
        every_n_steps: optimiser steps between checkpoints, >= 1.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self.path = path
        self.every_n_steps = every_n_steps
        self._saved_at: int | None = None
        self._due = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where the run stands."""
        self._saved_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save now, or after the validation that follows."""
        assert self._saved_at is not None
        if trainer.global_step // self.every_n_steps > self._saved_at // self.every_n_steps:
            self._due = True
            if not _validation_follows(trainer):
                self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what waited for the validation."""
        if self._due and not trainer.sanity_checking:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write it now, on all ranks.

        Raises:
            MachineError: the disk is full or the folder cannot be written; what was there is intact.
        """
        self._due = False
        self._saved_at = trainer.global_step
        trainer.save_checkpoint(self.path, weights_only=False)


def _validation_follows(trainer: Trainer) -> bool:
    """Whether the Trainer validates between this batch and the next: its own rule, asked where it will ask itself."""
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    return fetcher is not None and loop.epoch_loop._should_check_val_fx(fetcher)


class BestCheckpoint(ModelCheckpoint):
    """Lightning's best-checkpoint keeping, for run folders that may have been moved.

    Lightning forgets the best score when the folder's path changed since the checkpoint, and the next validation would
    replace a better ``best.ckpt``. Here the paths are rewritten to the folder's new place.
    """

    @classmethod
    def of(cls, folder: Path, spec: CheckpointConfig) -> BestCheckpoint:
        """The one of a run: ``best.ckpt`` in the folder of its checkpoints."""
        return cls(
            dirpath=str(folder),
            filename="best",
            monitor=spec.monitor,
            mode=spec.mode,
            save_top_k=1,
            enable_version_counter=False,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score under this folder's path."""
        here = str(self.dirpath)

        def moved(path: str) -> str:
            return str(Path(here) / Path(path).name) if path else path

        changed = {
            name: moved(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")
        }
        scores = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **changed, "best_k_models": scores, "dirpath": here})


class SaveWhenPreempted(Callback):
    """Take SIGTERM as a request while a run trains, and save its state when all ranks have agreed to stop.

    Lightning's own handler is replaced: it broadcasts from within the signal, in the middle of other communication, and
    stops between batches only, without a checkpoint.

    Args:
        last: writes the checkpoint.
    """

    def __init__(self, last: LastCheckpoint) -> None:
        self.last = last
        self._restore: Callable[[], None] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen; Lightning has installed its handler by now."""
        self._restore = STOP_REQUEST.listen()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, on all ranks, when that is why the run ends."""
        if isinstance(exception, Preempted):
            self.last.save(trainer)
        self._stop_listening()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop listening, before Lightning puts back the handlers that were there before it."""
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._restore is not None:
            self._restore()
            self._restore = None
