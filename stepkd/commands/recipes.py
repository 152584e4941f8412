"""List, show or copy the recipes.

  stepkd recipes list
  stepkd recipes show tiny/sft
  stepkd recipes copy sft my-sft.yaml

A recipe is composed of a method and overlays, in this order: method, base, teacher, strategy:
  stepkd fit --config recipes/sft.yaml --config recipes/base/smollm2-135m-lora.yaml --out runs/sft
"""

from __future__ import annotations

import argparse
import shutil
import sysconfig
from pathlib import Path

from stepkd.errors import ConfigError, nearest


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
    path = find_recipe(arguments.name, found)
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
    shutil.copyfile(path, target)
    print(f"copied {path.name} to {target}")
    return 0


def recipes_folder() -> Path:
    """Where the recipes are: beside the package in a checkout, else where the wheel put them."""
    checkout = Path(__file__).resolve().parents[2] / "recipes"
    installed = Path(sysconfig.get_path("data")) / "share" / "stepkd" / "recipes"
    for folder in (checkout, installed):
        if folder.is_dir():
            return folder
    raise ConfigError(f"no recipes at {checkout} or {installed}: reinstall stepkd, or work in a checkout")


def all_recipes() -> dict[str, Path]:
    """Recipe files by name (path below ``recipes/`` without the ending), methods first."""
    folder = recipes_folder()
    paths = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.relative_to(folder).parts), str(path)))
    return {str(path.relative_to(folder).with_suffix("")): path for path in paths}


def headline(path: Path) -> str:
    """First comment line of a recipe."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ").rstrip()


def find_recipe(name: str, found: dict[str, Path]) -> Path:
    """Look a recipe up; ConfigError with the nearest name when there is none."""
    name = name.removeprefix("recipes/").removesuffix(".yaml")
    if name in found:
        return found[name]
    raise ConfigError(f"no recipe {name!r}.{nearest(name, found, cutoff=0.4)} `stepkd recipes list` shows all")
