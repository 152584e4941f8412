"""``iteration.json``: which stages of an iteration are finished, from what inputs, and with what result."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.manifest import manifest_differences
from stepkd.runs.files import write_file

RECORD_NAME = "iteration.json"
FORMAT = 1
BLOCK = 1 << 12
"""Bytes read at once from a large file."""


class IterationRecord:
    """The stages of one iteration.

    Args:
        folder: the iteration's folder.
        k: its number.

    Raises:
        DataError: an unreadable record.
    """

    def __init__(self, folder: Path, k: int) -> None:
        self.path = folder / RECORD_NAME
        self.k = k
        self.stages: dict[str, dict[str, Any]] = {}
        try:
            found = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise DataError(f"not a readable record: {error}; --overwrite starts again", path=self.path) from error
        if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("iteration") != k:
            raise DataError(
                f"not a record of iteration {k} in format {FORMAT}; --overwrite starts again", path=self.path
            )
        self.stages = found["stages"]

    def run(
        self, name: str, inputs: Mapping[str, Any], work: Callable[[], Mapping[str, Any]], *, begin: Callable[[], None]
    ) -> dict[str, Any]:
        """Do a stage, unless it is done.

        Args:
            name: the stage.
            inputs: fingerprints of what it works from.
            work: does it; returns facts about the result, JSON values. An interrupted stage is done again from
                whatever ``work`` finds of its own.
            begin: called before the work.

        Returns:
            The facts.

        Raises:
            ConfigError: the stage was done from other inputs.
        """
        inputs = json.loads(json.dumps(inputs))
        if name in self.stages:
            if changed := manifest_differences(self.stages[name]["inputs"], inputs):
                lines = [f"  {key}: {then!r} then, {now!r} now" for key, (then, now) in changed.items()]
                raise ConfigError(
                    f"{self.path}: stage {name!r} is finished, and what it worked from has changed since:\n"
                    + "\n".join(lines)
                    + "\nPut the files back, or start again with another --out (or --overwrite)."
                )
            return dict(self.stages[name]["facts"])
        begin()
        start = time.perf_counter()
        facts = json.loads(json.dumps(work()))
        self.stages[name] = {"inputs": inputs, "facts": facts, "seconds": round(time.perf_counter() - start, 1)}
        text = json.dumps({"format": FORMAT, "iteration": self.k, "stages": self.stages}, indent=2) + "\n"
        write_file(self.path, text.encode())
        return dict(facts)


def file_fingerprint(path: Path) -> str:
    """Short hash of a file's content.

    Raises:
        DataError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror}), and a finished stage made it: put it back, or start again with "
            "--overwrite",
            path=path,
        ) from error
    return digest.hexdigest()[:16]


def folder_fingerprint(folder: Path) -> str:
    """Short hash of a model folder: names, sizes, and 64 blocks of each file, evenly spaced.

    Enough to recognise a changed model in milliseconds, not a proof.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(
            "the model that a finished stage left is gone: put it back, or start again with --overwrite", path=folder
        )
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for start in sorted({max(0, size - BLOCK) * i // 63 for i in range(64)}):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]
