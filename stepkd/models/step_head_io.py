"""A step head beside a model's weights: ``step_head.json`` (how it scores), ``step_head.safetensors`` (classifier)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from stepkd.errors import ModelError
from stepkd.models.adapter import first_line
from stepkd.models.step_head import StepHead, StepHeadSpec
from stepkd.models.tiny import TINY_PRESETS
from stepkd.steps import StepFormat

STEP_HEAD_CONFIG, STEP_HEAD_WEIGHTS = "step_head.json", "step_head.safetensors"


@dataclass(frozen=True)
class SavedStepHead:
    """What an exported reward model's folder holds beside the language model."""

    spec: StepHeadSpec
    """How it scores steps."""
    weights: Mapping[str, Tensor] | None
    """A classifier's weights; None for label tokens."""


def step_head_from_dict(values: Mapping[str, Any]) -> StepHeadSpec:
    """Inverse of ``dataclasses.asdict``; unknown keys (from a newer version) raise ModelError."""
    layout = dict(values.get("format", {}))
    unknown = (set(values) - {f.name for f in fields(StepHeadSpec)}) | (
        set(layout) - {f.name for f in fields(StepFormat)}
    )
    if unknown:
        raise ModelError(f"unknown step head settings {sorted(unknown)}: was this written by a newer stepkd?")
    return StepHeadSpec(**{**values, "format": StepFormat(**layout), "labels": tuple(values.get("labels", ()))})


def save_step_head(head: StepHead, folder: Path) -> None:
    """Write a step head into a model folder."""
    from safetensors.torch import save_file

    text = json.dumps(asdict(head.spec), indent=2, ensure_ascii=False)
    (folder / STEP_HEAD_CONFIG).write_text(text + "\n", encoding="utf-8")
    if head.score is not None:
        weights = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
        save_file(weights, folder / STEP_HEAD_WEIGHTS)


def saved_step_head(path: str, revision: str | None = None) -> SavedStepHead | None:
    """Read the step head of a model folder or hub repository; None when there is none.

    Raises:
        ModelError: its files cannot be read, or the classifier's weights are missing.
    """
    folder = Path(path).expanduser()
    config = model_file(path, folder, STEP_HEAD_CONFIG, revision)
    if config is None:
        return None
    from safetensors.torch import load_file

    try:
        spec = step_head_from_dict(json.loads(config.read_text(encoding="utf-8")))
        if spec.kind != "classifier":
            return SavedStepHead(spec, None)
        weights = model_file(path, folder, STEP_HEAD_WEIGHTS, revision)
        if weights is None:
            raise ModelError(f"{folder} has {STEP_HEAD_CONFIG} but no {STEP_HEAD_WEIGHTS}: was the export cut off?")
        return SavedStepHead(spec, load_file(weights))
    except ModelError:
        raise
    except Exception as error:  # broken JSON, foreign settings, a torn safetensors file
        raise ModelError(f"cannot read the step head in {folder}: {first_line(error)}") from error


def model_file(path: str, folder: Path, name: str, revision: str | None) -> Path | None:
    """A file of the model: beside its weights, or (hub id) from the hub or its cache."""
    if (folder / name).is_file():
        return folder / name
    if folder.exists() or path in TINY_PRESETS or path.endswith(".gguf"):
        return None
    from transformers.utils import cached_file

    found = cached_file(
        path,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)
