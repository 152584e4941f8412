"""The nearest known name for one that a command line or a recipe got wrong."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from inspect import signature
from typing import Any, NoReturn

_PATTERNS = (
    r"does not accept (?:option|nested key|key) '([\w.]+)'",
    r"[Kk]ey [\"']([\w.]+)[\"'] is not (?:expected|valid)",
    r"No action for key [\"']([\w.]+)[\"']",
    r"unrecognized arguments: --([\w.]+)",
    r"NestedArg\(key='([\w.]+)'",
)


def known_keys() -> dict[str, list[str]]:
    """Last part of a setting's name -> its dotted names in a recipe, for the built-in classes."""
    from lightning.pytorch import Trainer

    from stepkd.data import DataSpec, PromptTemplate, StepData
    from stepkd.models import LoraSpec, PolicySpec
    from stepkd.modules import OptimizerSpec, StepModule, ValidationSpec
    from stepkd.trainer_cli import CheckpointSpec

    groups: list[tuple[str, Any]] = [
        ("model.init_args", StepModule),
        ("model.init_args.policy", PolicySpec),
        ("model.init_args.policy.lora", LoraSpec),
        ("model.init_args.optimizer", OptimizerSpec),
        ("model.init_args.validation", ValidationSpec),
        ("data.init_args", StepData),
        ("data.init_args.train", DataSpec),
        ("data.init_args.template", PromptTemplate),
        ("checkpoint", CheckpointSpec),
        ("trainer", Trainer),
    ]
    keys: dict[str, list[str]] = {}
    for prefix, cls in groups:
        names = [f.name for f in fields(cls)] if is_dataclass(cls) else list(signature(cls.__init__).parameters)[1:]
        for name in names:
            keys.setdefault(name, []).append(f"{prefix}.{name}")
    for name in (
        "trainer",
        "model",
        "data",
        "out",
        "resume",
        "overwrite",
        "seed_everything",
        "ckpt_path",
        "checkpoint",
    ):
        keys.setdefault(name, []).append(name)
    return keys


def suggestions(message: str) -> str:
    """The nearest known setting for every unknown one that a parser's message names; empty when there is none.

    Args:
        message: what jsonargparse says. Where a name exists in several places, the place that the message speaks of (or
            else the first) is shown.
    """
    known = known_keys()
    hints: list[str] = []
    for found in (name for pattern in _PATTERNS for name in re.findall(pattern, message)):
        parts = found.split(".")
        for i, part in enumerate(parts):
            if part in known or part in ("init_args", "class_path"):
                continue
            near = get_close_matches(part, known, n=1, cutoff=0.6)
            if not near:
                continue
            before = set(parts[:i])
            places = sorted(
                known[near[0]],
                key=lambda key: -sum(word in before or f"'{word}'" in message for word in key.split(".")[:-1]),
            )
            hint = f"{part!r} is not a setting; did you mean {near[0]!r} ({places[0]})?"
            if hint not in hints:
                hints.append(hint)
    return "\n".join(hints)


class HelpfulParser(argparse.ArgumentParser):
    """An argparse parser that answers an unknown option with the nearest known one."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 after the message and a suggestion."""
        options = [option for action in self._actions for option in action.option_strings]
        for wrong in re.findall(r"(--[\w-]+)", message.partition("unrecognized arguments:")[2]):
            near = get_close_matches(wrong, options, n=1)
            if near:
                message += f". Did you mean {near[0]}?"
        self.exit(2, f"{self.prog}: {message}\n`{self.prog} --help` lists the options\n")
