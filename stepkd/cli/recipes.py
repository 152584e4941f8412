"""List, show or copy the recipes.

  stepkd recipes list
  stepkd recipes show tiny/sft
  stepkd recipes copy sft my-sft.yaml

A recipe is composed of a method and overlays, in this order: method, base, teacher, strategy:
  stepkd fit --config recipes/sft.yaml --config recipes/base/smollm2-135m-lora.yaml --out runs/sft
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from stepkd.errors import ConfigError
from stepkd.runs.files import write_file
from stepkd.yaml_files import all_recipes, find_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``stepkd recipes``."""
    commands = parser.add_subparsers(dest="action", required=True)
    commands.add_parser("list", help="every recipe with its first line")
    show = commands.add_parser("show", help="print a recipe")
    show.add_argument("name", help="its name, as the list shows it")
    copy = commands.add_parser("copy", help="copy a recipe to edit it")
    copy.add_argument("name", help="its name, as the list shows it")
    copy.add_argument("to", help="file or folder to write")


def run(arguments: argparse.Namespace) -> int:
    """Run ``stepkd recipes``."""
    found = all_recipes()
    if arguments.action == "list":
        width = max(len(name) for name in found)
        for name, path in found.items():
            print(f"{name:<{width}}  {headline(path)}")
        return 0
    name = arguments.name.removeprefix("recipes/").removesuffix(".yaml")
    path = found.get(name) or find_recipe(name, found)
    if arguments.action == "show":
        print(path.read_text(encoding="utf-8"), end="")
        return 0
    target = Path(arguments.to)
    if target.is_dir():
        target /= path.name
    if target.exists():
        raise ConfigError(f"{target} already exists: give another name")
    if not target.parent.is_dir():
        raise ConfigError(f"no folder {target.parent}: make it first, or give another place")
    write_file(target, lambda temporary: shutil.copyfile(path, temporary))
    print(f"copied the recipe {name} to {target}")
    return 0


def headline(path: Path) -> str:
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


def add_recipe_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add ``--config`` and ``--set``."""
    parser.add_argument(
        "--config", action="append", required=required, default=[], metavar="FILE", help="recipe, then its overlays"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting of the recipe")


def recipe_words(arguments: argparse.Namespace) -> list[str]:
    """The recipe and its settings as words of ``stepkd fit``.

    Raises:
        ConfigError: a setting that is not KEY=VALUE.
    """
    words = [word for path in arguments.config for word in ("--config", path)]
    for setting in arguments.set:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {setting}: write KEY=VALUE, for instance model.init_args.chunk_size=256")
        words += [f"--{key}", value]
    return words
