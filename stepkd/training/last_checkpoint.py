"""``last.ckpt``, where a run goes on after it was stopped, and ``best.ckpt``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from stepkd.runs.checkpoint_files import is_whole
from stepkd.runs.files import replaced
from stepkd.training.checkpoint_io import told


class LastCheckpoint(Checkpoint):
    """Write ``last.ckpt`` whenever another ``every_n_steps`` optimiser steps are done.

    When a validation follows the step, the checkpoint is written after it, so that a run killed while it validates goes
    back to before the step and validates again: ``best.ckpt`` then ends the same as without the kill. A batch that
    serves several optimiser steps counts as soon as it crosses a multiple.

    Args:
        path: the file.
        every_n_steps: optimiser steps between checkpoints, >= 1.
        keep_previous: how many checkpoints before the last one stay, as ``step=N.ckpt``, >= 0.
    """

    def __init__(self, path: Path, every_n_steps: int, keep_previous: int = 0) -> None:
        self.path = path
        self.every_n_steps = every_n_steps
        self.keep_previous = keep_previous
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
        """Write it now, on all ranks; the one before stays where earlier ones are kept.

        Raises:
            MachineError: the disk is full or the folder cannot be written; what was there is intact.
        """
        self._due = False
        if trainer.is_global_zero and self.keep_previous and self._saved_at not in (None, trainer.global_step):
            with told(self.path):
                self._keep(f"step={self._saved_at}.ckpt")
        self._saved_at = trainer.global_step
        trainer.save_checkpoint(self.path, weights_only=False)

    def _keep(self, name: str) -> None:
        """Give the checkpoint that is about to be replaced a name of its own, and drop the oldest."""
        kept = self.path.with_name(name)
        # A torn one is of no use, and the run may have gone on from the whole one of that name.
        if self.path.is_file() and is_whole(self.path) and not kept.exists():
            try:
                os.link(self.path, kept)
            except OSError:  # a file system without links
                for left in kept.parent.glob(".step=*.tmp"):
                    left.unlink(missing_ok=True)  # of a process that was killed while it copied
                with replaced(kept) as temporary:
                    shutil.copyfile(self.path, temporary)
        steps = [path for path in self.path.parent.glob("step=*.ckpt") if path.stem.partition("=")[2].isdigit()]
        steps.sort(key=lambda path: int(path.stem.partition("=")[2]))
        for old in steps[: -self.keep_previous]:
            old.unlink(missing_ok=True)


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
