"""What a source is, and the registry of them.

A source is one small file: which of the file's columns hold what (``reads``), how a raw row becomes a contract row
(``map_row``), where it lives on the hub, and which splits are for evaluation only. To add one, write such a file and
import it in this package's ``__init__``; a project of your own can call :func:`register` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepkd.data.checks import did_you_mean, shown
from stepkd.data.rows import Contract
from stepkd.errors import ConfigError, DataError

Row = dict[str, Any]
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
class Option:
    """A setting that only one source has."""

    default: Any
    """Value when the option is not given; its type is the type asked for (None: anything)."""
    help: str
    """One line for listings."""


@dataclass(frozen=True)
class Source:
    """Where rows come from and how they become contract rows."""

    name: str
    """Registry name; also the first part of the row ids it gives."""
    help: str
    """One line for listings."""
    contract: Contract | None
    """What its rows are; None: told from the first row."""
    map_row: MapRow
    """Maps a raw row to a contract row, or to several (or none)."""
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Contract column -> the file's columns that may hold it, first match wins; empty: columns stay as they are."""
    optional: frozenset[str] = frozenset()
    """The columns in ``reads`` that a file may lack."""
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
    options: Mapping[str, Option] = field(default_factory=dict)
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
            default = self.options[name].default
            if value is None or default is None or _same_type(value, default):
                continue
            raise ConfigError(
                f"option {name!r} of source {self.name!r} must be {type(default).__name__}, found {shown(value)}"
            )
        return {name: options.get(name, option.default) for name, option in self.options.items()}

    def select(self, row: Mapping[str, Any], columns: Mapping[str, str], *, path: str, line: int) -> RawRow:
        """Bring a file's columns under their contract names.

        Args:
            row: the row as read.
            columns: the user's mapping, contract column -> the file's column; it wins over ``reads``.
            path: where the row came from.
            line: 1-based line or row number.

        Returns:
            The raw row that ``map_row`` takes.

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
            elif name not in self.optional:
                raise DataError(
                    f"missing column {' or '.join(map(repr, candidates))} of source {self.name!r}; the row has "
                    f"{listed}. If another column holds it, say so with columns: {{{name}: <that column>}}; for a file "
                    "of your own set source: rows",
                    path=path, line=line, column=candidates[0],
                )  # fmt: skip
        return RawRow(values, path=path, line=line, columns=columns)


def _same_type(value: object, default: object) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, Mapping):
        return isinstance(value, Mapping)
    return isinstance(value, type(default))


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


def passed_on(raw: RawRow, *names: str) -> Row:
    """Copy the named columns that the raw row has and that are not null.

    Args:
        raw: the row.
        names: column names.

    Returns:
        A new dict of those columns.
    """
    return {name: raw[name] for name in names if raw.get(name) is not None}


def place(path: str | Path, split: str | None = None) -> str:
    """Return the name of a place that is not a plain file: ``openai/gsm8k:test``."""
    return str(path) if split is None else f"{path}:{split}"
