"""What a progress display says, read off the trainer and the module's phases: no state, no output."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer

from stepkd.launch.phases import PhaseTracker

_STAGES = {
    "train": "training",
    "validate": "validation",
    "test": "testing",
    "predict": "predicting",
    "sanity_check": "sanity check",
}


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


def duration(seconds: float) -> str:
    """Write a time as m:ss, or h:mm:ss from one hour on."""
    whole = max(round(seconds), 0)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def metric(name: str, value: Any) -> str:
    """Write a metric for the eye: counts whole, rates (``tokens/s``, ``..._per_second``) short, the rest 4 digits."""
    number = value.item() if hasattr(value, "item") else value
    if not isinstance(number, (int, float)):
        return str(number)
    if name.endswith(("/s", "_per_second", "_per_s")) and abs(number) >= 1000:
        scaled, unit = (number / 1e6, "M") if abs(number) >= 1e6 else (number / 1e3, "k")
        return f"{scaled:.3g}{unit}"
    return str(number) if isinstance(number, int) else f"{number:.4g}"
