"""What a source is, the registry of them, and where a source's raw rows are: a file, a folder or the hub.

A source says which of the file's columns hold what (``reads``), how a raw row becomes a contract row (``map_row``),
where it lives on the hub, and which splits are for evaluation only. A :class:`Benchmark` also says how its problems are
asked and judged. To add one, add an entry to :mod:`stepkd.data.sources.problems`; a project of your own can call
:func:`register` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepkd.data.io import READABLE_ENDINGS, file_ending, read_rows, stem
from stepkd.data.rows import PROBLEM, Contract, Row, did_you_mean, shown
from stepkd.errors import ConfigError, DataError, check_choice

Options = Mapping[str, Any]


class RawRow(dict[str, Any]):
    """A row as read, its columns already under their contract names, with the place it came from and the mapping."""

    def __init__(
        self, values: Mapping[str, Any], *, path: str, line: int, columns: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(values)
        self.columns = columns or {}
        self.path = path
        self.line = line

    def error(self, message: str, *, column: str | None = None) -> DataError:
        """Return (not raise) a DataError that names this row's file and line."""
        return DataError(message, path=self.path, line=self.line, column=column)


MapRow = Callable[[RawRow, Options], Row | Sequence[Row]]
Generate = Callable[[Options, str], Iterator[Row]]


@dataclass(frozen=True)
class SourceOption:
    """A setting that only one source has."""

    default: Any
    """Value when the option is not given; its type is the type asked for (None: anything)."""
    help: str
    """One line for listings."""
    choices: tuple[str, ...] = ()
    """The values that are allowed; empty: any of the default's type."""


@dataclass(frozen=True)
class Source:
    """Where rows come from and how they become contract rows."""

    name: str
    """Registry name; also the first part of the row ids it gives."""
    help: str
    """One line for listings."""
    contract: Contract | None = PROBLEM
    """What its rows are; None: told from the first row."""
    map_row: MapRow = lambda raw, options: dict(raw)
    """Maps a raw row to a contract row, or to several (or none)."""
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Contract column -> the file's columns that may hold it, first match wins; empty: columns stay as they are."""
    requires: frozenset[str] = frozenset({"prompt", "answer"})
    """The columns in ``reads`` that a file must have; of any other the contract says what it lacks."""
    keeps: tuple[str, ...] = ()
    """Further file columns passed on to ``map_row``, where present."""
    hub: str | None = None
    """Dataset id on the Hugging Face hub."""
    hub_configs: tuple[str, ...] = ()
    """Hub configurations, joined in this order; empty: the dataset has only one."""
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    """Our split name -> the hub's split name."""
    default_split: str = "train"
    """Split when none is asked for."""
    evaluation_only: frozenset[str] = frozenset()
    """Splits that must not be trained on; "*" stands for all of them."""
    options: Mapping[str, SourceOption] = field(default_factory=dict)
    """The options it understands."""
    generate: Generate | None = None
    """For generated sources: (options, split) -> raw rows; such a source takes no path and no hub id."""

    def is_evaluation_only(self, split: str) -> bool:
        """Whether a split must not be trained on."""
        return "*" in self.evaluation_only or split in self.evaluation_only

    def settings(self, options: Options) -> Row:
        """Check a user's options and fill in the defaults.

        Args:
            options: option name -> value.

        Returns:
            Every option of this source with its value.

        Raises:
            ConfigError: an unknown option or a value of the wrong type.
        """
        for name, value in options.items():
            if name not in self.options:
                raise ConfigError(f"source {self.name!r} has no option {name!r}; {did_you_mean(name, self.options)}")
            option, place = self.options[name], f"option {name} of source {self.name!r}"
            kind = type(option.default)
            if option.default is not None and type(value) is not kind:
                raise ConfigError(f"{place} must be {kind.__name__}, found {shown(value)}")
            if option.choices:
                check_choice(place, value, option.choices)
        return {name: options.get(name, option.default) for name, option in self.options.items()}

    def select(self, row: Mapping[str, Any], columns: Mapping[str, str], *, path: str, line: int) -> RawRow:
        """Bring a file's columns under their contract names.

        Args:
            row: the row as read.
            columns: the user's mapping, contract column -> the file's column; it wins over ``reads``.
            path: where the row came from.
            line: 1-based line or row number.

        Returns:
            The raw row that ``map_row`` takes; ids and answers that are numbers are texts (:func:`as_text`).

        Raises:
            DataError: a column that is not there, named together with those that are.
        """
        renamed = set(columns.values())
        values: Row = {} if self.reads else {name: value for name, value in row.items() if name not in renamed}
        for name in self.keeps:
            if name in row:
                values[name] = row[name]
        listed = ", ".join(map(repr, row)) or "no columns"
        for name, file_column in columns.items():
            if file_column not in row:
                hint = did_you_mean(file_column, map(str, row))
                raise DataError(
                    f"columns maps {name!r} to {file_column!r}, which is not there (the row has {listed}); {hint}",
                    path=path, line=line, column=file_column,
                )  # fmt: skip
            values[name] = row[file_column]
        for name, candidates in self.reads.items():
            if name in columns:
                continue
            found = next((candidate for candidate in candidates if candidate in row), None)
            if found is not None:
                values[name] = row[found]
            elif name in self.requires:
                raise DataError(
                    f"missing column {' or '.join(map(repr, candidates))} of source {self.name!r}; the row has "
                    f"{listed}. If another column holds it, say so with columns: {{{name}: <that column>}}; for a file "
                    "of your own set source: rows",
                    path=path, line=line, column=candidates[0],
                )  # fmt: skip
        for name in ("id", "problem_id", "answer", "final_answer"):
            if name in values:
                values[name] = as_text(values[name])
        return RawRow(values, path=path, line=line, columns=columns)


@dataclass(frozen=True, kw_only=True)
class Benchmark(Source):
    """A source whose problems models are evaluated on by default, and how they are asked and judged."""

    template: str
    """Built-in prompt template."""
    extractors: tuple[str, ...]
    """How the final answer is found, in order (:mod:`stepkd.grading.extract`)."""
    max_new_tokens: int
    """Longest completion in tokens."""
    evaluated_split: str | None = "test"
    """Split that is evaluated; None: the default one."""


_SOURCES: dict[str, Source] = {}


def register(source: Source) -> Source:
    """Add a source to the registry.

    Args:
        source: its name must be new.

    Returns:
        The same source.

    Raises:
        ConfigError: the name is taken.
    """
    if source.name in _SOURCES:
        raise ConfigError(f"a source named {source.name!r} is registered already; choose another name")
    _SOURCES[source.name] = source
    return source


def get_source(name: str) -> Source:
    """Return a source by name.

    Args:
        name: a registered name.

    Raises:
        ConfigError: no such source; the message suggests one.
    """
    if name not in _SOURCES:
        hint = did_you_mean(name, _SOURCES)
        raise ConfigError(f"no data source named {name!r}; {hint} (files in contract form: source 'rows' with a path)")
    return _SOURCES[name]


def list_sources() -> tuple[Source, ...]:
    """Return all registered sources, sorted by name."""
    return tuple(_SOURCES[name] for name in sorted(_SOURCES))


def as_text(value: object) -> object:
    """Write a number as the text of an answer or an id; everything else, booleans included, stays as it is.

    Files hold answers and ids as JSON numbers as often as texts: 42 becomes "42" and 7.0 becomes "7".

    Args:
        value: a cell of a file.

    Returns:
        The text, or the value unchanged for the contract to judge.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value.bit_length() < 10_000:  # Python writes no integer of more than 4,300 digits
        return str(value)
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        return str(int(value)) if value.is_integer() else repr(value)
    return value


Read = tuple[Row, str, int]
"""A raw row, the place it came from, and its line there."""


def split_of_file(path: Path, source: Source) -> str | None:
    """Return the split a file's name states (``test.jsonl``, ``train-00000-of-00002.parquet``), or None.

    Args:
        path: a data file.
        source: only its split names count.
    """
    name = stem(path).lower()
    return next((split for split in source.splits if split in (name, name.split("-0")[0])), None)


def data_files(folder: Path, source: Source, split: str, config: str | None) -> list[Path]:
    """Find the files of a split in a folder.

    Looked for, in this order: ``<split>.<ending>`` or shards ``<split>-00000-of-...`` in the folder, in its
    ``<config>`` folder or in ``data``; then a single data file in the folder, whatever its name.

    Args:
        folder: an existing folder.
        source: whose splits these are.
        split: our split name.
        config: hub configuration, the name of a subfolder in copies of hub datasets.

    Returns:
        One file, or the shards in order.

    Raises:
        DataError: no file fits, or several single files do; the message lists what is there.
    """
    wanted = {split, source.splits.get(split, split)}
    folders = [folder, *(folder / name for name in (config, *source.hub_configs) if name), folder / "data"]
    for searched in folders:
        files = _data_files_in(searched)
        exact = [file for file in files if stem(file).lower() in wanted]
        shards = [file for file in files if stem(file).lower().split("-0")[0] in wanted]
        if len(exact) > 1:
            names = ", ".join(file.name for file in exact)
            raise DataError(f"several files for one split: {names}; give the file's own path", path=searched)
        if exact or shards:
            return exact or shards
    here = _data_files_in(folder)
    if len(here) == 1 and split_of_file(here[0], source) is None:
        return here
    names = ", ".join(file.name for file in here) or f"no {', '.join(READABLE_ENDINGS)} file"
    raise DataError(
        f"no file for split {split!r} of source {source.name!r}; the folder has {names}. "
        f"Name the file {split}.jsonl or give its own path",
        path=folder,
    )


def _data_files_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file_ending(file) and not file.name.startswith("."))


def read_path(path: Path, source: Source, split: str, config: str | None) -> Iterator[Read]:
    """Stream a file, the files of a split in a folder, or a folder written by ``datasets``' ``save_to_disk``.

    Args:
        path: what to read.
        source: for its split names.
        split: our split name; of no account in a file, and in a saved folder that holds a single dataset.
        config: see :func:`data_files`.

    Yields:
        ``(row, path, line)``; of a saved folder ``(row, "path:split", row number)``.

    Raises:
        DataError: the split is not there, or the folder cannot be read.
    """
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        for file in data_files(path, source, split, config) if path.is_dir() else [path]:
            yield from ((row, str(file), line) for row, line in read_rows(file))
        return
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds here; all mean the same to the user
        raise DataError(f"cannot read the saved dataset: {_reason(error)}; save it again", path=path) from error
    if isinstance(loaded, dict):  # a DatasetDict
        key = split if split in loaded else source.splits.get(split, split)
        if key not in loaded:
            raise DataError(f"the saved dataset has no split {split!r}; {did_you_mean(split, loaded)}", path=path)
        loaded = loaded[key]
    yield from _numbered(loaded, f"{path}:{split}")


def read_hub(source: Source, split: str, hub: str | None = None, config: str | None = None) -> Iterator[Read]:
    """Stream a hub dataset, downloading it unless it is cached.

    Args:
        source: for its dataset, configurations and split names.
        split: our split name, or the hub's.
        hub: dataset id (``owner/name``) in place of the source's own, with splits of its own.
        config: configuration in place of the source's own, which are joined.

    Yields:
        ``(row, "hub id:split", row number)``.

    Raises:
        ConfigError: the source has no such split.
        DataError: no network and no cache, or no such dataset, configuration or split.
    """
    import datasets

    own, dataset = hub in (None, source.hub), hub or source.hub or ""
    if own:
        asked, split = split, source.splits.get(split, split)
        if split not in source.splits.values():
            raise ConfigError(f"source {source.name!r} has no split {asked!r}; {did_you_mean(asked, source.splits)}")
    for name in (config,) if config is not None else (own and source.hub_configs) or (None,):
        place = f"{dataset}{'' if name is None else f'/{name}'}:{split}"
        try:
            loaded = datasets.load_dataset(dataset, name, split=split)
        except Exception as error:  # network, cache, id, config and split errors come as many unrelated classes
            raise DataError(
                f"cannot load this from the hub: {_reason(error)}. No network? Give path=<file or folder> instead; "
                "otherwise check the dataset id, hub_config and split",
                path=place,
            ) from error
        yield from _numbered(loaded, place)


def _numbered(rows: Any, name: str) -> Iterator[Read]:
    number = 0
    for number, row in enumerate(rows, start=1):
        yield dict(row), name, number
    if number == 0:
        raise DataError("the dataset holds no rows; take another split", path=name)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
