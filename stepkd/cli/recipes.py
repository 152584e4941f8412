"""List, show or copy the recipes.

  stepkd recipes list
  stepkd recipes show tiny/sft
  stepkd recipes copy sft my-sft.yaml

A recipe is composed of a method and overlays, in this order: method, base, teacher, engine, strategy, logger:
  stepkd fit --config recipes/sft.yaml --config recipes/base/smollm2-135m-lora.yaml --out runs/sft
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stepkd.errors import ConfigError
from stepkd.runs.files import write_file
from stepkd.yaml_files import all_recipes, find_recipe


@dataclass(frozen=True)
class ListRecipesConfig:
    """``stepkd recipes list``: every recipe with its first line."""


@dataclass(frozen=True)
class ShowConfig:
    """``stepkd recipes show NAME``: print a recipe."""

    POSITIONAL: ClassVar = ("name",)

    name: str
    """Name of the recipe, as the list shows it."""


@dataclass(frozen=True)
class CopyConfig:
    """``stepkd recipes copy NAME TO``: copy a recipe to edit it."""

    POSITIONAL: ClassVar = ("name", "to")

    name: str
    """Name of the recipe, as the list shows it."""
    to: str
    """File to write, or the folder that it goes into."""


ACTIONS = {"list": ListRecipesConfig, "show": ShowConfig, "copy": CopyConfig}


def run(config: ListRecipesConfig | ShowConfig | CopyConfig) -> int:
    """Run ``stepkd recipes``."""
    found = all_recipes()
    if isinstance(config, ListRecipesConfig):
        width = max(len(name) for name in found)
        for name, path in found.items():
            print(f"{name:<{width}}  {_headline(path)}")
        return 0
    path = find_recipe(config.name, found)
    if isinstance(config, ShowConfig):
        print(path.read_text(encoding="utf-8"), end="")
        return 0
    target = Path(config.to)
    if target.is_dir():
        target /= path.name
    if target.exists():
        raise ConfigError(f"{target} already exists: give another name")
    if not target.parent.is_dir():
        raise ConfigError(f"no folder {target.parent}: make it first, or give another place")
    write_file(target, lambda temporary: shutil.copyfile(path, temporary))
    print(f"copied the recipe {config.name} to {target}")
    return 0


def _headline(path: Path) -> str:
    """First sentence of a recipe's comment, over as many lines as it takes."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# ") or line.startswith("#   "):  # the settings, or a command
            break
        words.append(line[2:].strip())
        if words[-1].endswith("."):
            break
    text = " ".join(words)
    end = re.search(r"(?<!\bDr)\. (?=[A-Z])", text)
    return text if end is None else text[: end.start() + 1]


@dataclass(frozen=True, kw_only=True)
class RecipeChoice:
    """Settings of a command that works on a recipe of ``stepkd fit``."""

    recipe: tuple[str, ...]
    """Recipe of ``stepkd fit``, then its overlays: files, or names of ``stepkd recipes list``."""
    set: tuple[str, ...] = ()
    """Settings that override the recipe's, each as KEY=VALUE, for instance model.init_args.chunk_size=256."""

    def recipe_words(self) -> list[str]:
        """The recipe and its settings as words of ``stepkd fit``.

        Raises:
            ConfigError: a setting that is not KEY=VALUE.
        """
        words = [word for path in self.recipe for word in ("--config", path)]
        for setting in self.set:
            key, equals, value = setting.partition("=")
            if not equals or not key:
                raise ConfigError(f"--set {setting}: write KEY=VALUE, for instance model.init_args.chunk_size=256")
            words += [f"--{key}", value]
        return words
