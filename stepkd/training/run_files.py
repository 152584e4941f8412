"""What a Trainer's run writes into its folder beside checkpoints and metrics: settings, template, completions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from stepkd.data.rows import COMPLETION, validate
from stepkd.data.templates import PromptTemplate
from stepkd.errors import disk_error
from stepkd.models.source import save_template
from stepkd.runs.logger import append


class RunFacts(Callback):
    """Tells every logger the run's settings, and writes its prompt template beside them.

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
