"""Progress of a run: one live line in a terminal, plain lines elsewhere.

Both say the same: what is being done now (rollout, scoring, training, validation, ...) and how far it is, the
optimiser step, the time left, and every metric that the module logs with ``prog_bar=True``. It works with manual
optimisation, where Lightning's own bars count batches, and listens to the module's ``phases``
(:class:`~stepkd.runs.phases.PhaseTracker`) when it has one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from typing_extensions import override

from stepkd.errors import ConfigError
from stepkd.runs.phases import Phase, PhaseTracker
from stepkd.runs.progress import duration, metric

_REFRESH_SECONDS = 0.1
_BAR_WIDTH = 20
_STAGES = {
    "train": "training",
    "validate": "validation",
    "test": "testing",
    "predict": "predicting",
    "sanity_check": "sanity check",
}


class StepProgress(ProgressBar):
    """Progress display for every Trainer entry point; add it to the Trainer's callbacks and Lightning adds no other.

    Args:
        every_n_steps: plain lines: one whenever this many more optimiser steps are done; at least 1.
        every_n_seconds: plain lines: also one when something advances this long after the last line; above 0.
        mode: "live" (one line, redrawn), "plain", or "auto": live only in a terminal that is not a CI log.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        every_n_seconds: float = 30.0,
        mode: Literal["auto", "live", "plain"] = "auto",
    ) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ConfigError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if not every_n_seconds > 0:
            raise ConfigError(f"every_n_seconds must be above 0, got {every_n_seconds}")
        if mode not in ("auto", "live", "plain"):
            raise ConfigError(f"mode must be 'auto', 'live' or 'plain', got {mode!r}")
        self.every_n_steps = every_n_steps
        self.every_n_seconds = every_n_seconds
        self.mode = mode
        self.console = Console()
        self._clock: Callable[[], float] = time.monotonic
        self._enabled = True
        self._open = False
        self._live: Live | None = None
        self._tracker: PhaseTracker | None = None
        self._unsubscribe: Callable[[], None] | None = None
        self._batch: tuple[int, float] | None = None
        self._start: tuple[float, int] | None = None
        self._batches = 0
        self._steps_per_batch = 1.0
        self._last_drawn = -math.inf
        self._last_line = -math.inf
        self._last_step_line = 0

    # --- life cycle ---

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._close()
        if not trainer.is_global_zero:
            return
        self._open = True
        self._batch = self._start = None
        self._last_drawn = -math.inf
        self._last_line = self._clock()
        tracker = getattr(pl_module, "phases", None)
        if isinstance(tracker, PhaseTracker):
            self._tracker = tracker
            self._unsubscribe = tracker.subscribe(self)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        """End all output until the next :meth:`setup`."""
        self._open = False
        if self._unsubscribe is not None:
            self._unsubscribe()
        self._unsubscribe = self._tracker = None
        self._stop_live()

    def _stop_live(self) -> None:
        """Clear the live line and give the terminal its cursor and its stdout back."""
        live, self._live = self._live, None
        if live is not None:
            with suppress(OSError):
                live.stop()

    @override
    def disable(self) -> None:
        self._enabled = False
        self._stop_live()

    @override
    def enable(self) -> None:
        self._enabled = True

    @property
    def is_enabled(self) -> bool:
        """Whether there is output now; ``LightningModule.print`` asks, though Lightning's base class lacks it."""
        return self._enabled and self._open

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the live line."""
        self._say(kwargs.get("sep", " ").join(str(arg) for arg in args), end=kwargs.get("end", "\n"))

    # --- what the trainer tells ---

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batch = None
        self._start = (self._clock(), trainer.global_step)
        self._batches, self._steps_per_batch = 0, 1.0
        self._last_step_line = trainer.global_step
        self._draw()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._start is not None:
            self._batches += 1
            self._steps_per_batch = (trainer.global_step - self._start[1]) / self._batches or 1.0
        due = trainer.global_step // self.every_n_steps > self._last_step_line // self.every_n_steps
        if due or trainer.global_step == total_steps(self.trainer, self._steps_per_batch):
            self._last_step_line = trainer.global_step
            self._draw(line=True)
        else:
            self._draw()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._start is not None:
            seconds = self._clock() - self._start[0]
            steps = trainer.global_step - self._start[1]
            self._say("  ".join([f"trained {steps} steps in {duration(seconds)}", *self._metrics()]))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batch = (0, evaluation_batches(self.trainer))
        self._draw(urgent=True)

    @override
    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        done, total = self._batch or (0, evaluation_batches(self.trainer))
        self._batch = (done + 1, total)
        self._draw()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(line=not self.trainer.sanity_checking)
        self._batch = None

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_validation_end

    # --- what the module's phases tell ---

    def on_phase_start(self, tracker: PhaseTracker, phase: Phase) -> None:
        """Show the new phase at once."""
        self._draw(urgent=True)

    def on_phase_advance(self, tracker: PhaseTracker, phase: Phase) -> None:
        """Show how far the phase is, or the one that is open again."""
        self._draw()

    on_phase_end = on_phase_advance

    # --- output ---

    def _facts(self) -> list[str]:
        """What stands after the phase: step, time left, metrics."""
        found: list[str] = []
        if self._start is not None:
            step, total = self.trainer.global_step, total_steps(self.trainer, self._steps_per_batch)
            found.append(f"step {step}" if total is None else f"step {step}/{total}")
            started, first = self._start
            if total is not None and total >= step > first:
                found.append(f"{duration((self._clock() - started) / (step - first) * (total - step))} left")
        return [*found, *self._metrics()]

    def _metrics(self) -> list[str]:
        return [f"{name} {metric(name, value)}" for name, value in self.trainer.progress_bar_metrics.items()]

    def _is_live(self) -> bool:
        if self.mode != "auto":
            return self.mode == "live"
        in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
        return self.console.is_terminal and not self.console.is_dumb_terminal and not in_ci

    def _draw(self, *, urgent: bool = False, line: bool = False) -> None:
        """Redraw the live line, or print a plain one when it is due."""
        if not self.is_enabled:
            return
        now = self._clock()
        try:
            if self._is_live():
                if urgent or line or now - self._last_drawn >= _REFRESH_SECONDS:
                    self._last_drawn = now
                    self._redraw()
            elif line or now - self._last_line >= self.every_n_seconds:
                self._last_line = now
                self._write("  ".join([what_is_done(self.trainer, self._tracker, self._batch), *self._facts()]))
        except OSError:
            # The reader of our output went away (a closed pipe, a hung-up terminal): that must not end the training.
            self.disable()

    def _redraw(self) -> None:
        if self._live is None:
            # No refresh thread: a fork (data workers, graders) while it held a lock would hang the child.
            live = Live(console=self.console, auto_refresh=False, transient=True)
            live.start()
            self._live = live
        self._live.update(self._render(), refresh=True)

    def _render(self) -> Group:
        total = total_steps(self.trainer, self._steps_per_batch) if self._start is not None else None
        bar = ""
        if total:
            filled = min(_BAR_WIDTH, _BAR_WIDTH * self.trainer.global_step // total)
            bar = "━" * filled + "─" * (_BAR_WIDTH - filled) + "  "
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(what_is_done(self.trainer, self._tracker, self._batch), style="bold cyan")
        text.append("  " + bar, style="green")
        text.append("  ".join(self._facts()))
        return Group(text)

    def _say(self, text: str, end: str = "\n") -> None:
        """Print text that stays, in either mode."""
        if not self.is_enabled:
            return
        try:
            if self._live is not None:
                self.console.print(text, end=end, markup=False, highlight=False, soft_wrap=True)
            else:
                self._write(text, end)
        except OSError:
            self.disable()

    def _write(self, text: str, end: str = "\n") -> None:
        stream = self.console.file
        stream.write(text + end)
        stream.flush()


def what_is_done(trainer: Trainer, tracker: PhaseTracker | None, batch: tuple[int, float] | None) -> str:
    """Name what is being done now.

    Args:
        trainer: its stage is the outermost name.
        tracker: the module's phases, or None.
        batch: batches done and batches in all (may be infinite) of an evaluation, or None outside one.

    Returns:
        "rollout 64/128", "micro-batch 1/4", "validation 2/10 > grading 3", "training", ...
    """
    stage = trainer.state.stage
    name = "preparing" if stage is None else _STAGES.get(stage.value, str(stage.value))
    phases = [] if tracker is None else list(tracker.stack)
    if batch is None:
        # While it trains, the phase says more than the stage.
        return " > ".join(str(phase) for phase in phases) or name
    done, total = batch
    counted = f"{name} {done}" if math.isinf(total) else f"{name} {done}/{int(total)}"
    return " > ".join([counted, *(str(phase) for phase in phases if phase.name != name)])


def total_steps(trainer: Trainer, steps_per_batch: float = 1.0) -> int | None:
    """Optimiser steps of the whole fit, or None when nothing limits it.

    Args:
        trainer: its ``max_steps`` and ``max_epochs`` are the limits.
        steps_per_batch: optimiser steps that one batch has served so far (more than 1 for on-policy methods with inner
            steps); it turns a limit in epochs into steps.
    """
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    batches = trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and not math.isinf(batches):
        # The small term keeps rounding noise from adding a step.
        limits.append(math.ceil(trainer.max_epochs * batches * steps_per_batch - 1e-6))
    return min(limits) if limits else None


def evaluation_batches(trainer: Trainer) -> float:
    """Batches of the evaluation that runs now, over all its loaders; may be infinite."""
    stage = trainer.state.stage
    batches: Any
    if trainer.sanity_checking:
        batches = trainer.num_sanity_val_batches
    elif stage is not None and stage.value == "test":
        batches = trainer.num_test_batches
    elif stage is not None and stage.value == "predict":
        batches = trainer.num_predict_batches
    else:
        batches = trainer.num_val_batches
    return float(sum(batches)) if isinstance(batches, list) else float(batches)
