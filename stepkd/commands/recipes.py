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
import site
import sysconfig
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from stepkd.data.io import replace_file
from stepkd.errors import ConfigError


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
    replace_file(target, lambda temporary: shutil.copyfile(path, temporary))
    print(f"copied the recipe {name} to {target}")
    return 0


def recipes_folder() -> Path:
    """Where the recipes are: beside the package in a checkout, else where the wheel put them."""
    checkout = Path(__file__).resolve().parents[2] / "recipes"
    installed = [
        Path(base) / "share" / "stepkd" / "recipes" for base in (sysconfig.get_path("data"), site.USER_BASE or "")
    ]
    for folder in (checkout, *installed):
        if folder.is_dir():
            return folder
    raise ConfigError(f"no recipes at {checkout} or {installed[0]}: reinstall stepkd, or work in a checkout")


def all_recipes() -> dict[str, Path]:
    """Recipe files by name (path below ``recipes/`` without the ending), methods first."""
    folder = recipes_folder()
    paths = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.relative_to(folder).parts), str(path)))
    return {str(path.relative_to(folder).with_suffix("")): path for path in paths}


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


def find_recipe(name: str, known: Mapping[str, Path] | None = None, what: str = "recipe") -> Path:
    """The file that a name means: that file itself where there is one, else one of stepkd's own.

    Args:
        name: a path; or a name of ``stepkd recipes list``, with or without ``recipes/`` and ``.yaml``.
        known: files by name; None: all recipes.
        what: what they are, for the message.

    Raises:
        ConfigError: neither; the nearest names are shown.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = all_recipes() if known is None else known
    short = name.removeprefix("recipes/").removeprefix(f"{what}s/").removesuffix(".yaml")
    if short in known:
        return known[short]
    last = short.rpartition("/")[2]
    near = [each for each in known if each.rpartition("/")[2] == last]
    near = near or get_close_matches(short, known, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(map(repr, near[:3]))}?" if near else ""
    shown = "`stepkd recipes list`" if what == "recipe" else f"`stepkd {what}s --list`"
    raise ConfigError(f"no file {name!r} here, and no {what} {short!r}.{hint} {shown} shows all")


def with_recipe_files(words: Sequence[str]) -> list[str]:
    """Words of a command line with every recipe's name after ``--config`` as its file; YAML text stays as it is.

    Raises:
        ConfigError: a name that is neither a file nor a recipe.
    """
    given = list(words)
    for i, word in enumerate(given):
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "-c") or (not equals and i + 1 == len(given)):
            continue
        value = value if equals else given[i + 1]
        if ":" not in value and value.strip():
            place, start = (i, f"{flag}=") if equals else (i + 1, "")
            given[place] = f"{start}{find_recipe(value)}"
    return given
