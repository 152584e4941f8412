"""Leaves ``last.ckpt`` behind when a run is asked to stop."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from stepkd.runs.preemption import STOP_REQUEST, Preempted
from stepkd.training.last_checkpoint import LastCheckpoint


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

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening, before Lightning puts back the handlers that were there before it."""
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._restore is not None:
            self._restore()
            self._restore = None
