"""What the stages of the quick start share: the folder, the task, and how to train and evaluate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stepkd.errors import ConfigError


@dataclass
class Context:
    """State of one quick start."""

    out: Path
    """Run folder."""
    console: Console
    """Where to print."""
    seed: int = 0
    """Seed of data, weights and sampling."""
    scale: float = 1.0
    """Factor on every stage's number of optimiser steps and problems."""
    task: str = "modular:terms=4,modulus=10"
    """The tiny-world task: chains of three operations modulo 10, where a wrong line can still end right."""

    def steps(self, full: int) -> int:
        """Optimiser steps of a stage whose full budget is ``full``."""
        return max(2, round(full * self.scale))

    def problems(self, full: int) -> int:
        """Problems evaluated by a stage whose full budget is ``full``."""
        return max(8, round(full * self.scale))

    def model_folder(self, name: str) -> Path:
        """Folder of an exported model that an earlier stage left.

        Raises:
            ConfigError: that stage has not run.
        """
        folder = self.out / name / "model"
        if not folder.is_dir():
            raise ConfigError(f"this stage needs the model of stage {name!r}: run it first (--stages {name} ...)")
        return folder


@dataclass(frozen=True)
class Stage:
    """One step of the quick start."""

    name: str
    """Name on the command line, and of its folder."""
    title: str
    """What it does, one line for the terminal."""
    run: Callable[[Context], dict[str, Any]]
    """Does it; returns its section of the summary."""


def train_sft(context: Context, name: str, *, start: str, steps: int, noise: dict[str, Any] | None, lr: float) -> Path:
    """Train a tiny model on generated solutions and export it.

    Args:
        context: the quick start.
        name: stage and folder name.
        start: tiny model preset, or the folder of a model to go on from.
        steps: full budget in optimiser steps of 64 solutions.
        noise: slips in the demonstrations (:class:`stepkd.tasks.Noise`), None for clean ones.
        lr: peak learning rate.

    Returns:
        The exported model folder.
    """
    from stepkd.claims.tiny import train_tiny_sft

    return train_tiny_sft(
        context.out / name,
        start=start,
        task=context.task,
        steps=context.steps(steps),
        lr=lr,
        seed=context.seed,
        noise=noise,
        progress=True,
    )


def evaluate_task(context: Context, name: str, model: Path, *, samples: int, temperature: float) -> dict[str, Any]:
    """Evaluate a model on held-out problems of the task; returns the summary's metrics."""
    from stepkd.claims.tiny import evaluate_tiny

    summary = evaluate_tiny(
        context.out / "evaluations" / name,
        model,
        task=context.task,
        problems=context.problems(200),
        samples=samples,
        temperature=temperature,
        seed=context.seed,
    )
    return {key: summary[key] for key in ("problems", "samples", "metrics")}


def student_labels(context: Context) -> tuple[Path, dict[str, Any]]:
    """The student's own solutions, every step labelled by the exact checker; drawn once for all stages."""
    from stepkd.claims.tiny_reward import label_tiny

    return label_tiny(
        context.out / "labels",
        model=context.model_folder("student"),
        seed=context.seed,
        problems=f'task:task="{context.task}",n={context.problems(2000)},seed={context.seed},split=train',
        labeller="checker",
        samples=4,
    )


def compare_samples(context: Context, models: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Sample models on the held-out problems (what an earlier stage sampled is used again) and show them side by side.

    Args:
        context: the quick start.
        models: name (that of its stage) -> model folder.

    Returns:
        Name -> the summary's metrics.
    """
    table = Table(title="held-out problems, 4 samples each, 95% intervals", title_justify="left")
    table.add_column("model")
    for column in ("right, sampled", "steps right", "right answer, wrong step"):
        table.add_column(column, justify="right")
    sections = {}
    for name, folder in models.items():
        sections[name] = evaluate_task(context, f"{name}-sampled", folder, samples=4, temperature=1.0)
        metrics = sections[name]["metrics"]
        shown = (metrics["pass@1"], metrics["step_accuracy"], metrics["correct_with_wrong_step"])
        table.add_row(name.replace("_", "-"), *(percent(metric) for metric in shown))
    context.console.print(table)
    return sections


def percent(metric: dict[str, Any]) -> str:
    """``93.0%`` with ``(88.6 to 95.8)`` below it; a dash where the metric is undefined."""
    if metric["value"] is None:
        return "-"
    interval = "" if metric["low"] is None else f"\n({100 * metric['low']:.1f} to {100 * metric['high']:.1f})"
    return f"{100 * metric['value']:.1f}%{interval}"
