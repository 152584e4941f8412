"""Settings dataclasses as jsonargparse reads them, from words and files; a mistake is a line with the nearest name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

from stepkd.errors import ConfigError, StepkdError
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


def _value(text: str) -> Any:
    """A value, which jsonargparse reads again where a file has it as text: of one line, only ``null`` means null.

    YAML takes a tilde (a step marker) and what begins with ``#`` (a marker, a prompt's heading) for null, too.
    """
    value = _read(text)
    return text if value is None and "\n" not in text and text.strip().lower() not in ("", "null") else value


set_loader("yaml", _value, exceptions=(yaml.YAMLError,))


class OneLineErrors:
    """Of a jsonargparse parser: it takes no abbreviations, and raises our errors."""

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
        The first setting that does not exist, with its place and the nearest one that does; else the innermost part of
        the message, with the dotted name of the setting; else the message.
    """
    given = list(given_settings(words))
    known = settings_of(parser, given)
    chosen = {name.removesuffix(".class_path"): i for i, (_, name, value) in enumerate(given) if isinstance(value, str)}
    for i, (file, name, _) in enumerate(given):
        if name in ("print_config", "help") or name.endswith(".help"):
            continue
        replaced = any(name.startswith(f"{place}.") and later > i for place, later in chosen.items())
        # settings of a class that another one replaced are gone
        if not replaced and (told := _unknown(name, known, as_words=file == "")):
            return f"{file}: {told}" if file else told
    if required := re.match(r"the following arguments are required: ([\w.]+)", message):
        command = words[0] if words else ""
        name = required[1].removeprefix(f"{command}.")
        if name != required[1] and not any(word.partition("=")[0] in ("--config", "-c") for word in words):
            return f"give a recipe: stepkd {command} --config NAME (`stepkd recipes list` lists them)"
        last = [key for key in known if f".{key}".endswith(f".{name}")]
        return f"give --{last[0] if last else name}"
    return _innermost(message, known)


def given_settings(words: Sequence[str]) -> Iterator[tuple[str | None, str, Any]]:
    """File, dotted name without ``init_args``, and value of every setting, in order.

    The file is empty for the command line, and None for settings that a program gives as text.
    """
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if not flag.startswith("-") or flag == "-":
            continue
        name, value = flag.lstrip("-").rstrip("+"), value if equals else "".join(words[i + 1 : i + 2])
        file: str | None = ""
        try:
            if name in ("config", "c") and Path(value).is_file():
                file, name, value = value, "", Path(value).read_text(encoding="utf-8")
            elif name in ("config", "c"):
                file = None
            value = yaml.safe_load(value)
        except (OSError, ValueError, yaml.YAMLError):
            pass  # the value of another kind
        yield from _flat(file, "" if name in ("config", "c") else name.replace(".init_args", ""), value)


def _flat(file: str | None, name: str, value: Any) -> Iterator[tuple[str | None, str, Any]]:
    if name:
        yield file, name, value
    for each in value if isinstance(value, list) else [value]:
        for key, below in each.items() if isinstance(each, dict) else ():
            yield from _flat(file, f"{name}.{key}".replace(".init_args", "").lstrip("."), below)


def settings_of(parser: Any, given: Sequence[tuple[str | None, str, Any]]) -> dict[str, Any]:
    """Dotted name -> type of every setting, those of the classes that were chosen included."""
    return {action.dest: getattr(action, "_typehint", None) for _, action in _actions(parser, given)}


def _actions(parser: Any, given: Sequence[tuple[str | None, str, Any]]) -> list[tuple[Any, Any]]:
    """Every setting's action behind the parser that has it: this one, or that of a class that was chosen."""
    named = {name.removesuffix(".class_path"): value for _, name, value in given if isinstance(value, str)}
    found: dict[str, tuple[Any, Any]] = {}
    pending = [(parser, action) for action in parser._actions]
    while pending:
        holder, action = pending.pop(0)
        if (name := action.dest) in found or name.rpartition(".")[2] in ("help", "print_config", "print_shtab"):
            continue
        found[name] = holder, action
        class_path = named.get(name) or getattr(action.default, "get", lambda _: None)("class_path")
        for kind in _classes(getattr(action, "_typehint", None)):
            chosen = kind if is_dataclass(kind) else _class(class_path, kind) if class_path else None
            if chosen is not None:
                inner = type(parser)(prog=parser.prog)
                inner.add_class_arguments(chosen, name, fail_untyped=False)
                pending += [(inner, each) for each in inner._actions]
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
                holder.part, holder.usage = name, f"... --{name}.SETTING VALUE"
                print(holder.format_help())
                raise SystemExit(0)
        told = _unknown(name, settings_of(parser, given), as_words=True)
        raise ConfigError(told or f"{name} has no settings of its own")


def _classes(hint: Any) -> list[type]:
    """The classes in a type: of a union's members, a list's items."""
    inner = [kind for part in get_args(hint) for kind in _classes(part)]
    return inner if inner or not isinstance(hint, type) or hint.__module__ == "builtins" else [hint]


def _is_list(hint: Any) -> bool:
    return get_origin(hint) in (list, tuple, Sequence) or any(map(_is_list, get_args(hint)))


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


def _unknown(name: str, known: dict[str, Any], *, as_words: bool = False) -> str:
    """What to say of a setting that does not exist; empty for one that does, or whose place takes any key.

    Args:
        name: its dotted name.
        known: dotted name -> type of every setting.
        as_words: show the nearest setting as a command line takes it.
    """
    parts, place = name.split("."), ""
    for i, part in enumerate(parts):
        here, level = f"{place}.{part}".lstrip("."), _below(place, known)
        if here in known or _below(here, known):
            place = here
            continue
        if not level and known.get(place) in (str, int, float, bool):
            return f"{place} has no settings of its own"
        if not level or part in ("class_path", "dict_kwargs", "help"):
            return ""
        tails = [parts[i:], [*parts[i:-1], SYNONYMS.get(parts[-1], parts[-1])]]
        ends = dict.fromkeys("." + ".".join(tail) for tail in tails)
        elsewhere = [key for end in ends for key in known if f".{key}".endswith(end)]
        last = get_close_matches(part, [key.rpartition(".")[2] for key in known], n=1, cutoff=0.8)
        start = f"{place}." if place else ""
        near = (
            [f"{start}{each}" for each in level if each == SYNONYMS.get(part)]
            or [key for key in elsewhere if key.startswith(place)][:2]
            or [f"{start}{each}" for each in get_close_matches(part, level, n=1, cutoff=0.75)]
            or elsewhere[:2]
            or [key for key in known if last and key.rpartition(".")[2] == last[0]][:2]
        )
        if as_words and not any(_is_list(known.get(".".join(parts[:j]))) for j in range(i + 1)):
            shown = [f"--{each}" for each in near]
        else:
            shown = [repr(each if "." in each.removeprefix(start) else each.removeprefix(start)) for each in near]
        hint = f"; did you mean {' or '.join(shown)}?" if near else ""
        if not near and len(level) <= 25:
            hint = f"; it has {', '.join(level)}"
        return f"{part!r} is not a setting{f' of {place}' if place else ''}{hint}"
    return ""


def _innermost(message: str, known: dict[str, Any]) -> str:
    """The deepest part of an error of nested types, which is where the mistake is."""
    places: list[tuple[int, str]] = []
    found: list[tuple[int, str, str]] = []
    given: dict[str, str] = {}
    for line in message.splitlines():
        indent, text = len(line) - len(line.lstrip()), line.strip().removeprefix("- ")
        while places and places[-1][0] >= indent and text:
            places.pop()
        place = ".".join(name for _, name in places)
        if key := re.match(r'Parser key "([\w.]+)":(.*)', text):
            places.append((indent, key[1]))
            place, text = ".".join(name for _, name in places), key[2].strip()
        if text.startswith("Given value: "):
            given[place] = text.removeprefix("Given value: ")
        elif text and not re.match(
            r"Does not validate|Subtypes:|Errors:|Given value type:|.*'NoneType'|.* a path but", text
        ):
            found.append((len(places), place, text))
    if not found or ("Does not validate" not in message and "Parser key" not in message):
        return message
    depth = max(depth for depth, _, _ in found)
    place = next(where for level, where, _ in found if level == depth)
    texts = list(dict.fromkeys(_plain(text) for level, where, text in found if level == depth and where == place))
    text, value = " or ".join(texts), given.get(place, "")
    if lacking := re.match(r"the following arguments are required: (\w+)$", text):
        place, text = f"{place}.{lacking[1]}", "give one: it is required"
    if place not in known:  # the parser leaves out the group of a class that is chosen within another group
        start, _, last = place.rpartition(".")
        place = next((key for key in known if key.startswith(f"{start}.") and key.endswith(f".{last}")), place)
    level = _below(place, known)
    if level and re.search("expected (list|dot import path)", text):
        several = "a list of " if "expected list" in text else ""
        return f"{place}: expected {several}{{{', '.join(level)}}}, got {value!r}"
    if wrong := re.search(r"(?:import path string: |class_path ')([\w.:]+)", text):
        kinds = [kind for kind in _classes(known.get(place)) for kind in _subclasses(kind)]
        names = [kind.__name__ for kind in kinds if not isabstract(kind)]
        near = get_close_matches(wrong[1].rpartition(".")[2], names, n=1)
        if not near and str in get_args(known.get(place)) and (word := re.search(r"import path string: (\S+)", text)):
            return f"{place}: the word {word[1]!r} takes no settings; name a class: --{place} {{{', '.join(names)}}}"
        return f"{place}: no class {wrong[1]!r}" + (f"; did you mean {near[0]!r}?" if near else f" ({text})")
    if text.startswith("expected") and ", got " not in text:
        text += f", got {value!r}"
    if (one_of := re.match(r"expected one of \[(.*)\], got (.*)$", text)) is not None:
        near = get_close_matches(one_of[2].strip("'"), re.findall(r"'([^']*)'", one_of[1]), n=1)
        text += f"; did you mean {near[0]!r}?" if near else ""
    return f"{place}: {text}"


def _plain(text: str) -> str:
    """A type error in words."""
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"^Expected an? (?:typing\.Literal)?", "expected ", text).replace("expected [", "expected one of [")
    return re.sub(r"\. Got value: (.*)$", lambda got: f", got {got[1]!r}", text)


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
        if told := _unknown(name, known):
            raise ConfigError(f"{where}: {told}")
        if value is None and type(None) not in get_args(known.get(name, Any)) and known.get(name, Any) is not Any:
            raise ConfigError(f"{where}: {name} has no value")  # jsonargparse takes None for any type
    try:
        return built(parser, kind, parser.parse_object(dict(values)))
    except StepkdError as error:
        raise ConfigError(f"{where}: {_innermost(str(error), known)}") from None


def built(parser: ArgumentParser, kind: type[S], values: Any) -> S:
    """The instance of a dataclass whose fields a parser has read.

    Raises:
        StepkdError: what the dataclass, or one that it holds, refuses.
    """
    try:
        made = parser.instantiate(values)
        return kind(**{field.name: made[field.name] for field in fields(kind) if field.init})  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        if (mistake := user_mistake(error)) is not None:
            raise mistake from error
        raise
