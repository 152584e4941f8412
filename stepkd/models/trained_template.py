"""The prompt template that a model was trained with: in a run's ``config.yaml``, in an export's own file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepkd.data.templates import PromptTemplate, get_template
from stepkd.errors import ConfigError, ModelError
from stepkd.models.checkpoint import find_checkpoint

TEMPLATE_NAME = "prompt_template.json"


def trained_template(path: str | Path) -> PromptTemplate | None:
    """The prompt template of a run folder, a checkpoint in one, or an export; None where nothing says it.

    Raises:
        ModelError: an export's file that cannot be read.
    """
    folder = Path(path).expanduser()
    if (folder / TEMPLATE_NAME).is_file():
        try:
            return _template(json.loads((folder / TEMPLATE_NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, ConfigError) as error:
            raise ModelError(f"{folder / TEMPLATE_NAME} holds no prompt template ({error}); export again") from error
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        return None
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    if not (folder / "config.yaml").is_file():
        return None
    import yaml

    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return _template((config or {}).get("data", {}).get("init_args", {}).get("template"))


def save_template(template: PromptTemplate, folder: Path) -> None:
    """Write a template into a model folder."""
    text = json.dumps(dataclasses.asdict(template), indent=2, ensure_ascii=False)
    (folder / TEMPLATE_NAME).write_text(text + "\n", encoding="utf-8")


def _template(value: Any) -> PromptTemplate | None:
    if isinstance(value, Mapping):
        return PromptTemplate(**value.get("init_args", value))
    return None if value is None else get_template(value)
