"""Resuming under other settings: what may change, and what decides the run's next weights and is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stepkd.errors import ConfigError
from stepkd.runs.job import ABSENT, differences

_FREE = re.compile(
    r"trainer\.(?!precision|limit_train_batches).*|checkpoint\.(?!monitor|mode).*|data\.(test|predict)\b.*"
    r"|(micro_batch_tokens|chunk_size|policy\.gradient_checkpointing|samples\b.*)"
    r"|(.+\.)?(max_rows|server|gpu_memory|group_port|timeout_s|requests)"
)
"""Settings that a resumed run takes as they are: how long it runs, what it logs, on what hardware."""


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as dotted names and plain values."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value)) if any(isinstance(item, Mapping) for item in value) else list(value)
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, f"{name}.{key}" if name else str(key))
    return found


def short_name(key: str) -> str:
    """A setting of a recipe under the name that the module itself gives it."""
    return re.sub(r"^(model\.init_args\.|(data\.)init_args\.)", r"\2", key).replace("seed_everything", "seed")


def recipe_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`flat` settings of a ``config.yaml``, under short names; the seeds that are linked to one are that one."""
    linked = ("model.init_args.seed", "data.init_args.seed")
    found = {short_name(key): value for key, value in flat(config).items() if key not in linked}
    if found.get("trainer.precision") is None:
        found["trainer.precision"] = "32-true"
    return found


def check_changes(then: Mapping[str, Any], now: Mapping[str, Any], named: Iterable[str], run: str) -> list[str]:
    """Compare the settings of a run with those that it is to be resumed with.

    Args:
        then, now: dotted names and values.
        named: settings, or groups of them, that may change although they decide what the run learns.
        run: what is resumed, for the message.

    Returns:
        One line per setting that changes.

    Raises:
        ConfigError: a setting that decides what the run learns differs and is not named.
    """
    free: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, (old, new) in differences(then, now).items():
        if ABSENT in (old, new) and any(value in (None, {}, []) for value in (old, new)):
            continue  # a group that was null, or a setting that a version lacks
        allowed = any(name == each or name.startswith(f"{each}.") for each in named)
        (free if allowed or _FREE.fullmatch(name) else refused)[name] = f"{name}: {_said(old)} then, {_said(new)} now"
    if refused:
        raise ConfigError(
            f"{run} cannot be resumed, because what decides its next batches or weights changed:\n  "
            + "\n  ".join(refused.values())
            + f"\nGive the old settings again, name what you mean to change (--resume_with {','.join(refused)}), "
            "or start a new run in another --out"
        )
    return list(free.values())


def _said(value: Any) -> str:
    text = "not set" if value == ABSENT else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def newest_config(folder: Path) -> Path | None:
    """The settings that a run was last started with: of ``config.yaml``, ``config-2.yaml``, ... the last."""
    found = [path for path in folder.glob("config*.yaml") if re.fullmatch(r"config(-\d+)?\.yaml", path.name)]
    return max(found, key=lambda path: int(path.stem.partition("-")[2] or 1), default=None)
