"""Tiny models, trained and evaluated on the spot: what the quick start and the experiments of the claims share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GLOBAL_BATCH = 64
"""Solutions per optimiser step."""
NEW_TOKENS = 64
"""Longest sampled completion, where nothing else is said."""


def train_tiny_sft(
    folder: Path,
    *,
    start: str | Path,
    task: str,
    steps: int,
    lr: float,
    seed: int,
    noise: Mapping[str, Any] | None = None,
    demonstrations: int = 20_000,
    progress: bool = False,
    reuse: bool = False,
) -> Path:
    """Train a tiny model on generated solutions, on the CPU, and export it.

    Args:
        folder: where the run's metrics (``metrics.jsonl``) and model go; made when missing.
        start: tiny model preset, or the folder of a model to go on from.
        task: tiny-world task with its settings, for example ``modular:terms=4,modulus=10``.
        steps: optimiser steps of 64 solutions, at least 1.
        lr: peak learning rate (cosine schedule, 5% warm-up).
        seed: seed of data, order and initial weights.
        noise: slips in the demonstrations (fields of :class:`stepkd.tasks.Noise`), None for clean ones.
        demonstrations: different problems in the training set; a small task has fewer.
        progress: print the loss while training.
        reuse: return the model that an earlier call left in ``folder``, if it is whole. Only right where the folder
            belongs to these settings, as an experiment's unit folder does.

    Returns:
        The exported model folder, ``folder/model``.
    """
    model = folder / "model"
    if reuse and model.is_dir():
        return model
    from stepkd.models import PolicySpec
    from stepkd.modules import OptimizerSpec, SFTModule

    data = tiny_data(task, demonstrations, seed, noise=noise)
    module = SFTModule(
        PolicySpec(path=str(start), init_seed=seed),
        OptimizerSpec(lr=lr, schedule="cosine", warmup=0.05),
        micro_batch_tokens=16_384,
        seed=seed,
    )
    return fit_and_export(folder, module, data, steps=steps, progress=progress)


def tiny_data(
    task: str,
    n: int,
    seed: int,
    *,
    noise: Mapping[str, Any] | None = None,
    batch: int = GLOBAL_BATCH,
    split: str = "train",
) -> Any:
    """Generated solutions as a data module: for training, or for validation when the split is another one.

    Args:
        task: tiny-world task with its settings.
        n: different problems.
        seed: of problems and order.
        noise: slips (fields of :class:`stepkd.tasks.Noise`), None for none.
        batch: rows per optimiser step.
        split: ``train``, ``validation`` or ``test``.
    """
    from stepkd.data import DataSpec, StepData

    options: dict[str, Any] = {"task": task, "n": n, "seed": seed}
    if noise is not None:
        options["noise"] = dict(noise)
    spec = DataSpec(source="task", split=split, options=options)
    used: dict[str, Any] = {"train" if split == "train" else "validation": spec}
    return StepData(**used, template="task", global_batch_size=batch, max_length=128, seed=seed)


def fit_and_export(folder: Path, module: Any, data: Any, *, steps: int, progress: bool) -> Path:
    """Train in ``folder`` and export the last weights to ``folder/model``."""
    from lightning.pytorch import Trainer

    from stepkd.models.export import export_model
    from stepkd.runs.logger import JsonlLogger
    from stepkd.training.checkpoints import AtomicCheckpointIO
    from stepkd.training.progress import StepProgress

    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=JsonlLogger(folder),
        callbacks=[StepProgress(every_n_steps=100)] if progress else [],
        enable_progress_bar=progress,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=str(folder),
    )
    trainer.fit(module, data)
    checkpoint = folder / "last.ckpt"
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    trainer.save_checkpoint(checkpoint)
    return export_model(checkpoint, folder / "model", overwrite=True)


def evaluate_tiny(
    folder: Path,
    model: str | Path,
    *,
    task: str,
    problems: int,
    samples: int,
    temperature: float,
    seed: int,
    max_new_tokens: int = NEW_TOKENS,
) -> dict[str, Any]:
    """Sample a model on held-out problems of a task, on the CPU, and grade every step; resumable.

    Args:
        folder: where settings, per-problem rows and summary go; an interrupted evaluation there is gone on with.
        model: model folder or tiny preset.
        task: tiny-world task with its settings.
        problems: number of problems, at least 1; the same seed gives the same ones.
        samples: solutions per problem.
        temperature: 0 is greedy (then one sample is enough).
        seed: seed of the problems and of the sampling noise.
        max_new_tokens: longest solution.

    Returns:
        The summary (:func:`stepkd.evaluation.evaluate`); the rows are read with :func:`problem_rows`.
    """
    from stepkd.evaluation import EvaluationSpec, evaluate

    return evaluate(
        EvaluationSpec(
            model=str(model),
            benchmark="task",
            data=f'task="{task}",n={problems},seed={seed}',
            samples=samples,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            max_rows=256,
            device="cpu",
            seed=seed,
            out=str(folder),
        )
    )


def problem_rows(folder: Path) -> list[dict[str, Any]]:
    """Per-problem rows of a finished evaluation, in the problems' order."""
    from stepkd.runs.job import read_results

    return read_results(folder)


def problem_ids(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Ids of the problems of :func:`problem_rows`, as an :class:`~stepkd.claims.experiment.ArmResult` wants them."""
    return tuple(str(row["id"]) for row in rows)


def problem_metrics(rows: Sequence[Mapping[str, Any]], *, votes: Sequence[int] = ()) -> dict[str, list[Any]]:
    """Per-problem values of the metrics that every method is judged by.

    Args:
        rows: per-problem rows with step labels (:func:`problem_rows`); a sample whose labels are None counts for
            its answer only.
        votes: values of k for ``maj@k``, each from 1 to the number of samples per problem.

    Returns:
        ``pass@1`` (share of right samples), ``mean_tokens``, ``step_accuracy`` (pairs: right steps, steps),
        ``correct_with_wrong_step`` (pairs: correct samples with an incorrect step, those whose steps are labelled),
        ``clean@1`` (share of right samples without a wrong step) and ``maj@k``; one entry per problem each.
    """
    from stepkd.evaluation.metrics import maj_at_k
    from stepkd.steps.labels import tally

    metrics: dict[str, list[Any]] = {
        name: [] for name in ("pass@1", "mean_tokens", "step_accuracy", "correct_with_wrong_step", "clean@1")
    }
    metrics |= {f"maj@{k}": [] for k in votes}
    for row in rows:
        samples = row["samples"]
        right = [sample["verdict"] == "correct" for sample in samples]
        labels = [sample["step_labels"] or [] for sample in samples]
        counts = tally(right, labels)
        metrics["pass@1"].append(sum(right) / len(samples))
        metrics["mean_tokens"].append(sum(sample["tokens"] for sample in samples) / len(samples))
        metrics["step_accuracy"].append(
            [sum(steps.count(True) for steps in labels), sum(len(steps) - steps.count(None) for steps in labels)]
        )
        metrics["correct_with_wrong_step"].append([counts.flawed, counts.labelled])
        metrics["clean@1"].append((counts.correct - counts.flawed) / len(samples))
        for k in votes:
            metrics[f"maj@{k}"].append(maj_at_k([sample["vote"] for sample in samples], right, k))
    return metrics
