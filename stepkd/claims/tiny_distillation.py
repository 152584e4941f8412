"""Tiny students distilled from tiny teachers: what the quick start and the claims share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stepkd.claims.tiny import GLOBAL_BATCH, NEW_TOKENS, fit_and_export, tiny_data


def distil_tiny(
    folder: Path,
    *,
    start: str | Path,
    teacher: str | Path,
    task: str,
    demonstrations: int,
    steps: int,
    lr: float,
    seed: int,
    divergence: Mapping[str, Any] | None = None,
    student: float = 1.0,
    of_teacher: float = 0.0,
    cache_k: int | None = None,
    noise: Mapping[str, Any] | None = None,
    progress: bool = False,
    reuse: bool = False,
) -> Path:
    """Distil a tiny student from a tiny teacher, on the CPU, and export it.

    Args:
        folder: where the run's metrics and model go; made when missing.
        start: folder of the model to go on from.
        teacher: folder of the model to learn from.
        task: tiny-world task with its settings.
        demonstrations: different problems in the training set.
        steps: optimiser steps of 64 completions.
        lr: peak learning rate (cosine schedule, 5% warm-up).
        seed: seed of data, order and sampling.
        divergence: fields of :class:`stepkd.modules.DivergenceSpec`.
        student, of_teacher: share of batches sampled by the student, and of the others by the teacher; the rest are
            the data's solutions.
        cache_k: learn from a cache of so many of the teacher's likeliest tokens, written first.
        noise: slips in the data's solutions (fields of :class:`stepkd.tasks.Noise`).
        progress: print the loss while training.
        reuse: return the model that an earlier call left in ``folder``, if it is whole.

    Returns:
        The exported model folder, ``folder/model``.
    """
    model = folder / "model"
    if reuse and model.is_dir():
        return model
    from stepkd.modules import DivergenceSpec, GKDModule, OptimizerSpec, SourceSpec
    from stepkd.teachers import TeacherSpec

    data = tiny_data(task, demonstrations, seed, noise=noise)
    cache = None
    if cache_k is not None:
        cache = folder / "cache"
        _write_cache(cache, teacher, start, data, cache_k)
        data = tiny_data(task, demonstrations, seed, noise=noise)
    source = SourceSpec(student=student, teacher=of_teacher, max_new_tokens=NEW_TOKENS, max_rows=GLOBAL_BATCH)
    module = GKDModule(
        _policy(start),
        TeacherSpec(path=str(teacher)) if cache is None else TeacherSpec(cache=str(cache)),
        divergence=DivergenceSpec(**(divergence or {})),
        source=source,
        optimizer=OptimizerSpec(lr=lr, schedule="cosine", warmup=0.05),
        micro_batch_tokens=16_384,
        seed=seed,
    )
    return fit_and_export(folder, module, data, steps=steps, progress=progress)


def tiny_fidelity(model: str | Path, teacher: str | Path, *, task: str, problems: int, seed: int) -> dict[str, float]:
    """How like its teacher a model is on held-out problems (:mod:`stepkd.modules.fidelity`), names without a prefix."""
    from lightning.pytorch import Trainer

    from stepkd.modules import FidelitySpec, GKDModule, SourceSpec
    from stepkd.teachers import TeacherSpec

    module = GKDModule(
        _policy(model),
        TeacherSpec(path=str(teacher)),
        source=SourceSpec(student=0.0),
        fidelity=FidelitySpec(max_new_tokens=NEW_TOKENS, max_rows=256),
        micro_batch_tokens=16_384,
        seed=seed,
    )
    data = tiny_data(task, problems, seed, split="test")
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    (found,) = trainer.validate(module, data, verbose=False)
    prefix = "val/fidelity/"
    return {name.removeprefix(prefix): float(value) for name, value in found.items() if name.startswith(prefix)}


def _policy(path: str | Path) -> Any:
    from stepkd.models import PolicySpec

    return PolicySpec(path=str(path))


def _write_cache(folder: Path, teacher: str | Path, student: str | Path, data: Any, top_k: int) -> None:
    """The teacher's likeliest tokens for all of the data's solutions."""
    from stepkd.models import load_tokenizer
    from stepkd.teachers import LocalTeacher, TeacherSpec, write_cache

    tokenizer = load_tokenizer(_policy(student))
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=tokenizer), global_rank=0, world_size=1)
    data.setup("fit")
    local = LocalTeacher(TeacherSpec(path=str(teacher)))
    local.bind(tokenizer)
    write_cache(folder, local, data.examples["train"], top_k=top_k)
