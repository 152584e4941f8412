"""Rows of a data setting: read from a file, a folder, the hub, a generator or memory, mapped and validated."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from stepkd.data.config import DataConfig, RowsInMemory, resolve_split, split_of_file
from stepkd.data.io import READABLE_ENDINGS, file_ending, read_rows, reason, stem
from stepkd.data.rows import Contract, ExtraRule, Row, detect_contract, validate
from stepkd.data.sources import get_source
from stepkd.data.sources.source import Source
from stepkd.errors import DataError, check_choice, nearest
from stepkd.steps.labels import label_kind

logger = logging.getLogger(__name__)
Read = tuple[Row, str, int]
"""A raw row, the place it came from, and its line there."""


def load_rows(config: DataConfig, *, contract: Contract | None = None, ratings: bool = False) -> list[Row]:
    """Read, map and validate the rows of a data setting.

    Without shuffling, reading stops after the last row asked for. A row without an id gets ``source/split/index``,
    with the 0-based position in the file, so that ids do not depend on limit, offset or shuffling.

    A file under another source's name whose columns are those of ``rows`` is read as ``rows``. Whole-number step labels
    of ``rows`` among which there is no -1 mean incorrect (0) and correct (1) and become booleans.

    Args:
        config: what to load.
        contract: what the caller needs; None: what the source gives (for `rows`: told from the first row).
        ratings: whole-number step labels are ratings whose 0 is neutral, also where no -1 is among them.

    Returns:
        At least one row; every row has an ``id``.

    Raises:
        DataError: the file or a row is not as it should be, or no row is left after offset and filtering.
        ConfigError: the setting contradicts itself.
    """
    config = _as_contract_rows(config)
    last = None if config.limit is None else config.offset + config.limit
    rows = list(islice(_valid_rows(config, contract), None if config.shuffle_seed is not None else last))
    if config.shuffle_seed is not None:
        keys = [
            hashlib.blake2b(f"{config.shuffle_seed}/{i}".encode(), digest_size=8).digest() for i in range(len(rows))
        ]
        rows = [rows[i] for i in sorted(range(len(rows)), key=keys.__getitem__)]
    total, rows = len(rows), rows[config.offset : last]
    if not rows:
        raise DataError(
            f"no rows are left: {total} found, offset {config.offset}; lower the offset, or take other data"
            if config.offset
            else "no rows are left: 0 found; take another split or other data",
            path=_where(config),
        )
    if not ratings and config.source == "rows":
        _read_binary_labels(rows, config)
    return rows


def _as_contract_rows(config: DataConfig) -> DataConfig:
    """With source `rows` where a file under another source's name has not its columns but those of `rows`."""
    source, rows = get_source(config.source), get_source("rows")
    if config.path is None or not source.reads:
        return config
    values, path, line = next(_raw_rows(config, source, {}, resolve_split(config)), ({}, "", 0))
    try:
        source.select(values, config.columns, path=path, line=line)
    except DataError:
        with contextlib.suppress(DataError):
            row = rows.map_row(rows.select(values, config.columns, path=path, line=line), {})
            if "prompt" in row or "chosen" in row:
                columns = ", ".join(map(repr, values))
                logger.warning(
                    "%s has the columns %s, so it is read as source 'rows', not %r", path, columns, config.source
                )
                return replace(config, source="rows", options={})
    return config


def _where(config: DataConfig) -> str:
    return config.path or f"{config.hub or config.source}:{resolve_split(config)}"


def _valid_rows(config: DataConfig, contract: Contract | None) -> Iterator[Row]:
    source = get_source(config.source)
    options = source.settings(config.options)
    split = resolve_split(config)
    if source.name == "rows" and config.path is not None:
        place = stem(config.path) if file_ending(config.path) else f"{Path(config.path).name}/{split}"
    else:
        place = f"{(source.name == 'rows' and config.hub) or source.name}/{split}"
    # A source of our own keeps what it means to keep; only files in contract form can hold slips of the pen.
    extra: ExtraRule = options["extra_columns"] if source.name == "rows" else "keep"
    wanted = contract or source.contract
    left_out = 0
    for index, (values, path, line) in enumerate(_raw_rows(config, source, options, split)):
        mapped = source.map_row(source.select(values, config.columns, path=path, line=line), options)
        several = not isinstance(mapped, dict)
        left_out += not mapped
        for part, row in enumerate([mapped] if isinstance(mapped, dict) else mapped):
            if wanted is None:
                wanted = detect_contract(row, path=path, line=line)
            validate(row, wanted, path=path, line=line, extra=extra)
            if row.get("id") is None:
                row["id"] = f"{place}/{index}/{part}" if several else f"{place}/{index}"
            yield row
    if left_out:
        rule = f"the rules of source {source.name!r} (stepkd/data/sources.yaml)"
        logger.warning("%s: %d rows are left out by %s", _where(config), left_out, rule)


def _read_binary_labels(rows: list[Row], config: DataConfig) -> None:
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
    if cast is bool:
        logger.warning(
            "%s: the step labels are whole numbers without a -1, so 0 is read as incorrect and 1 as correct. If 0 is "
            "neutral, set data.init_args.labels.kind: rating (labels.neutral then says what it counts as)",
            _where(config),
        )


# --- raw rows ------------------------------------------------------------------------------------------------------


def _raw_rows(config: DataConfig, source: Source, options: dict[str, Any], split: str) -> Iterator[Read]:
    if source.generate is not None:
        yield from _numbered(source.generate(options, split), f"{source.name}:{split}")
    elif isinstance(config, RowsInMemory):
        yield from _numbered(config.rows, "rows in memory")
    elif config.path is None:
        yield from _read_hub(config, source, config.split or split)
    else:
        yield from _read_path(Path(config.path).expanduser(), source, split, config.hub_config)


def _numbered(rows: Any, place: str) -> Iterator[Read]:
    yield from ((dict(row), place, number) for number, row in enumerate(rows, start=1))


def _read_path(path: Path, source: Source, split: str, config: str | None) -> Iterator[Read]:
    """Rows of a file, of a split's files in a folder, or of a folder written by ``datasets``' ``save_to_disk``."""
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        for file in _data_files(path, source, split, config) if path.is_dir() else [path]:
            yield from ((row, str(file), line) for row, line in read_rows(file))
        return
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds here; all mean the same to the user
        raise DataError(f"cannot read the saved dataset: {reason(error)}; save it again", path=path) from error
    if isinstance(loaded, dict):  # a DatasetDict
        key = split if split in loaded else source.splits.get(split, split)
        if key not in loaded:
            raise DataError(f"the saved dataset has no split {split!r}.{nearest(split, loaded)}", path=path)
        loaded = loaded[key]
    yield from _numbered(loaded, f"{path}:{split}")


def _data_files(folder: Path, source: Source, split: str, config: str | None) -> list[Path]:
    """The file of a split in a folder, or its shards in order.

    Looked for, in this order: ``<split>.<ending>`` or shards ``<split>-00000-of-...`` in the folder, in its
    ``<config>`` folder or in ``data``; then a single data file in the folder, whatever its name.
    """

    def files_in(searched: Path) -> list[Path]:
        return sorted(each for each in searched.glob("[!.]*") if file_ending(each))

    wanted = {split, source.splits.get(split, split)}
    for searched in (folder, *(folder / name for name in (config, *source.hub_configs, "data") if name)):
        files = files_in(searched)
        shards = [file for file in files if stem(file).lower().split("-0")[0] in wanted]
        exact = [file for file in files if stem(file).lower() in wanted]
        if len(exact) > 1:
            names = ", ".join(file.name for file in exact)
            raise DataError(f"several files for one split: {names}; give the file's own path", path=searched)
        if exact or shards:
            return exact or shards
    here = files_in(folder)
    if len(here) == 1 and split_of_file(here[0], source) is None:
        return here
    names = ", ".join(file.name for file in here) or f"no {', '.join(READABLE_ENDINGS)} file"
    raise DataError(
        f"no file for split {split!r} of source {source.name!r}; the folder has {names}. "
        f"Name the file {split}.jsonl or give its own path",
        path=folder,
    )


def _read_hub(config: DataConfig, source: Source, split: str) -> Iterator[Read]:
    """Rows of a hub data set, which is downloaded unless it is cached."""
    import datasets

    dataset, parts = config.hub or source.hub or "", [config.hub_config]
    if dataset == source.hub:
        check_choice(f"split (source {source.name})", split, dict.fromkeys([*source.splits, *source.splits.values()]))
        split = source.splits.get(split, split)
        parts = parts if config.hub_config is not None else list(source.hub_configs) or parts
    for part in parts:
        place = f"{dataset}{'' if part is None else f'/{part}'}:{split}"
        try:
            loaded = datasets.load_dataset(dataset, part, split=split)
        except Exception as error:  # network, cache, id, config and split errors come as many unrelated classes
            raise DataError(
                f"cannot load this from the hub: {reason(error)}. No network? Give path=<file or folder> instead; "
                "otherwise check the dataset id, hub_config and split",
                path=place,
            ) from error
        yield from _numbered(loaded, place)
