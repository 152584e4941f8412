"""Where a source's raw rows are: a file, a folder, a saved `datasets` folder, or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepkd.data.checks import did_you_mean
from stepkd.data.io import READABLE_ENDINGS, file_ending, read_rows
from stepkd.data.sources.registry import Row, Source, place
from stepkd.errors import ConfigError, DataError

Read = tuple[Row, str, int]
"""A raw row, the place it came from, and its line there."""


def split_of_file(path: Path, source: Source) -> str | None:
    """Return the split a file's name states (``test.jsonl``, ``train-00000-of-00002.parquet``), or None.

    Args:
        path: a data file.
        source: only its split names count.
    """
    stem = _stem(path).lower()
    head = stem.split("-0")[0]
    return next((split for split in source.splits if split in (stem, head)), None)


def _stem(path: Path) -> str:
    ending = file_ending(path)
    return path.name[: -len(ending)] if ending else path.name


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
        exact = [file for file in files if _stem(file).lower() in wanted]
        shards = [file for file in files if _stem(file).lower().split("-0")[0] in wanted]
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


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by ``datasets``' ``save_to_disk``."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def read_files(files: list[Path]) -> Iterator[Read]:
    """Stream the rows of one file or of several shards.

    Args:
        files: in order.

    Yields:
        ``(row, path, line)``.
    """
    for file in files:
        for row, line in read_rows(file):
            yield row, str(file), line


def read_saved(path: Path, source: Source, split: str) -> Iterator[Read]:
    """Stream a folder written by ``save_to_disk``.

    Args:
        path: the folder.
        source: for its split names.
        split: our split name; of no account when the folder holds a single dataset.

    Yields:
        ``(row, "path:split", row number)``.

    Raises:
        DataError: the split is not there, or the folder cannot be read.
    """
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
    yield from _numbered(loaded, place(path, split))


def read_hub(hub: str, configs: tuple[str, ...], split: str) -> Iterator[Read]:
    """Stream a hub dataset, downloading it unless it is cached.

    Args:
        hub: dataset id, ``owner/name``.
        configs: configurations to join; empty: the only one.
        split: the hub's own split name.

    Yields:
        ``(row, "hub id:split", row number)``.

    Raises:
        DataError: no network and no cache, or no such dataset, configuration or split.
    """
    import datasets

    for config in configs or (None,):
        name = place(hub if config is None else f"{hub}/{config}", split)
        try:
            loaded = datasets.load_dataset(hub, config, split=split)
        except Exception as error:  # network, cache, id, config and split errors come as many unrelated classes
            raise DataError(
                f"cannot load this from the hub: {_reason(error)}. No network? Give path=<file or folder> instead; "
                "otherwise check the dataset id, hub_config and split",
                path=name,
            ) from error
        yield from _numbered(loaded, name)


def _numbered(rows: Any, name: str) -> Iterator[Read]:
    number = 0
    for number, row in enumerate(rows, start=1):
        yield dict(row), name, number
    if number == 0:
        raise DataError("the dataset holds no rows; take another split", path=name)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def hub_split(source: Source, split: str, *, own_hub: bool) -> str:
    """Translate our split name to the hub's.

    Args:
        source: whose splits these are.
        split: our split name.
        own_hub: the dataset is the source's own; on another one the name is passed on as it is.

    Raises:
        ConfigError: the source has no such split.
    """
    if not own_hub:
        return split
    if split in source.splits:
        return source.splits[split]
    if split in source.splits.values():
        return split
    raise ConfigError(f"source {source.name!r} has no split {split!r}; {did_you_mean(split, source.splits)}")
