"""Progress of a run: one live line in a terminal, plain lines elsewhere (:class:`~stepkd.runs.progress.Line`).

Both say the same: what is being done now (rollout, scoring, training, validation, ...) and how far it is, the
optimiser step, the time left, and every metric that the module logs with ``prog_bar=True``. It listens to the module's
``phases`` (:class:`~stepkd.runs.progress.PhaseTracker`) when it has one.

Lightning's own RichProgressBar was tried: under manual optimisation it counts batches for steps, its time left is that
of an epoch, and in a log file it writes nothing before the training ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from typing_extensions import override

from stepkd.runs.progress import Line, Pace, PhaseTracker, duration, metric

_STAGES = {
    "train": "training",
    "validate": "validation",
    "test": "testing",
    "predict": "predicting",
    "sanity_check": "sanity check",
}


class StepProgress(ProgressBar):
    """Progress display for every Trainer entry point; add it to the Trainer's callbacks and Lightning adds no other.

    Where the line cannot be redrawn there is one per tenth of the training, and where nothing was said for half a
    minute.
    """

    def __init__(self) -> None:
        super().__init__()
        self.console = Console()
        self._clock: Callable[[], float] = time.monotonic
        self._display: Line | None = None  # between setup and teardown, on rank 0
        self._close: Callable[[], None] | None = None
        self._tracker = PhaseTracker()
        self._batch: tuple[int, float] | None = None
        self._pace: Pace | None = None
        self._batches = 0
        self._tenth = 0

    # ---- life cycle ------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.disable()
        if not trainer.is_global_zero:
            return
        self._batch = self._pace = None
        self._display = Line(self.console, clock=self._clock)
        self._tracker = getattr(pl_module, "phases", None) or PhaseTracker()
        self._close = self._tracker.subscribe(lambda event, _: self._draw(urgent=event == "start"))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.disable()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.disable()

    @override
    def disable(self) -> None:
        """No output until the next :meth:`setup`."""
        if self._close is not None:
            self._close()
        if self._display is not None:
            self._display.keep("")  # what is printed next begins on an empty line
        self._close = self._display = None

    @property
    def is_enabled(self) -> bool:
        """Whether there is output now; ``LightningModule.print`` asks, though Lightning's base class lacks it."""
        return self._display is not None

    # ---- what the Trainer and the module's phases tell ---------------------------------------------------------------

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batch, self._batches = None, 0
        self._pace = Pace(trainer.global_step, self._clock)
        self._tenth = self._tenths()
        self._draw()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        before, self._tenth = self._tenth, self._tenths()
        self._draw(stays=self._tenth > before)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._pace is not None:
            steps = trainer.global_step - self._pace.first
            self.print("  ".join([f"trained {steps} steps in {duration(self._pace.seconds)}", *self._metrics()]))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batch = (0, _evaluation_batches(trainer))
        self._draw(urgent=True)

    @override
    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        done, total = self._batch or (0, _evaluation_batches(trainer))
        self._batch = (done + 1, total)
        self._draw()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(stays=not trainer.sanity_checking)
        self._batch = None

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_validation_end

    # ---- output ----------------------------------------------------------------------------------------------------

    def _total(self) -> int | None:
        """Optimiser steps of the whole fit, or None when nothing limits it."""
        trainer = self.trainer
        limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
        batches = trainer.num_training_batches
        if trainer.max_epochs is not None and trainer.max_epochs >= 0 and not math.isinf(batches):
            # On-policy methods with inner steps take several a batch; the small term keeps rounding from adding one.
            first = 0 if self._pace is None else self._pace.first
            a_batch = (trainer.global_step - first) / self._batches if self._batches else 1.0
            limits.append(math.ceil(trainer.max_epochs * batches * (a_batch or 1.0) - 1e-6))
        return min(limits) if limits else None

    def _tenths(self) -> int:
        """Tenths of the fit that are done; 0 when nothing limits it."""
        return self.trainer.global_step * 10 // total if (total := self._total()) else 0

    def _what(self) -> str:
        """``rollout 64/128``, ``micro-batch 1/4``, ``validation 2/10 > grading 3``, ``training``, ..."""
        stage = self.trainer.state.stage
        name = "preparing" if stage is None else _STAGES.get(stage.value, str(stage.value))
        phases = self._tracker.stack
        if self._batch is None:  # while it trains, the phase says more than the stage
            return " > ".join(map(str, phases)) or name
        done, total = self._batch
        counted = f"{name} {done}" if math.isinf(total) else f"{name} {done}/{int(total)}"
        return " > ".join([counted, *(str(phase) for phase in phases if phase.name != name)])

    def _metrics(self) -> list[str]:
        return [f"{name} {metric(name, value)}" for name, value in self.trainer.progress_bar_metrics.items()]

    def _draw(self, *, urgent: bool = False, stays: bool = False) -> None:
        """Show what is being done, the step, the time left and the metrics."""
        if self._display is None:
            return
        parts = [self._what()]
        if self._pace is not None:
            step, total = self.trainer.global_step, self._total()
            parts.append(f"step {step}" if total is None else f"step {step}/{total}{self._pace.left(step, total)}")
        self._display.show("  ".join([*parts, *self._metrics()]), urgent=urgent, stays=stays)

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print text that stays: above the live line, where there is one."""
        if self._display is not None:
            self._display.keep(kwargs.get("sep", " ").join(map(str, args)) + kwargs.get("end", "\n"))


def _evaluation_batches(trainer: Trainer) -> float:
    """Batches of the evaluation that runs now, over all its loaders; may be infinite."""
    stage = "" if trainer.state.stage is None else trainer.state.stage.value
    of_stage: dict[str, Any] = {"test": trainer.num_test_batches, "predict": trainer.num_predict_batches}
    of_stage["sanity_check"] = trainer.num_sanity_val_batches
    batches = of_stage.get(stage, trainer.num_val_batches)
    return float(sum(batches)) if isinstance(batches, list) else float(batches)
