"""What a source is: its columns, its splits, and how a row as read becomes a contract row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stepkd.data.rows import PROBLEM, Contract, Row, shown
from stepkd.errors import ConfigError, DataError, check_choice, nearest

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
class Source:
    """Where rows come from and how they become contract rows."""

    name: str
    """Its name in ``stepkd/data/sources.yaml``; also the first part of the row ids it gives."""
    help: str
    """One line for listings."""
    contract: Contract | None = PROBLEM
    """What its rows are; None: told from the first row."""
    map_row: MapRow = lambda raw, options: dict(raw)
    """Maps a raw row to a contract row, or to several (or none)."""
    reads: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Our column -> the file's columns that may hold it, first match wins; empty: columns stay as they are."""
    requires: Sequence[str] = ("prompt", "answer")
    """The columns in ``reads`` that a file must have; of any other the contract says what it lacks."""
    hub: str | None = None
    """Dataset id on the Hugging Face hub."""
    hub_configs: Sequence[str] = ()
    """Hub configurations, joined in this order; empty: the dataset has only one."""
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    """Our split name -> the hub's split name."""
    default_split: str = "train"
    """Split when none is asked for."""
    evaluation_only: Sequence[str] = ()
    """Splits that must not be trained on; "*" stands for all of them."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings that it alone has: name -> default, whose type is asked for (None: anything), or the list of what is
    allowed, the default first (an empty list is a default like any other)."""
    generate: Generate | None = None
    """For generated sources: (options, split) -> raw rows; such a source takes no path and no hub id."""

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
            if not self.options:
                raise ConfigError(f"source {self.name!r} has no options of its own: drop {name}")
            check_choice(f"option (source {self.name})", name, self.options)
            default, place = self.options[name], f"option {name} of source {self.name!r}"
            if isinstance(default, list) and default:
                check_choice(place, value, default)
            elif default is not None and type(value) is not type(default):
                raise ConfigError(f"{place} must be {type(default).__name__}, found {shown(value)}")
        defaults = {name: each[0] if isinstance(each, list) and each else each for name, each in self.options.items()}
        return defaults | dict(options)

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
        listed = ", ".join(map(repr, row)) or "no columns"
        for name, candidates in {**self.reads, **{name: (column,) for name, column in columns.items()}}.items():
            found = next((candidate for candidate in candidates if candidate in row), None)
            if found is not None:
                values[name] = row[found]
                continue
            place: dict[str, Any] = {"path": path, "line": line, "column": candidates[0]}
            if name in columns:
                column = columns[name]
                raise DataError(
                    f"columns maps {name!r} to {column!r}, which is not there (the row has {listed})."
                    + nearest(column, map(str, row)),
                    **place,
                )
            if name in self.requires:
                raise DataError(
                    f"missing column {' or '.join(map(repr, candidates))} of source {self.name!r}; the row has "
                    f"{listed}. If another column holds it, say so with columns: {{{name}: <that column>}}; for a file "
                    "of your own set source: rows",
                    **place,
                )
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
    samples: int = 1
    """Completions a problem that the field draws at temperature 0.6 and top-p 0.95 (``recipes/eval/sampled.yaml``)."""


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
