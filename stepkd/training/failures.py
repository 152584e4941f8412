"""What to say of a failure: a mistake in a recipe, with its place and the nearest setting that exists; memory that ran
out; another rank that is gone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch.cli import LightningArgumentParser

from stepkd.errors import ConfigError, MachineError, StepkdError, disk_error
from stepkd.safe import check_import
from stepkd.yaml_files import find_recipe

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
_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
_PEER = re.compile(
    r"connection closed by peer|connection reset by peer|remote process exited|ncclRemoteError|broken pipe",
    re.IGNORECASE,
)


class RecipeParser(LightningArgumentParser):
    """A parser that takes no abbreviations, and raises our errors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Raise ConfigError."""
        if denied := re.search(r"Importing '([^']+)' is not allowed", message):
            try:
                check_import(denied.group(1), "the recipe")
            except ConfigError as refused:
                raise refused from ex
        raise ConfigError(message) from ex


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
    given = list(_given(words))
    known = _settings(parser, given)
    chosen = {name.removesuffix(".class_path"): i for i, (_, name, value) in enumerate(given) if isinstance(value, str)}
    for i, (file, name, _) in enumerate(given):
        replaced = any(name.startswith(f"{place}.") and later > i for place, later in chosen.items())
        if not replaced and (told := _unknown(name, known)):  # settings of a class that another one replaced are gone
            return f"{file}: {told}" if file else told
    return _innermost(message, known)


def _given(words: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """File (empty for the command line), dotted name without ``init_args``, and value of every setting, in order."""
    import yaml

    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if not flag.startswith("-") or flag == "-":
            continue
        name, value = flag.lstrip("-").rstrip("+"), value if equals else "".join(words[i + 1 : i + 2])
        file = ""
        try:
            if name in ("config", "c") and Path(value).is_file():
                file, name, value = value, "", Path(value).read_text(encoding="utf-8")
            value = yaml.safe_load(value)
        except (OSError, ValueError, yaml.YAMLError):
            pass  # the value of another kind
        yield from _flat(file, "" if name in ("config", "c") else name.replace(".init_args", ""), value)


def _flat(file: str, name: str, value: Any) -> Iterator[tuple[str, str, Any]]:
    if name:
        yield file, name, value
    for each in value if isinstance(value, list) else [value]:
        for key, below in each.items() if isinstance(each, dict) else ():
            yield from _flat(file, name if key == "init_args" else f"{name}.{key}".lstrip("."), below)


def _settings(parser: Any, given: Sequence[tuple[str, str, Any]]) -> dict[str, Any]:
    """Dotted name -> type of every setting, those of the classes that were chosen included."""
    named = {name.removesuffix(".class_path"): value for _, name, value in given if isinstance(value, str)}
    found: dict[str, Any] = {}
    pending = [(action.dest, getattr(action, "_typehint", None)) for action in parser._actions]
    while pending:
        name, hint = pending.pop(0)
        if name in found:
            continue
        found[name] = hint
        for kind in _classes(hint):
            chosen = kind if is_dataclass(kind) else _class(named[name], kind) if name in named else None
            if chosen is not None:
                inner = type(parser)()
                inner.add_class_arguments(chosen, name, fail_untyped=False)
                pending += [(each.dest, getattr(each, "_typehint", None)) for each in inner._actions]
    return {name: hint for name, hint in found.items() if ".help" not in name}


def _classes(hint: Any) -> list[type]:
    """The classes in a type: of a union's members, a list's items."""
    inner = [kind for part in get_args(hint) for kind in _classes(part)]
    return inner if inner or not isinstance(hint, type) or hint.__module__ == "builtins" else [hint]


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


def _unknown(name: str, known: dict[str, Any]) -> str:
    """What to say of a setting that does not exist; empty for one that does, or whose place takes any key."""
    parts, place = name.split("."), ""
    for i, part in enumerate(parts):
        here, level = f"{place}.{part}".lstrip("."), _below(place, known)
        if here in known or _below(here, known):
            place = here
            continue
        if not level or part in ("class_path", "dict_kwargs", "help"):
            return ""
        tails = [parts[i:], [*parts[i:-1], SYNONYMS.get(parts[-1], parts[-1])]]
        ends = dict.fromkeys("." + ".".join(tail) for tail in tails)
        elsewhere = [key for end in ends for key in known if f".{key}".endswith(end)]
        last = get_close_matches(part, [key.rpartition(".")[2] for key in known], n=1, cutoff=0.8)
        near = (
            [each for each in level if each == SYNONYMS.get(part)]
            or [key for key in elsewhere if key.startswith(place)][:2]
            or get_close_matches(part, level, n=1, cutoff=0.75)
            or elsewhere[:2]
            or [key for key in known if last and key.rpartition(".")[2] == last[0]][:2]
        )
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
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
        names = [kind.__name__ for kind in _classes(known.get(place)) for kind in _subclasses(kind)]
        near = get_close_matches(wrong[1].rpartition(".")[2], names, n=1)
        return f"{place}: no class {wrong[1]!r}" + (f"; did you mean {near[0]!r}?" if near else f" ({text})")
    if text.startswith("expected") and ", got " not in text:
        text += f", got {value!r}"
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
        current = current.__cause__ or current.__context__
    return found


def explained(error: BaseException, module: Any = None, last: Path | None = None) -> MachineError | None:
    """The same failure in words, where it is one of the machine and not of the code; else None.

    Args:
        error: what was raised.
        module: the training module, for its phase and settings; None before there is one.
        last: where the run keeps its last checkpoint, if it keeps one.
    """
    if words := disk_error(error):
        return words
    if not isinstance(error, RuntimeError | MemoryError) or isinstance(error, StepkdError):
        return None
    text = str(error)
    if isinstance(error, MemoryError) or _MEMORY.search(text):
        return MachineError(_memory(text, module, last))
    if _PEER.search(text):
        return MachineError(
            "another process of this run has ended, and this one waited for it: its own error says why (the launcher "
            f"reports the first that failed as the root cause). Here it came as: {_first_line(text)}"
        )
    return None


def _memory(text: str, module: Any, last: Path | None) -> str:
    phase = getattr(getattr(module, "phases", None), "interrupted", None)
    size = getattr(module, "micro_batch_tokens", None)
    where = "" if phase is None else f" in the phase {phase.name!r}"
    now = "" if size is None else f" (now {size}; half of it, the gradient stays the same)"
    more = "; while sampling, a smaller max_rows" if phase is not None and "rollout" in phase.name else ""
    kept = "" if last is None else "No checkpoint was written yet. "
    if last is not None and last.is_file():
        kept = f"{last} is intact: --resume goes on from it. "
    return (
        f"out of memory{where}. Three settings take less, in this order: model.init_args.micro_batch_tokens{now}; "
        "model.init_args.policy.gradient_checkpointing: true; LoRA (policy.lora) or a sharded strategy "
        f"(recipes/strategy/fsdp2.yaml) in place of all weights on every device{more}. `stepkd doctor --config ...` "
        f"measures the need. {kept}({_first_line(text)})"
    )


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "no message"
