"""Tiny policies trained on their own labelled solutions or pairs: what the quick start and the claims share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from stepkd.claims.tiny import fit_and_export

Method = Literal["kto", "step_kto", "dpo"]
BATCH = 128
"""Solutions (or pairs) per optimiser step."""


def train_tiny_preference(
    folder: Path,
    *,
    method: Method,
    start: str | Path,
    rows: Path,
    steps: int,
    lr: float,
    seed: int,
    settings: Mapping[str, Any] | None = None,
    labels: Mapping[str, Any] | None = None,
    reference: str | Path | None = None,
    global_batch_size: int = BATCH,
    allow_one_class: bool = False,
    progress: bool = False,
    reuse: bool = False,
) -> Path:
    """Train a tiny policy by KTO, Step-KTO or DPO, on the CPU, and export it.

    Args:
        folder: where the run's metrics and model go; made when missing.
        method: ``kto`` and ``step_kto`` read labelled rollouts, ``dpo`` pairs (of steps too).
        start: folder of the model to go on from.
        rows: file of labelled rollouts or pairs.
        steps: optimiser steps, at least 1.
        lr: peak learning rate (cosine schedule, 10% warm-up).
        seed: seed of the order.
        settings: further arguments of the module (beta, reduction, ...).
        labels: fields of :class:`stepkd.data.LabelRule`.
        reference: the frozen model; None: ``start``.
        global_batch_size: solutions or pairs per step.
        allow_one_class: train although all labels agree (scaled-down runs).
        progress: print the loss while training.
        reuse: return the model that an earlier call left in ``folder``, if it is whole.

    Returns:
        The exported model folder, ``folder/model``.
    """
    model = folder / "model"
    if reuse and model.is_dir():
        return model
    from stepkd.data import DataSpec, FeedbackData, LabelRule, PairData
    from stepkd.models import PolicySpec
    from stepkd.modules import DPOModule, KTOModule, OptimizerSpec, ReferenceSpec, StepKTOModule

    common: dict[str, Any] = {
        "train": DataSpec(source="rows", path=str(rows)),
        "template": "task",
        "global_batch_size": global_batch_size,
        "max_length": 128,
        "seed": seed,
    }
    data: Any
    if method == "dpo":
        data = PairData(**common)
    else:
        rule = LabelRule(**{"after_error": "keep", **(labels or {})})
        data = FeedbackData(**common, labels=rule, allow_one_class=allow_one_class)
    module = {"kto": KTOModule, "step_kto": StepKTOModule, "dpo": DPOModule}[method](
        PolicySpec(path=str(start)),
        reference=ReferenceSpec(path=None if reference is None else str(reference)),
        optimizer=OptimizerSpec(lr=lr, schedule="cosine", warmup=0.1),
        micro_batch_tokens=16_384,
        seed=seed,
        **(settings or {}),
    )
    return fit_and_export(folder, module, data, steps=steps, progress=progress)
