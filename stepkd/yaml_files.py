"""Recipes by name, YAML files read with errors that name the place, and settings written as YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any

from stepkd.errors import ConfigError, DataError, nearest


def recipes_folder() -> Path:
    """Where the recipes are: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"no recipes in {package}: reinstall stepkd, or work in a checkout")


def all_recipes() -> dict[str, Path]:
    """Recipe files by name (path below ``recipes/`` without the ending), methods first."""
    folder = recipes_folder()
    paths = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.relative_to(folder).parts), str(path)))
    return {str(path.relative_to(folder).with_suffix("")): path for path in paths}


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
    raise ConfigError(f"no file {name!r} here, and no {what} {short!r}.{hint} `stepkd {what}s list` shows all")


def read_yaml(path: Path, what: str) -> Any:
    """The value that a YAML file holds.

    Args:
        path: the file.
        what: what it is, for the messages.

    Raises:
        DataError: unreadable, not UTF-8, or not YAML.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read the {what}: {error.strerror}", path=path) from error
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text: {error.reason}", path=path) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = None if mark is None else mark.line + 1
        raise DataError(f"not valid YAML: {getattr(error, 'problem', error)}", path=path, line=line) from error


def mapping(raw: Any, where: str) -> dict[str, Any]:
    """A mapping; empty for nothing.

    Raises:
        ConfigError: something else.
    """
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: must be keys with values, got {raw!r}")
    return dict(raw)


def check_keys(raw: Any, known: Sequence[str], where: str) -> None:
    """Refuse keys that are not known, naming a near one.

    Raises:
        ConfigError: an unknown key, or no mapping.
    """
    for key in mapping(raw, where):
        if key not in known:
            raise ConfigError(f"{where}: no key {key!r}.{nearest(str(key), known)} Known: {', '.join(known)}")


def as_yaml(settings: Any) -> Any:
    """Settings as values of YAML: what ``--print_config`` shows.

    Args:
        settings: a dataclass's instance: its fields; ``class_path`` and ``init_args`` where its class is one of several
            that a plain base class holds together.
    """
    kind: type = type(settings)
    if is_dataclass(settings):
        values = {field.name: as_yaml(getattr(settings, field.name)) for field in fields(settings) if field.init}
        if any(base is not object and base.__module__ != "abc" and not is_dataclass(base) for base in kind.__mro__):
            return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": values}
        return values
    if isinstance(settings, Mapping):
        return {key: as_yaml(value) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [as_yaml(value) for value in settings]
    return str(settings) if isinstance(settings, Path) else settings


def yaml_text(settings: Any) -> str:
    """:func:`as_yaml` as text."""
    import yaml

    return str(yaml.safe_dump(as_yaml(settings), sort_keys=False, allow_unicode=True))


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings on top of others; anything but a mapping is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = overlaid(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name (``trainer.max_steps``), nested or both, as a recipe nests them; later ones win."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        below = nested(value) if isinstance(value, Mapping) else value
        found = overlaid(found, reduce(lambda inner, part: {part: inner}, reversed(name.split(".")), below))
    return found
