"""What to load (:class:`DataConfig`), in YAML or as one command-line word, and the loading itself."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepkd.data.io import file_ending, stem
from stepkd.data.rows import CONTRACTS, Contract, ExtraRule, Row, detect_contract, did_you_mean, validate
from stepkd.data.sources.registry import Read, Source, get_source, list_sources, read_hub, read_path, split_of_file
from stepkd.errors import ConfigError, DataError
from stepkd.steps.labels import label_kind

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig:
    """Which rows to load. Plain types only, so that a recipe can hold it."""

    source: str = "rows"
    """Registry name (gsm8k, math500, task, ...), or `rows` for files and hub datasets in contract form."""
    path: str | None = None
    """File, folder, or folder written by `datasets`' save_to_disk; wins over the hub. None: the hub (or generated)."""
    hub: str | None = None
    """Hub dataset id to use in place of the source's own; not read where there is a path."""
    hub_config: str | None = None
    """Hub configuration in place of the source's own."""
    split: str | None = None
    """Split name; None: the source's default. A file whose name states a split is that split."""
    limit: int | None = None
    """Number of rows to keep, at least 1; None: all."""
    offset: int = 0
    """Rows to skip first (after shuffling), from 0."""
    shuffle_seed: int | None = None
    """Seed of the row order; None: the file's order."""
    columns: dict[str, str] = field(default_factory=dict)
    """Contract column -> the file's column that holds it."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of this source only; see `list_sources`."""
    allow_evaluation_data: bool = False
    """Allow training on data that is kept for evaluation."""

    def __post_init__(self) -> None:
        source = get_source(self.source)
        source.settings(self.options)
        if source.generate is not None and (self.path is not None or self.hub is not None or self.columns):
            raise ConfigError(f"source {self.source!r} generates its rows; drop path, hub and columns")
        given = self.path or self.hub or source.generate or source.hub or isinstance(self, RowsInMemory)
        if not given:
            raise ConfigError(f"source {self.source!r} has no hub dataset of its own; give path=<file> or hub=<id>")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit}: must be at least 1, or absent for all rows")
        if self.offset < 0:
            raise ConfigError(f"offset={self.offset}: must be 0 or more")
        for name in self.columns:
            if source.reads and name not in source.reads:
                raise ConfigError(
                    f"columns: source {self.source!r} reads no {name!r}; {did_you_mean(name, source.reads)}"
                )


@dataclass(frozen=True)
class RowsInMemory(DataConfig):
    """Rows that a script has at hand."""

    rows: Iterable[Mapping[str, Any]] = ()
    """In contract form or in TRL's: a list, a `datasets.Dataset`, anything that gives mappings."""


if TYPE_CHECKING:
    Rows = DataConfig | str | Path | Mapping[str, Any] | Iterable[Mapping[str, Any]]
else:  # what a recipe holds
    Rows = DataConfig


def as_spec(data: Rows | None) -> DataConfig | None:
    """What a data module is given, as a spec.

    Args:
        data: a spec or a dict of its settings; a path, or a word as :func:`parse_spec` reads it; or rows themselves.

    Raises:
        ConfigError: something else, such as a `DatasetDict` of several splits.
    """
    if data is None or isinstance(data, DataConfig):
        return data
    if isinstance(data, str | Path):
        return parse_spec(str(data))
    if isinstance(data, Mapping):
        if unknown := sorted(set(data) - {each.name for each in dataclasses.fields(DataConfig)}):
            raise ConfigError(f"{unknown[0]!r} is no setting of data; of a dictionary of splits give one")
        return DataConfig(**data)
    if not isinstance(data, Iterable):
        raise ConfigError(f"rows are a list of dicts, a datasets.Dataset or a path, not a {type(data).__name__}")
    return RowsInMemory(rows=data)


def resolve_split(spec: DataConfig) -> str:
    """Tell which split a spec means.

    Args:
        spec: what to load.

    Returns:
        The split that the file's name states, else the one asked for, else the source's default.
    """
    source = get_source(spec.source)
    file = Path(spec.path) if spec.path is not None and file_ending(spec.path) else None
    if file is not None and (stated := split_of_file(file, source)) is not None:
        return stated
    asked = spec.split
    if asked is not None and asked not in source.splits:
        asked = next((ours for ours, hubs in source.splits.items() if hubs == asked), asked)
    return asked or source.default_split


def check_training_use(spec: DataConfig) -> None:
    """Refuse a spec whose rows are kept for evaluation.

    Args:
        spec: what somebody is about to train on.

    Raises:
        ConfigError: the split is for evaluation only and `allow_evaluation_data` is not set.
    """
    source = get_source(spec.source)
    split = resolve_split(spec)
    if source.is_evaluation_only(split) and not spec.allow_evaluation_data:
        raise ConfigError(
            f"{source.name!r} (split {split!r}) is kept for evaluation: a model trained on it cannot be judged by it. "
            "Train on other data, or set allow_evaluation_data: true if that is what you want"
        )


def load_rows(spec: DataConfig, *, contract: Contract | None = None, ratings: bool = False) -> list[Row]:
    """Read, map and validate the rows of a spec.

    Without shuffling, reading stops after the last row asked for. A row without an id gets ``source/split/index``,
    with the 0-based position in the file, so that ids do not depend on limit, offset or shuffling.

    A file under another source's name whose columns are those of ``rows`` is read as ``rows``. Whole-number step labels
    of ``rows`` among which there is no -1 mean incorrect (0) and correct (1) and become booleans.

    Args:
        spec: what to load.
        contract: what the caller needs; None: what the source gives (for `rows`: its option, or told from the first
            row).
        ratings: whole-number step labels are ratings whose 0 is neutral, also where no -1 is among them.

    Returns:
        At least one row; every row has an ``id``.

    Raises:
        DataError: the file or a row is not as it should be, or no row is left after offset and filtering.
        ConfigError: the spec contradicts itself.
    """
    spec = _as_contract_rows(spec)
    rows: list[Row] = []
    stop = None if spec.limit is None or spec.shuffle_seed is not None else spec.offset + spec.limit
    for row in _valid_rows(spec, contract):
        rows.append(row)
        if stop is not None and len(rows) >= stop:
            break
    if spec.shuffle_seed is not None:
        order = sorted(range(len(rows)), key=lambda index: _shuffle_key(spec.shuffle_seed, index))
        rows = [rows[index] for index in order]
    total = len(rows)
    rows = rows[spec.offset : None if spec.limit is None else spec.offset + spec.limit]
    if not rows:
        raise DataError(
            f"no rows are left: {total} found, offset {spec.offset}; lower the offset (0 takes all)", path=_where(spec)
        )
    if not ratings and spec.source == "rows":
        _read_binary_labels(rows, spec)
    return rows


def left_out(spec: DataConfig, used: int) -> list[str]:
    """What a file of one's own makes of other settings of its spec, which a recipe may have brought.

    Args:
        spec: what has been loaded.
        used: number of rows.

    Returns:
        A sentence each for a hub data set that is not read, and for rows that limit or offset leave out.
    """
    if spec.path is None:
        return []
    said = [f"{spec.path} is read, and hub: {spec.hub} is not"] if spec.hub is not None else []
    cuts = [f"{name}: {getattr(spec, name)}" for name in ("limit", "offset") if getattr(spec, name)]
    total = 0
    with contextlib.suppress(DataError):  # of a row that nobody has asked for
        for _ in _raw_rows(spec, get_source(spec.source), {}, resolve_split(spec)) if cuts else ():
            total += 1
    if total > used:
        said.append(f"{used:,} of {total:,} rows of {spec.path} are used ({', '.join(cuts)})")
    return said


def _as_contract_rows(spec: DataConfig) -> DataConfig:
    """The spec, with source `rows` where a file under another source's name has not its columns but those of `rows`."""
    source, rows = get_source(spec.source), get_source("rows")
    if spec.path is None or not source.reads:
        return spec
    values, path, line = next(_raw_rows(spec, source, {}, resolve_split(spec)))
    try:
        source.select(values, spec.columns, path=path, line=line)
    except DataError:
        with contextlib.suppress(DataError):
            row = rows.map_row(rows.select(values, spec.columns, path=path, line=line), {})
            if "prompt" in row or "chosen" in row:
                columns = ", ".join(map(repr, values))
                logger.warning(
                    "%s has the columns %s, so it is read as source 'rows', not %r", path, columns, spec.source
                )
                return dataclasses.replace(spec, source="rows", options={})
    return spec


def _shuffle_key(seed: int | None, index: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()


def _where(spec: DataConfig) -> str:
    return spec.path or f"{spec.hub or spec.source}:{resolve_split(spec)}"


def _valid_rows(spec: DataConfig, contract: Contract | None) -> Iterator[Row]:
    source = get_source(spec.source)
    options = source.settings(spec.options)
    split = resolve_split(spec)
    prefix = _id_prefix(spec, source, split)
    # A source of our own keeps what it means to keep; only files in contract form can hold slips of the pen.
    extra: ExtraRule = options["extra_columns"] if source.name == "rows" else "keep"
    wanted = contract or source.contract or CONTRACTS.get(options.get("contract", "auto"))
    for index, (values, path, line) in enumerate(_raw_rows(spec, source, options, split)):
        raw = source.select(values, spec.columns, path=path, line=line)
        mapped = source.map_row(raw, options)
        several = not isinstance(mapped, dict)
        for part, row in enumerate([mapped] if isinstance(mapped, dict) else mapped):
            if wanted is None:
                wanted = detect_contract(row, path=path, line=line)
            validate(row, wanted, path=path, line=line, extra=extra)
            if row.get("id") is None:
                row["id"] = f"{prefix}/{index}/{part}" if several else f"{prefix}/{index}"
            yield row


def _id_prefix(spec: DataConfig, source: Source, split: str) -> str:
    if source.name == "rows" and spec.path is not None:
        return stem(spec.path) if file_ending(spec.path) else f"{Path(spec.path).name}/{split}"
    return f"{(source.name == 'rows' and spec.hub) or source.name}/{split}"


def _raw_rows(spec: DataConfig, source: Source, options: dict[str, Any], split: str) -> Iterator[Read]:
    if source.generate is not None:
        generated = enumerate(source.generate(options, split), start=1)
        yield from ((row, f"{source.name}:{split}", number) for number, row in generated)
    elif isinstance(spec, RowsInMemory):
        yield from ((dict(each), "rows in memory", number) for number, each in enumerate(spec.rows, start=1))
    elif spec.path is None:
        yield from read_hub(source, spec.split or split, spec.hub, spec.hub_config)
    else:
        yield from read_path(Path(spec.path).expanduser(), source, split, spec.hub_config)


def _read_binary_labels(rows: list[Row], spec: DataConfig) -> None:
    """Whole-number labels 0 and 1 without a -1 are incorrect and correct, as TRL and most hub data sets have them."""
    steps = (("completions", "labels"), ("token_ids", "step_labels"))
    found = [(row, column) for row in rows for texts, column in steps if texts in row and row.get(column) is not None]
    kinds = [label_kind(row[column]) for row, column in found]
    rated = [place for place, kind in zip(found, kinds, strict=True) if kind == "rating"]
    values = {label for row, column in rated for label in row[column]}
    if 0 not in values or -1 in values:
        return
    cast = float if "soft" in kinds else bool  # a chance of 0 may be written as a whole number
    for row, column in rated:
        row[column] = [None if label is None else cast(label) for label in row[column]]
    if cast is float:
        return
    logger.warning(
        "%s: the step labels are whole numbers without a -1, so 0 is read as incorrect and 1 as correct. If 0 means "
        "neutral, set data.init_args.labels.kind: rating (labels.neutral then says what it counts as)",
        _where(spec),
    )


# --- command-line shorthand ----------------------------------------------------------------------------------------


LABELS_NAME = "labels.jsonl"
"""What ``stepkd label`` writes its rows into."""
PAIRS_NAME = "pairs.jsonl"
"""What ``stepkd pairs`` writes its rows into."""


def parse_spec(text: str) -> DataConfig:
    """Read a spec from one command-line word.

    ``gsm8k:path=x/test.jsonl,limit=8`` names a source and its settings; a key that only the source knows is one of its
    options (``task:task=modular,n=64,noise.rate=0.15``); ``columns.prompt=problem`` maps a column; a value with commas
    stands in quotes; a bare file name (``x/rows.jsonl``) or folder means source ``rows``, and so does the folder of a
    job of ``stepkd label`` or ``stepkd pairs`` (its ``labels.jsonl`` or ``pairs.jsonl``).

    Args:
        text: the word.

    Returns:
        The spec.

    Raises:
        ConfigError: an unknown source or key (a near one is suggested), or a value of the wrong type.
    """
    text = text.strip()
    for written in (LABELS_NAME, PAIRS_NAME):
        if (rows := Path(text).expanduser() / written).is_file():
            return DataConfig(path=str(rows))
    if Path(text).expanduser().is_dir() and text not in {source.name for source in list_sources()}:
        return DataConfig(path=text)
    if file_ending(text.partition(",")[0]) and "=" not in text.partition(",")[0]:
        text = f"rows:path={text}"
    name, _, rest = text.partition(":")
    source = get_source(name)
    fields = {item.name: item for item in dataclasses.fields(DataConfig) if item.name != "source"}
    settings: dict[str, Any] = {}
    for part in filter(str.strip, _PART.findall(rest)):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"cannot read {part!r} in {text!r}; write key=value, separated by commas")
        head, _, tail = key.partition(".")
        if head in ("columns", "options") and tail:
            _nest(settings, head, tail, value)
        elif head in source.options:
            _nest(settings, "options", key, value)
        elif head in fields and not tail and head not in ("columns", "options"):
            settings[head] = _typed(str(fields[head].type), _literal(value), _unquoted(value), key=head)
        else:
            known = [*fields, *source.options]
            raise ConfigError(f"unknown key {key!r} in {text!r}; {did_you_mean(head, known)}")
    return DataConfig(source=name, **settings)


_PART = re.compile(r"""(?:="[^"]*"?|='[^']*'?|=\{[^}]*\}?|=\[[^\]]*\]?|[^,])+""")
"""What stands between commas; those in quotes or brackets behind an equals sign do not count."""


def _nest(settings: dict[str, Any], head: str, tail: str, value: str) -> None:
    target = settings.setdefault(head, {})
    *folders, last = tail.split(".")
    for name in folders:
        target = target.setdefault(name, {})
    target[last] = _unquoted(value) if head == "columns" else _literal(value)


def _unquoted(value: str) -> str:
    value = value.strip()
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


def _literal(value: str) -> Any:
    """A JSON value (number, true, false, null, list, object), or else the text itself."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return _unquoted(value)


def _typed(kind: str, value: Any, text: str, *, key: str) -> Any:
    if "str" in kind:
        return text
    if value is None and "None" in kind:
        return None
    wanted = bool if "bool" in kind else int
    if type(value) is not wanted:
        raise ConfigError(f"{key}={text}: must be {'true or false' if wanted is bool else 'a whole number'}")
    return value
