"""What a run writes into its folder: checkpoints, its prompt template, and what ``predict`` samples.

Checkpoints are written whole or not at all: ``last.ckpt`` every so many steps, at the end and when a signal stops the
run, ``best.ckpt`` after a validation. :mod:`stepkd.runs.rundir` says what a run is resumed from, and how.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint

from stepkd.data.rows import COMPLETION, validate
from stepkd.data.templates import PromptTemplate
from stepkd.errors import check_bounds, disk_error
from stepkd.models.source import save_template
from stepkd.modules.validation import SHOWN
from stepkd.runs.files import replaced
from stepkd.runs.logger import append, log_table
from stepkd.runs.process import STOP_REQUEST, Preempted
from stepkd.runs.rundir import find_last_checkpoint, read_checkpoint


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written."""

    every_n_steps: int | None = 100
    """``last.ckpt`` is written every so many optimiser steps, 1 or more, and at the end; null: never, so that there is
    nothing to resume or export."""
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
        """Read a checkpoint; see :func:`stepkd.runs.rundir.read_checkpoint`."""
        return read_checkpoint(path)


class LastCheckpoint(Checkpoint):
    """Write ``last.ckpt`` whenever another ``every_n_steps`` optimiser steps are done, and before a run is stopped.

    When a validation follows the step, the checkpoint is written after it, so that a run killed while it validates goes
    back to before the step and validates again: ``best.ckpt`` then ends the same as without the kill. A batch that
    serves several optimiser steps counts as soon as it crosses a multiple.

    SIGTERM is a request while a run trains, whose state is saved when all ranks have agreed to stop. Lightning's own
    handler is replaced: it broadcasts from within the signal, in the middle of other communication, and stops between
    batches only, without a checkpoint.

    Args:
        path: the file.
        every_n_steps: optimiser steps between checkpoints, >= 1; None: none is ever written.
    """

    def __init__(self, path: Path, every_n_steps: int | None) -> None:
        self.path = path
        self.every_n_steps = every_n_steps
        self._saved_at: int | None = None
        self._due = False
        self._stop_listening: Callable[[], None] = lambda: None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where the run stands, and listen; Lightning has installed its handler by now."""
        self._saved_at = trainer.global_step
        self._stop_listening = STOP_REQUEST.listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save now, or after the validation that follows."""
        assert self._saved_at is not None
        if self.every_n_steps and trainer.global_step // self.every_n_steps > self._saved_at // self.every_n_steps:
            self._due = True
            if not _validation_follows(trainer):
                self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what waited for the validation."""
        if self._due and not trainer.sanity_checking:
            self.save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, on all ranks, when a request to stop is why the run ends."""
        if isinstance(exception, Preempted):
            self.save(trainer)
        self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop listening, once, before Lightning puts back the handlers that were there before it."""
        self._stop_listening()
        self._stop_listening = lambda: None

    def save(self, trainer: Trainer) -> None:
        """Write it now, on all ranks.

        Raises:
            MachineError: the disk is full or the folder cannot be written; what was there is intact.
        """
        self._due = False
        self._saved_at = trainer.global_step
        if self.every_n_steps:
            trainer.save_checkpoint(self.path, weights_only=False)


def _validation_follows(trainer: Trainer) -> bool:
    """Whether the Trainer validates between this batch and the next: its own rule, asked where it will ask itself."""
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    return fetcher is not None and loop.epoch_loop._should_check_val_fx(fetcher)


class BestCheckpoint(ModelCheckpoint):
    """Lightning's best-checkpoint keeping, for run folders that may have been moved.

    Lightning forgets the best score when the folder's path changed since the checkpoint, and the next validation would
    replace a better ``best.ckpt``.
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
        """Restore the best score; its file lies here, too, and Lightning deletes none in the old place."""
        super().load_state_dict({**state_dict, "dirpath": str(self.dirpath)})


class RunFacts(Callback):
    """Tells every logger the run's settings and what validation samples, and writes the prompt template beside them.

    Args:
        folder: the run folder.
        settings: of the run, under dotted names.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = settings

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before Lightning saves the loggers without settings."""
        for logger in trainer.loggers if trainer.enable_autolog_hparams else ():
            logger.log_hyperparams(self.settings)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the loggers what was sampled."""
        sampled = vars(pl_module).get("sampled_accuracy")  # made where it first samples
        if sampled is None:
            return
        rows, sampled.shown = sampled.shown, []
        if rows and trainer.is_global_zero and not trainer.sanity_checking:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped  # that of the metrics
            for logger in trainer.loggers:
                log_table(logger, "val/samples", SHOWN, rows, step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Not before, because a folder in which nothing has begun is removed when the run fails."""
        template = getattr(getattr(trainer, "datamodule", None), "template", None)
        if trainer.is_global_zero and isinstance(template, PromptTemplate):
            save_template(template, self.folder)


class CompletionFile(Callback):
    """Append the completion rows that ``predict_step`` returns to a JSON Lines file.

    Args:
        path: the file; other ranks than 0 write beside it, with their number in the name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._stream: IO[bytes] | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this rank's file."""
        if trainer.world_size > 1:
            self.path = self.path.with_name(f"{self.path.stem}-{trainer.global_rank}{self.path.suffix}")
        self._stream = open(self.path, "wb", buffering=0)  # noqa: SIM115 (open over many batches)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the batch's rows and let them reach the disk."""
        assert self._stream is not None
        try:
            for row in outputs:
                validate(row, COMPLETION, path=self.path, line=self.rows + 1)
                append(self._stream, json.dumps(row) + "\n")
                self.rows += 1
            os.fsync(self._stream.fileno())
        except OSError as error:
            kept = f"The {self.rows} rows before are whole. "
            raise disk_error(error, self.path, kept) or error from None

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the file and say where it is."""
        if self._stream is not None:
            self._stream.close()
            print(f"{self.rows} completions in {self.path}")
