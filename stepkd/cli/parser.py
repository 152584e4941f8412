"""One command line for every command: a settings dataclass, read by jsonargparse from words and ``--config`` files.

A command is a module with ``run(config: SomeConfig) -> int``; the fields' docstrings are the help. Words beyond
jsonargparse's own: ``-`` in an option's name is ``_``; a bool alone is true; a setting that holds several values takes
several words and may be repeated (or is a list in one word, of texts a JSON list); and fields that a class names in
``POSITIONAL`` take words without an option.
"""

from __future__ import annotations

import json
import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import DefaultHelpFormatter, set_parsing_settings

from stepkd.errors import ConfigError
from stepkd.settings import SettingsParser, built, explain, given_settings, settings_of, show_help, with_recipe_files
from stepkd.yaml_files import mapping, read_yaml

_OPTION = re.compile(r"--([A-Za-z][\w.-]*\+?)(=.*)?|-h", re.DOTALL)
_TRUTH = ("true", "false", "yes", "no", "null")


def parse(kind: type, words: Sequence[str], *, command: str, description: str = "") -> Any:
    """The settings of a command.

    Args:
        kind: its dataclass. ``POSITIONAL`` of it names the fields that words without an option fill, in order.
        words: the command line behind the command.
        command: the command, for usage and messages.
        description: what ``--help`` says first.

    Returns:
        The dataclass's instance.

    Raises:
        ConfigError: a setting that does not exist, a value of the wrong type, or one that the dataclass refuses.
        SystemExit: with 0, after ``--help`` or ``--print_config``.
    """
    asks = any(word == "-h" or word.partition("=")[0].endswith("help") for word in words)
    set_parsing_settings(docstring_parse_attribute_docstrings=asks)  # takes time that only a help text needs
    positional: tuple[str, ...] = getattr(kind, "POSITIONAL", ())
    places = " ".join(map(str.upper, positional))
    parser = SettingsParser(
        prog=f"stepkd {command}",
        usage=" ".join(filter(None, (f"stepkd {command}", places, "[--config FILE] [--SETTING VALUE ...]"))),
        description=description,
        formatter_class=_Help,
    )
    parser.positional = positional
    parser.add_argument("--config", action="config", help="settings as YAML; a later file overrides an earlier one")
    parser.add_class_arguments(kind)
    given = _spread(parser, _with_overlays(kind, with_recipe_files(words)), positional)
    try:
        show_help(parser, given)
        values = parser.parse_args(given)
    except ConfigError as error:
        raise ConfigError(explain(parser, given, str(error))) from error
    return built(kind, values)


def _with_overlays(kind: type, words: Sequence[str]) -> list[str]:
    """Words with overlays of engines, which are written for trainings, as the engine of a command, or of its scorer.

    Raises:
        ConfigError: a file that holds no settings, or a training's.
    """
    found, waits, known = list[str](), list[str](), get_type_hints(kind)
    place = "--engine" if "engine" in known else "--scorer.engine"
    is_known = place == "--engine"  # a scorer's class must be, before its settings
    for before, word in pairwise(["", *words]):
        found.append(word)
        is_known |= before == "--scorer" or word.startswith("--scorer=")
        file = word.removeprefix("--config=")
        if (before == "--config" or file != word) and Path(file).is_file():
            raw = mapping(read_yaml(Path(file), "settings"), file)
            if isinstance(raw.get("model"), dict) and isinstance(raw.get("data"), dict):
                use = "give it as --recipe" if "recipe" in known else "run it with `stepkd fit`"
                raise ConfigError(f"{file} is a training recipe: {use}; --config takes settings of this command")
            is_known |= "scorer" in raw
            match raw:
                case {"model": {"init_args": {"engine": engine}}} if {"engine", "scorer"} & {*known}:
                    if raw == {"model": {"init_args": {"engine": engine}}}:
                        del found[-2 if file == word else -1 :]
                        waits = [place, json.dumps(engine)]
        if is_known:
            found, waits = found + waits, []
    return found + waits


class _Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Field docstrings, types and defaults under a description that keeps its lines."""


def _options(words: Sequence[str]) -> Iterator[tuple[str, bool, list[str]]]:
    """Every option, whether its value is part of the word, and the words behind it; first those before any option."""
    name, joined, values = "", False, list[str]()
    for word in words:
        if (option := _OPTION.fullmatch(word)) is None:
            values.append(word)
            continue
        yield name, joined, values
        name, joined = f"--{option[1].replace('-', '_')}" if option[1] else "--help", option[2] is not None
        values = [option[2][1:]] if option[2] else []
    yield name, joined, values


def _spread(parser: SettingsParser, words: Sequence[str], positional: Sequence[str]) -> list[str]:
    """Words as jsonargparse takes them: one value behind every setting, and none without one."""
    options = list(_options(words))
    plain = [word for name, _, values in options if name for word in (name, *values[:1])]
    known = settings_of(parser, list(given_settings(plain)))
    found, free = list[str](), list[str]()
    several: dict[str, list[str]] = {}
    for name, joined, values in options:
        key = name.removeprefix("--").replace(".init_args", "")
        hint, takes = known.get(key), 1
        if bool in (hint, *get_args(hint)) and not joined and (not values or values[0].lower() not in _TRUTH):
            values = ["true", *values]
        elif (item := _items(hint)) is not None and values and not _is_whole(values[0], item):
            several.setdefault(key, []).extend(values)
            continue
        elif name in ("", "--help", "--print_config"):
            takes = 0
        elif not values:
            raise ConfigError(f"{name} has no value (one that begins with - is written {name}=VALUE)")
        found += [f"{name}={values[0]}"] if joined else [name, *values[:takes]] if name else []
        free += values[1 if joined else takes :]
    for key, values in _placed(free, positional, known).items():
        several.setdefault(key, []).extend(values)
    for key, values in several.items():
        item = _items(known[key])
        found.append(f"--{key}={values[0] if item is None else _as_list(values, item)}")
    return found


def _placed(words: Sequence[str], positional: Sequence[str], known: dict[str, Any]) -> dict[str, list[str]]:
    """Words without an option, by the field that takes them."""
    left, found = list(words), {}
    for name in positional:
        if left:
            found[name], left = (left, []) if _items(known[name]) is not None else (left[:1], left[1:])
    if left:
        raise ConfigError(f"{left[0]!r} belongs to no setting: write --SETTING VALUE")
    return found


def _items(hint: Any) -> Any:
    """The type of a list's or tuple's items; None for any other type."""
    if get_origin(hint) in (Union, UnionType):
        return next((item for each in get_args(hint) if (item := _items(each)) is not None), None)
    return get_args(hint)[0] if get_origin(hint) in (list, tuple) else None


def _is_text(item: Any) -> bool:
    return item in (str, Path) or get_origin(item) is Literal


def _is_whole(word: str, item: Any) -> bool:
    """Whether a word is a list, not one item of it: a text such as ``[/INST]`` is an item."""
    if not _is_text(item):
        return word.startswith("[")
    try:
        return isinstance(json.loads(word), list)
    except ValueError:
        return False


def _as_list(values: Sequence[str], item: Any) -> str:
    if _is_text(item):
        return json.dumps(list(values))
    return f"[{', '.join(values)}]"
