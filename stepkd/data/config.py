"""Which rows to load: :class:`DataConfig`, in YAML, in Python, or as one word of a command line."""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepkd.data.io import file_ending, stem
from stepkd.data.sources import BENCHMARKS, SOURCES, get_source
from stepkd.data.sources.source import Benchmark, Source
from stepkd.errors import ConfigError, check_bounds, check_choice
from stepkd.settings import build_settings
from stepkd.yaml_files import nested

logger = logging.getLogger(__name__)

LABELS_NAME = "labels.jsonl"
"""What ``stepkd label`` writes its rows into."""
PAIRS_NAME = "pairs.jsonl"
"""What ``stepkd pairs`` writes its rows into."""


@dataclass(frozen=True)
class DataConfig:
    """Which rows to load. Plain types only, so that a recipe can hold it."""

    source: str = "rows"
    """Name of a data source (gsm8k, math500, task, ...), or `rows` for files and hub datasets in contract form."""
    path: str | None = None
    """File, folder, or folder written by `datasets`' save_to_disk; wins over the hub. None: the hub (or generated). A
    source that generates its rows becomes `rows`, without its options, where a path or a hub id is given."""
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
    """Settings of this source only; `stepkd/data/sources.yaml` lists them."""
    allow_evaluation_data: bool = False
    """Allow training on data that is kept for evaluation."""

    def __post_init__(self) -> None:
        source = get_source(self.source)
        source.settings(self.options)
        if source.generate is not None and (self.path is not None or self.hub is not None):
            if self.options:
                names = ", ".join(self.options)
                logger.warning(
                    "rows are read, not generated: options of source %s are not used (%s)", self.source, names
                )
            object.__setattr__(self, "source", "rows")
            object.__setattr__(self, "options", {})
            source = get_source("rows")
        if source.generate is not None and self.columns:
            raise ConfigError(f"source {self.source!r} generates its rows; drop columns")
        if not (self.path or self.hub or source.generate or source.hub or isinstance(self, RowsInMemory)):
            raise ConfigError(f"source {self.source!r} has no hub dataset of its own; give path=<file> or hub=<id>")
        check_bounds("", self, limit="[1, inf)", offset="[0, inf)")
        for name in self.columns if source.reads else ():
            check_choice(f"column (source {self.source})", name, source.reads)


@dataclass(frozen=True)
class RowsInMemory(DataConfig):
    """Rows that a script has at hand."""

    rows: Iterable[Mapping[str, Any]] = ()
    """In contract form or in TRL's: a list, a `datasets.Dataset`, anything that gives mappings."""


if TYPE_CHECKING:
    Rows = DataConfig | str | Path | Mapping[str, Any] | Iterable[Mapping[str, Any]]
else:  # what a recipe holds
    Rows = DataConfig


def as_data_config(data: Rows | None) -> DataConfig | None:
    """What a data module is given, as settings.

    Args:
        data: settings, or a dict of them; a path, or a word as :func:`parse_spec` reads it; or rows themselves.

    Raises:
        ConfigError: something else, such as a `DatasetDict` of several splits.
    """
    if data is None or isinstance(data, DataConfig):
        return data
    if isinstance(data, str | Path):
        return parse_spec(str(data))
    if isinstance(data, Mapping):
        if unknown := sorted(set(data) - {each.name for each in fields(DataConfig)}):
            raise ConfigError(f"{unknown[0]!r} is no setting of data; of a dictionary of splits give one")
        return DataConfig(**data)
    if not isinstance(data, Iterable):
        raise ConfigError(f"rows are a list of dicts, a datasets.Dataset or a path, not a {type(data).__name__}")
    return RowsInMemory(rows=data)


def split_of_file(path: Path, source: Source) -> str | None:
    """The split that a file's name states.

    Args:
        path: such as ``test.jsonl`` or ``train-00000-of-00002.parquet``.
        source: whose splits are known.

    Returns:
        The split's name in the source; None where the name states none.
    """
    name = stem(path).lower()
    return next((split for split in source.splits if split in (name, name.split("-0")[0])), None)


def resolve_split(config: DataConfig) -> str:
    """The split that a data setting means.

    Args:
        config: which rows to load.

    Returns:
        The one that the file's name states, else that asked for (a name of the hub becomes the source's own for it),
        else the source's default.
    """
    source = get_source(config.source)
    if config.path is not None and file_ending(config.path):
        stated = split_of_file(Path(config.path), source)
        if stated is not None:
            return stated
    asked = config.split
    if asked is not None and asked not in source.splits:
        asked = next((ours for ours, hubs in source.splits.items() if hubs == asked), asked)
    return asked or source.default_split


def check_training_use(config: DataConfig) -> None:
    """Refuse rows that are kept for evaluation.

    Args:
        config: what somebody is about to train on.

    Raises:
        ConfigError: the split is for evaluation only and `allow_evaluation_data` is not set.
    """
    source, split = get_source(config.source), resolve_split(config)
    if {"*", split} & set(source.evaluation_only) and not config.allow_evaluation_data:
        raise ConfigError(
            f"{source.name!r} (split {split!r}) is kept for evaluation: a model trained on it cannot be judged by it. "
            "Train on other data, or set allow_evaluation_data: true if that is what you want"
        )


# --- words of a command line ---------------------------------------------------------------------------------------

_PART = re.compile(r"""(?:="[^"]*"?|='[^']*'?|=\{[^}]*\}?|=\[[^\]]*\]?|[^,])+""")
"""What stands between commas; those in quotes or brackets behind an equals sign do not count."""
_TEXTS = {"path", "hub", "hub_config", "split"}
"""Settings whose values are text, whatever they look like; so are columns."""


def parse_spec(text: str) -> DataConfig:
    """Read a data setting from one command-line word.

    ``gsm8k:path=x/test.jsonl,limit=8`` names a source and its settings; a key that only the source knows is one of its
    options (``task:task=modular,n=64,noise.rate=0.15``); ``columns.prompt=problem`` maps a column; a value with commas
    stands in quotes; a bare file name (``x/rows.jsonl``) or folder means source ``rows``, and so does the folder of a
    job of ``stepkd label`` or ``stepkd pairs`` (its ``labels.jsonl`` or ``pairs.jsonl``).

    Args:
        text: the word.

    Returns:
        The settings.

    Raises:
        ConfigError: an unknown source or key (a near one is suggested), or a value of the wrong type.
    """
    text = text.strip()
    for written in (LABELS_NAME, PAIRS_NAME):
        if (rows := Path(text).expanduser() / written).is_file():
            return DataConfig(path=str(rows))
    if Path(text).expanduser().is_dir() and text not in SOURCES:
        return DataConfig(path=text)
    first = text.partition(",")[0]
    if file_ending(first) and "=" not in first:
        text = f"rows:path={text}"
    name, _, rest = text.partition(":")
    source, known = get_source(name), [each.name for each in fields(DataConfig) if each.name != "source"]
    settings: dict[str, Any] = {"source": name}
    for part in filter(str.strip, _PART.findall(rest)):
        key, equals, value = (each.strip() for each in part.partition("="))
        if not equals or not key:
            raise ConfigError(f"cannot read {part!r} in {text!r}; write key=value, separated by commas")
        head = key.partition(".")[0]
        check_choice(f"key in {text!r}", head, [*known, *source.options])
        place = f"options.{key}" if head in source.options else key
        bare = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
        try:
            settings[place] = bare if head in {*_TEXTS, "columns"} else json.loads(value)
        except json.JSONDecodeError:
            settings[place] = bare
    values = nested(settings)
    # As they were written: a parser of settings of any type would take a text such as "10" for a number.
    options = values.pop("options") if isinstance(values.get("options"), dict) else {}
    config = build_settings(DataConfig, values, repr(text))
    try:
        return replace(config, options=options)
    except ConfigError as error:
        raise ConfigError(f"{text!r}: {error}") from None


def benchmark_data(benchmark: Benchmark, data: str | None, limit: int | None) -> DataConfig:
    """Which rows to evaluate.

    Args:
        benchmark: the benchmark.
        data: None for its own hub data set; a file or folder; or settings as in :func:`parse_spec` without the source's
            name (``path=x.jsonl,split=test`` or ``task=modular,n=200``).
        limit: number of problems, or None for all.

    Raises:
        ConfigError: a bad word, or a file or hub data set for a benchmark that generates its problems.
    """
    if not data or Path(data).expanduser().exists() or "=" not in data:
        config = DataConfig(source=benchmark.name, path=data or None)
    else:
        config = parse_spec(f"{benchmark.name}:{data}")
    if config.source != benchmark.name:
        raise ConfigError(
            f"{benchmark.name!r} generates its problems; for a file of yours: --benchmark rows --data FILE"
        )
    single = config.path is not None and Path(config.path).expanduser().is_file()  # is evaluated whatever its name says
    split = config.split if single else config.split or benchmark.evaluated_split
    return replace(config, split=split, limit=config.limit if limit is None else limit)


def next_evaluation(config: DataConfig | None, template: str, *, steps: bool = False) -> str:
    """Options of ``stepkd evaluate``, or of ``stepkd evaluate-prm``, for a model that was trained on such data.

    Args:
        config: its held-out rows, else None.
        template: name of the prompt template it was trained with.
        steps: whether it scores steps; else it solves problems.
    """
    source, words = "rows", ""
    if config is not None:  # a file, or what else distinguishes the setting
        hub = {} if config.hub is None else {"hub": config.hub} | ({"split": config.split} if config.split else {})
        source, words = config.source, config.path or ",".join(_words({**hub, **config.options}))
    if steps:
        if config is None or (source != "task" and config.path is None):
            return "--sets gsm8k math"
        more = f"path={words}" if config.path else f"{words},split={config.split}" if config.split else words
        return f"--sets {shlex.quote(words if source == 'rows' else f'{source}:{more}')}"
    name = source if source in BENCHMARKS else "rows"
    if name == "rows" and not words:
        name = {"task": "task", "math": "math500"}.get(template, "rows")
    words = words or "PROBLEMS.jsonl" * (name == "rows")
    return f"--benchmark {name} --data {shlex.quote(words)}" if words else f"--benchmark {name}"


def _words(settings: Mapping[str, Any], start: str = "") -> list[str]:
    """Nested settings as the ``key=value`` of a word."""
    found: list[str] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found += _words(value, f"{start}{key}.")
        else:
            plain = isinstance(value, str) and "," not in value
            found.append(f"{start}{key}={value if plain else json.dumps(value)}")
    return found
