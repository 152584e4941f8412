"""Settings dataclasses as jsonargparse reads them, from words and files; a mistake is a line with the nearest name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, make_dataclass
from difflib import get_close_matches
from importlib import import_module
from inspect import isabstract, signature
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from stepkd.errors import NOT_MEASURED, ConfigError, StepkdError
from stepkd.safe import check_import
from stepkd.yaml_files import find_recipe

S = TypeVar("S")
SYNONYMS = {
    "learning_rate": "lr",
    "batch_size": "global_batch_size",
    "per_device_train_batch_size": "global_batch_size",
    "epochs": "max_epochs",
    "num_train_epochs": "max_epochs",
    "steps": "max_steps",
    "max_seq_length": "max_length",
    "rank": "r",
    "output_dir": "out",
    "model_name_or_path": "path",
}
"""Other programs' names of settings -> ours."""

_read = get_loader("yaml")


def read_value(text: str) -> Any:
    """A value, which jsonargparse reads again where a file has it as text.

    Of one line only ``null`` means null, and ``None``, which jsonargparse makes of it in ``--model.policy.dtype null``;
    YAML takes a tilde (a step marker) and what begins with ``#`` (a marker, a prompt's heading) for null, too.
    """
    value = None if text == "None" else _read(text)
    return text if value is None and "\n" not in text and text.strip().lower() not in ("", "null", "none") else value


set_loader("yaml", read_value, exceptions=(yaml.YAMLError,))


class OneLineErrors:
    """Of a jsonargparse parser: it takes no abbreviations, and raises our errors."""

    positional: tuple[str, ...] = ()
    """Settings that words without an option fill, in order."""
    part: str = ""
    """Dotted name of the settings whose help is shown; empty: all but those of :attr:`elsewhere`."""
    elsewhere: tuple[str, ...] = ()
    """Groups of settings that have a help of their own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def format_help(self, *args: Any) -> str:
        """Help of the part that is shown."""
        groups: list[Any] = self._action_groups  # type: ignore[has-type]
        self._action_groups = [group for group in groups if self._shows(group)]
        try:
            return str(super().format_help(*args))  # type: ignore[misc]
        finally:
            self._action_groups = groups

    def _shows(self, group: Any) -> bool:
        names = [action.dest for action in group._group_actions]
        if self.part:
            return any(name == self.part or name.startswith(f"{self.part}.") for name in names)
        return not any(name.startswith(f"{place}.") for name in names for place in self.elsewhere)

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Raise ConfigError."""
        if denied := re.search(r"Importing '([^']+)' is not allowed", message):
            try:
                check_import(denied.group(1), "the recipe")
            except ConfigError as refused:
                raise refused from ex
        raise ConfigError(message) from ex


class SettingsParser(OneLineErrors, ArgumentParser):
    """A parser of settings classes."""


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
        if not value.strip():
            raise ConfigError(f"{flag} has no value: give a file, or a recipe's name")
        if ":" not in value:
            place, start = (i, f"{flag}=") if equals else (i + 1, "")
            given[place] = f"{start}{find_recipe(value)}"
    return given


def explain(parser: Any, words: Sequence[str], message: str) -> str:
    """Say in a line what a parser refused.

    Args:
        parser: the command's parser, whose settings are the ones that exist.
        words: the command line, with recipes as files.
        message: what the parser said.

    Returns:
        The first setting that does not exist, with its place and the nearest one that does; else the first value that
        its setting does not take; else the setting that is missing; else the end of the message.
    """
    if "--safe allows" in message:
        return message
    given = list(given_settings(words))
    known = settings_of(parser, given)
    chosen = {name.removesuffix(".class_path"): i for i, (_, name, value) in enumerate(given) if isinstance(value, str)}
    valid = [  # settings of a class that another one replaced are gone
        (file, name, value)
        for i, (file, name, value) in enumerate(given)
        if not any(name.startswith(f"{place}.") and later > i for place, later in chosen.items())
        and name not in ("print_config", "help")
    ]
    unknown = ((file, _unknown(name, value, known, file == "")) for file, name, value in valid)
    refused = ((file, _refused(name, value, known)) for file, name, value in valid)
    for file, told in chain(unknown, refused):
        if told:
            return f"{file}: {told}" if file else told
    if (required := re.search(r"arguments are required: ([\w.]+)", message)) is None:
        lines = message.splitlines()
        if lines[-1].strip().startswith("Given value"):  # a union's whole value; the innermost line says more
            lines.append(max(lines, key=lambda line: len(line) - len(line.lstrip())))
        return lines[-1].strip().removeprefix("- ")
    command = words[0] if words else ""
    name = required[1].removeprefix(f"{command}.")
    if name != required[1] and not any(word.partition("=")[0] in ("--config", "-c") for word in words):
        return f"give a recipe: stepkd {command} --config NAME (`stepkd recipes list` lists them)"
    lacking = [key for key in known if f".{key}".endswith(f".{name}") and key not in {each[1] for each in given}]
    lacking.sort(key=lambda key: key.rpartition(".")[0] not in chosen)
    place = lacking[0] if lacking else name
    return f"give {place.upper()}: {parser.usage}" if place in parser.positional else f"give --{place}"


def given_settings(words: Sequence[str]) -> Iterator[tuple[str | None, str, Any]]:
    """File, dotted name without ``init_args`` (``methods[0].n`` in a list), and value of every setting, in order.

    The file is empty for the command line, whose values are text, and None for settings that a program gives as text.
    """
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if not flag.startswith("-") or flag == "-":
            continue
        name, text = flag.lstrip("-").rstrip("+"), value if equals else "".join(words[i + 1 : i + 2])
        of_file = name in ("config", "c")
        file: str | None = ""
        if of_file:  # a program gives its settings as the text of a file
            file = text if len(text) < 256 and Path(text).is_file() else None
        try:
            read = yaml.safe_load(Path(text).read_text(encoding="utf-8") if file else text)
        except (OSError, ValueError, yaml.YAMLError):
            read = None
        plain = not of_file and not isinstance(read, (dict, list))
        yield from _flat(file, "" if of_file else name.replace(".init_args", ""), text if plain else read)


def _flat(file: str | None, name: str, value: Any) -> Iterator[tuple[str | None, str, Any]]:
    if name:
        yield file, name, value
    members = [(f"{name}[{i}]", each) for i, each in enumerate(value)] if isinstance(value, list) else [(name, value)]
    for place, each in members:
        for key, below in each.items() if isinstance(each, dict) else ():
            yield from _flat(file, f"{place}.{key}".replace(".init_args", "").lstrip("."), below)


def settings_of(parser: Any, given: Sequence[tuple[str | None, str, Any]]) -> dict[str, Any]:
    """Dotted name -> type of every setting, those of the classes that were chosen included."""
    known = {action.dest: getattr(action, "_typehint", None) for _, action in _actions(parser, given)}
    for name in _members(given):
        if (hint := known.get(name.rpartition("[")[0])) is not None:
            known[name] = get_args(hint)[0] if _is_plain_list(hint) else hint
    return known


def _members(given: Sequence[tuple[str | None, str, Any]]) -> list[str]:
    """Dotted names of what lists hold that have settings of their own."""
    names = (name[: end.end()] for _, name, _ in given for end in re.finditer(r"\[\d+\]", name))
    return list(dict.fromkeys(names))


def _actions(parser: Any, given: Sequence[tuple[str | None, str, Any]]) -> list[tuple[Any, Any]]:
    """Every setting's action behind the parser that has it: this one, or that of a class that was chosen."""
    named = {name.removesuffix(".class_path"): value for _, name, value in given if isinstance(value, str)}
    found: dict[str, tuple[Any, Any]] = {}
    pending, members = [(parser, action) for action in parser._actions], _members(given)
    while pending:
        (holder, action), name = pending[0], pending.pop(0)[1].dest
        if name in found or name.rpartition(".")[2] in ("help", "print_config", "print_shtab"):
            continue
        found[name] = holder, action
        for place in (name, *(each for each in members if each.rpartition("[")[0] == name)):
            class_path = named.get(place) or getattr(action.default, "get", lambda _: None)("class_path")
            for kind in _classes(getattr(action, "_typehint", None)):
                chosen = kind if is_dataclass(kind) else _class(class_path, kind) if class_path else None
                if chosen is not None:
                    inner = type(parser)(prog=parser.prog)
                    inner.add_class_arguments(chosen, place, fail_untyped=False)
                    pending += [(inner, each) for each in inner._actions if each.dest != place]
    return list(found.values())


def show_help(parser: Any, words: Sequence[str]) -> None:
    """Print the help of a part of the settings, where words ask for one (``--sampling.help``), and exit.

    Args:
        parser: the command's parser.
        words: the command line, with recipes as files.
    """
    for word in words:
        name = word.removeprefix("--").removesuffix(".help").replace(".init_args", "")
        if not word.endswith(".help") or not word.startswith("--") or word in parser._option_string_actions:
            continue
        given = [each for each in given_settings(words) if not each[1].endswith(".help")]
        for holder, action in _actions(parser, given):
            if action.dest.startswith(f"{name}."):
                form = f"--{name}.SETTING VALUE"
                if _is_plain_list(settings_of(parser, given).get(name)):
                    form = _in_list(name, "CLASS", "SETTING")
                holder.part, holder.usage = name, f"... {form}"
                print(holder.format_help())
                raise SystemExit(0)
        told = _unknown(name, None, settings_of(parser, given), True)
        raise ConfigError(told or f"{name} has no settings of its own")


def _classes(hint: Any) -> list[type]:
    """The classes in a type: of a union's members, a list's items."""
    inner = [kind for part in get_args(hint) for kind in _classes(part)]
    return inner if inner or not isinstance(hint, type) or hint.__module__ in ("builtins", "typing") else [hint]


def _is_list(hint: Any) -> bool:
    return _is_plain_list(hint) or any(map(_is_list, get_args(hint)))


def _is_plain_list(hint: Any) -> bool:
    return get_origin(hint) in (list, tuple, Sequence)


def _class(name: str, base: type) -> type | None:
    """The class of a name or an import path, which ``--safe`` may forbid."""
    path, _, last = name.rpartition(".")
    if not path:
        return next((kind for kind in _subclasses(base) if kind.__name__ == name), None)
    check_import(name, "the recipe")
    try:
        return getattr(import_module(path), last, None)
    except Exception:  # a module of one's own may fail in any way; the parser has said how
        return None


def _subclasses(kind: type) -> list[type]:
    found = [kind]
    for each in found:
        found += each.__subclasses__()
    return found


def _below(name: str, known: dict[str, Any]) -> list[str]:
    """What a setting is made of; empty where it is a value, or takes any key."""
    start = f"{name}." if name else ""
    return list(dict.fromkeys(key[len(start) :].split(".")[0] for key in known if key.startswith(start)))


def _in_list(name: str, kind: str, setting: str) -> str:
    """How a command line gives a list a class with a setting."""
    return f"--{name} '[{{class_path: {kind}, init_args: {{{setting}: VALUE}}}}]'"


def _choice(hint: Any) -> list[type]:
    """The classes that one chooses from by name, for a setting that is such a choice."""
    return [
        each
        for kind in _classes(hint)
        if not is_dataclass(kind) or kind.__subclasses__()
        for each in _subclasses(kind)
        if not isabstract(each)
    ]


def _unknown(name: str, value: Any, known: dict[str, Any], as_words: bool) -> str:
    """What to say of a setting that does not exist; empty for one that does, or whose place takes any key.

    Args:
        name: its dotted name.
        value: what was given, for ``--model.help CLASS`` its class.
        known: dotted name -> type of every setting.
        as_words: show the nearest setting as a command line takes it.
    """
    if name.endswith(".help"):
        return _refused(name.removesuffix(".help"), value, known) if value else ""
    parts, place = name.split("."), ""
    for i, part in enumerate(parts):
        here, level = f"{place}.{part}".lstrip("."), _below(place, known)
        if _is_plain_list(hint := known.get(place)) and _choice(hint) and part not in ("class_path", "help"):
            return f"settings of a class in a list are given with it: {_in_list(place, 'CLASS', part)}"
        if here in known or _below(here, known):
            place = here
            continue
        kinds = _choice(known.get(place))
        if not level and known.get(place) in (str, int, float, bool):
            return f"{place} has no settings of its own"
        if part in ("class_path", "dict_kwargs", "help") or not (level or kinds):
            return ""
        said = f"{part!r} is not a setting{f' of {place}' if place else ''}"
        if kinds and place.endswith("]") and level:
            near = get_close_matches(part, level, n=1, cutoff=0.6)
            return said + (f"; did you mean {near[0]!r}?" if near else f", whose class has {', '.join(level)}")
        if holders := [
            kind.__name__ for kind in kinds if part in signature(kind).parameters and kind.__name__[0] != "_"
        ]:
            return f"{said}; name a class that has it: --{place} {' or '.join(holders)} --{place}.{part} VALUE"
        if not level:
            return (
                f"{place} names no class that has settings: --{place} {{{', '.join(each.__name__ for each in kinds)}}}"
            )
        tails = [parts[i:], [*parts[i:-1], SYNONYMS.get(parts[-1], parts[-1])]]
        ends = dict.fromkeys("." + ".".join(tail) for tail in tails)
        elsewhere = [key for end in ends for key in known if f".{key}".endswith(end)]
        last = get_close_matches(part, [key.rpartition(".")[2] for key in known], n=1, cutoff=0.8)
        start = f"{place}." if place else ""
        near = (
            [key for key in elsewhere if key.startswith(place)][:2]
            or [f"{start}{each}" for each in get_close_matches(part, level, n=1, cutoff=0.75)]
            or elsewhere[:2]
            or [key for key in known if last and key.rpartition(".")[2] == last[0]][:2]
        )
        if not near:
            return said + (f"; it has {', '.join(level)}" if len(level) <= 25 else "")
        if as_words and not any(_is_list(known.get(".".join(parts[:j]))) for j in range(i + 1)):
            shown = [f"--{each}" for each in near]
        else:
            shown = [repr(each if "." in each.removeprefix(start) else each.removeprefix(start)) for each in near]
        return f"{said}; did you mean {' or '.join(shown)}?"
    return ""


def _refused(name: str, value: Any, known: dict[str, Any]) -> str:
    """What to say of a value that its setting does not take; empty for one that it takes, and for mappings."""
    name = name.removesuffix(".class_path")
    hint = known.get(name, Any)
    items = value if isinstance(value, list) else [value]
    nested = any(isinstance(each, dict) for each in items)
    if nested and isinstance(value, list):  # of a list's mappings every part is a setting of its own
        value = next((each for each in items if not isinstance(each, dict) and not _takes(hint, [each])), None)
        nested = False
    if value is None or nested or _takes(hint, value):
        return ""
    named = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
    if named and (kinds := _choice(hint)):
        unknown = [each for each in named if not any(_class(each, kind) for kind in _classes(hint))]
        if not unknown:
            return ""
        names = [kind.__name__ for kind in kinds]
        near = get_close_matches(unknown[0].rpartition(".")[2], names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
        return f"{name}: no class {unknown[0]!r}; {hint}"
    if level := _below(name, known):
        return f"{name}: expected {'a list of ' if _is_list(hint) else ''}{{{', '.join(level)}}}, got {str(value)!r}"
    expected, words = [], list[str]()
    for each in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        item = get_args(each)[0] if _is_list(each) else each
        if get_origin(item) is Literal:
            words += map(str, get_args(item))
            expected.append(f"{'one' if item is each else 'some'} of {list(get_args(item))}")
        elif each is not type(None):
            expected.append(each.__name__ if isinstance(each, type) and not get_args(each) else str(each))
    if value == "auto" and name.rpartition(".")[2] == "dtype":
        return f"{name}: {NOT_MEASURED}"
    given = yaml.safe_load(value) if isinstance(value, str) and value.startswith("[") and words else [value]
    near = [word for each in given if each not in words for word in get_close_matches(str(each), words, n=1)]
    return f"{name}: expected {' or '.join(expected)}, got {str(value)!r}" + (
        f"; did you mean {near[0]!r}?" if near else ""
    )


def _takes(hint: Any, value: Any) -> bool:
    """Whether a type takes a value, by the parser that reads it."""
    parser = SettingsParser()
    parser.add_class_arguments(make_dataclass("Probe", [("value", hint)]))
    try:
        parser.parse_object({"value": value})
    except (StepkdError, ValueError, TypeError):
        return False
    return True


def user_mistake(error: BaseException) -> StepkdError | None:
    """Our own error at the root of one that jsonargparse raised while it parsed or built the settings."""
    if isinstance(error, StepkdError):
        return error
    found: StepkdError | None = None
    current: BaseException | None = error if isinstance(error, ValueError | TypeError) else None
    while current is not None:
        found = current if isinstance(current, StepkdError) else found
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return found


def build_settings(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """Instance of a settings dataclass from a file's mapping, types checked.

    Args:
        kind: the dataclass.
        values: field -> value.
        where: place for the messages.

    Raises:
        ConfigError: an unknown field, a value of the wrong type, or one that the class refuses.
    """
    parser = SettingsParser()
    parser.add_class_arguments(kind)
    given = list(_flat("", "", dict(values)))
    known = settings_of(parser, given)
    for _, name, value in given:
        if told := _unknown(name, value, known, False) or _refused(name, value, known):
            raise ConfigError(f"{where}: {told}")
        if value is None and type(None) not in get_args(known.get(name, Any)) and known.get(name, Any) is not Any:
            raise ConfigError(f"{where}: {name} has no value")  # jsonargparse takes None for any type
    try:
        return built(kind, parser.parse_object(dict(values)))
    except StepkdError as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[-1].strip()}") from None


def built(kind: type[S], values: Any, place: str = "") -> S:
    """The instance of a settings class whose fields a parser has read.

    Args:
        kind: the class, a dataclass but for classes of one's own.
        values: field -> value.
        place: dotted name of the setting that it is; empty for a whole command's.

    Raises:
        StepkdError: what the class, or one that it holds, refuses; the message says where in the settings.
    """
    start = f"{place}." if place else ""
    if is_dataclass(kind):
        hints, names = get_type_hints(kind), [each.name for each in fields(kind) if each.init]
    else:  # of one's own
        hints, names = get_type_hints(kind.__init__), list(vars(values))
    # Of a list's members, the parser leaves out what was not given.
    parts = {name: _part(hints.get(name), values[name], start + name) for name in names if name in values}
    try:
        return kind(**parts)
    except StepkdError as error:
        if place.endswith("]"):  # in a list, where the class tells it from the others
            error.args = (f"{place} ({kind.__name__}): {error}",)
            raise
        outer, _, last = place.rpartition(".")
        where = outer if str(error).startswith(f"{last}.") else place
        between = "." if re.match(r"[\w.]+=", str(error)) else ": "
        error.args = (f"{where}{between}{error}" if where else str(error),)
        raise


def _part(hint: Any, value: Any, place: str) -> Any:
    """A field's value, in which settings of classes are instances."""
    if isinstance(value, list | tuple):
        return type(value)(_part(hint, each, f"{place}[{i}]") for i, each in enumerate(value))
    if not isinstance(value, Namespace):
        return value
    for own in _classes(hint):
        if "class_path" not in value:
            if is_dataclass(own):
                return built(own, value, place)
        elif chosen := _class(value.class_path, own):
            parts = (value.get(name) or {} for name in ("init_args", "dict_kwargs"))
            given = (part if isinstance(part, dict) else vars(part) for part in parts)
            return built(chosen, Namespace(**dict(chain.from_iterable(each.items() for each in given))), place)
    return value
