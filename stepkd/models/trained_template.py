"""The prompt template that a model was trained with, and the one that a job asks it under."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepkd.data.templates import PromptTemplate, get_template, read_template, template_name
from stepkd.errors import ConfigError, DataError, ModelError
from stepkd.models.source import check_source, find_checkpoint
from stepkd.models.step_head_io import model_file
from stepkd.models.tiny import TINY_PRESETS
from stepkd.runs.checkpoint_files import read_checkpoint
from stepkd.runs.files import write_json
from stepkd.runs.launcher import detect_launch

TEMPLATE_NAME = "prompt_template.json"
logger = logging.getLogger(__name__)


def trained_template(path: str | Path, revision: str | None = None) -> PromptTemplate | None:
    """The prompt template of a run folder, a checkpoint, an export, an adapter folder or a hub repository.

    Args:
        path: the model as commands name it.
        revision: hub revision.

    Returns:
        The template; None where nothing says it.

    Raises:
        ModelError: a file that cannot be read.
    """
    saved = None
    with contextlib.suppress(OSError, ModelError):  # neither a folder nor a repository: whoever loads it says so
        if str(path) not in TINY_PRESETS:
            check_source(str(path), revision)
        saved = model_file(str(path), Path(path).expanduser(), TEMPLATE_NAME, revision)
    try:
        if saved is not None:
            return read_template(saved)
        if (checkpoint := find_checkpoint(Path(path).expanduser())) is None:
            return None
        if values := read_checkpoint(checkpoint)["stepkd"].get("template"):
            return PromptTemplate(**values)
        return _of_recipe(checkpoint)
    except (TypeError, ConfigError, DataError) as error:
        raise ModelError(f"the prompt template of {path} cannot be used ({error}): give one (--template)") from error


def _of_recipe(checkpoint: Path) -> PromptTemplate | None:
    """That of the ``config.yaml`` beside a checkpoint of version 0.1, which holds none."""
    import yaml

    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    if not (run / "config.yaml").is_file():
        return None
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    value: Any = (config or {}).get("data", {}).get("init_args", {}).get("template")
    if isinstance(value, Mapping):
        return PromptTemplate(**value.get("init_args", value))
    return None if value is None else get_template(value)


def template_for(model: str | Path, benchmark: str, given: str | PromptTemplate | None = None) -> PromptTemplate:
    """The prompt template that a job asks a model under.

    Args:
        model: the model as commands name it.
        benchmark: name of the benchmark's own template.
        given: what the user asked for, which wins; None: the one that the model was trained with, else the benchmark's.
            Where the two differ, one line says so.

    Raises:
        ConfigError, DataError, ModelError: a template that cannot be used.
    """
    own = get_template(benchmark)
    trained = trained_template(model) if given is None else get_template(given)
    if given is None and trained is not None and trained != own and detect_launch(os.environ).is_rank_zero:
        logger.warning(
            "prompt template: %s, with which %s was trained (the benchmark's own: --template %s)",
            template_name(trained),
            model,
            benchmark,
        )
    return own if trained is None else trained


def save_template(template: PromptTemplate, folder: Path) -> None:
    """Write a template into a model or run folder."""
    write_json(folder / TEMPLATE_NAME, dataclasses.asdict(template))
