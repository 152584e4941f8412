"""``--safe``: recipes, rewards and models of strangers may set values, but name no code outside a list.

Without it a recipe can name any importable class (``class_path``), reward function (``package.module:function``) or
function of a claim, as one's own recipes should. What holds in any case: checkpoints load without executing pickles,
and code that a model repository ships runs only with ``policy.trust_remote_code: true``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from stepkd.errors import ConfigError

ALLOWED = (
    "stepkd",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
)
"""Import paths that a recipe may name under ``--safe``, with everything below them."""
_VARIABLE = "STEPKD_SAFE"
SECRET_NAME = re.compile(r"(?:token|key|secret|password)$", re.IGNORECASE)
"""Names of variables and settings whose values are credentials: not written by commands, and not shown by reports."""
_CREDENTIAL = re.compile(r"://([^/\s@]+:[^/\s@]+|[^/\s@]{20,})@|\bhf_[A-Za-z0-9]{30,}")
_SECRET = re.compile(r"(?!<.*>$).{12}")  # PAD_TOKEN=<|endoftext|> is none


def enter() -> None:
    """Switch safe mode on, for this process and those it starts."""
    import jsonargparse

    os.environ[_VARIABLE] = "1"
    jsonargparse.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=list(ALLOWED))


def is_safe() -> bool:
    """Whether safe mode is on."""
    return os.environ.get(_VARIABLE) == "1"


def check_import(path: str, setting: str) -> None:
    """Refuse to import what a setting names, in safe mode, when it is not on the list.

    Args:
        path: dotted path of the module or object.
        setting: where it is named, for the message.

    Raises:
        ConfigError: it is not on the list.
    """
    if is_safe() and not any(path == allowed or path.startswith(f"{allowed}.") for allowed in ALLOWED):
        raise ConfigError(
            f"{setting} names the code {path!r}, and --safe allows only {', '.join(ALLOWED)}: read that code, then run "
            "without --safe"
        )


def imported(name: str, setting: str) -> Any:
    """What a setting names, imported.

    Args:
        name: ``package.module:function``, or with a dot.
        setting: where it is named, for the message.

    Raises:
        ConfigError: it cannot be imported, or may not be in safe mode.
    """
    check_import(name.replace(":", "."), setting)
    try:
        return resolve_name(name)
    except Exception as error:
        raise ConfigError(f"{setting}: {name!r} cannot be imported: {type(error).__name__}: {error}") from error


def check_remote_code(wanted: bool) -> None:
    """Refuse, in safe mode, to run what a model repository ships.

    Raises:
        ConfigError: it is wanted.
    """
    if wanted and is_safe():
        raise ConfigError("policy.trust_remote_code: true runs code of the model's repository, which --safe forbids")


def refuse_credentials(settings: Mapping[str, Any]) -> None:
    """Refuse settings that hold a credential: files, checkpoints, model cards and loggers get them as they are.

    Args:
        settings: values by dotted name.

    Raises:
        ConfigError: one holds the password of a URL, a token of the Hugging Face hub, or the value of an environment
            variable whose name :data:`SECRET_NAME` matches (of 12 characters or more; no token of a vocabulary, as
            ``<|endoftext|>`` is). The message does not repeat it.
    """
    secrets = {name: value for name, value in os.environ.items() if SECRET_NAME.search(name) and _SECRET.match(value)}
    for name, value in settings.items():
        text = str(value)
        what = next((f"the value of the variable {known}" for known, secret in secrets.items() if secret in text), "")
        variable = " (of the variable MLFLOW_TRACKING_URI, too)" if name.endswith("tracking_uri") else ""
        if what or _CREDENTIAL.search(text):
            raise ConfigError(
                f"{name} holds {what or 'a password or token'}, and settings are written into files and told to "
                f"loggers: leave it out{variable}. Credentials are read from where their owners look: HF_TOKEN, "
                "WANDB_API_KEY, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ~/.netrc for a URL"
            )
