"""What paths hold: the folders that stepkd's commands left there, with their settings, numbers and solutions."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stepkd.data.config import LABELS_NAME
from stepkd.data.io import SAMPLES_FILE, read_rows, read_samples
from stepkd.errors import ConfigError, DataError, StepkdError
from stepkd.report.solutions import Solution, rollout_rows, sampled_rows, solution, visible
from stepkd.runs.job import LOG, PARTS, RESULTS_NAME, SETTINGS_NAME, SUMMARY_NAME, flat, read_results, read_settings
from stepkd.runs.rundir import newest_config, read_marker, recipe_settings
from stepkd.yaml_files import read_yaml

TRAINING, EVALUATION, SCORES, JUDGEMENT = "fit", "evaluation", "scoring job", "judgement of a step scorer"
LABELS, CLAIM, ITERATED, QUICKSTART = "labelling job", "claim", "iterated training", "quick start"
BEST_OF_N, BEST_OF_N_NAME = "best of N", "best_of_n.json"
LOGS = ("metrics.jsonl", SAMPLES_FILE)
"""What a training logs."""
CLOSED = (PARTS, LOG, "checkpoints", "model", "units")
"""Folders that are not looked into: parts of others."""


@dataclass(frozen=True)
class Folder:
    """One folder that a command left."""

    path: Path
    """Where it is."""
    name: str
    """How the page calls it: its path below the one that was given."""
    kind: str
    """What left it."""
    settings: Mapping[str, Any]
    """What decided its result, by dotted name; settings without a value are left out."""
    state: str
    """``finished``, ``running``, ..."""
    began: str
    """When its work began, as ISO 8601 text."""

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Its numbers; empty while it is not finished."""
        path = self.path / (BEST_OF_N_NAME if self.kind == BEST_OF_N else SUMMARY_NAME)
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}

    @cached_property
    def rows(self) -> list[Mapping[str, Any]]:
        """Its rows: of an evaluation problems, of other jobs solutions, of a training entries of its rollouts."""
        if self.kind in (EVALUATION, JUDGEMENT, SCORES):
            results = (RESULTS_NAME,) if self.kind == SCORES else (RESULTS_NAME, PARTS)
            return [*read_results(self.path)] if any((self.path / name).exists() for name in results) else []
        if self.kind == LABELS:
            path = self.path / LABELS_NAME
            return [row for row, _ in read_rows(path)] if path.is_file() else []
        return [*read_samples(self.path)] if self.kind == TRAINING and (self.path / SAMPLES_FILE).is_file() else []

    @cached_property
    def solutions(self) -> list[Solution]:
        """Its solutions; of a training its rollouts, as far as they were kept."""
        rows = {EVALUATION: sampled_rows, TRAINING: rollout_rows}.get(self.kind, iter)(self.rows)
        return [found for row in rows if (found := solution(self.name, row)) is not None]


def find_folders(paths: Sequence[str | Path]) -> list[Folder]:
    """Everything that commands left in these folders and below, in the order in which it was begun.

    Args:
        paths: folders, or files directly in them.

    Raises:
        ConfigError: no such path, or nothing of stepkd's in it.
        DataError: a damaged file.
    """
    found: dict[Path, Folder] = {}
    for given in map(Path, paths):
        root = (given if given.is_dir() else given.parent).resolve()
        below = {path: _folder(path, root, several=len(paths) > 1) for path in _walk(root) if given.exists()}
        here = {path: folder for path, folder in below.items() if folder is not None}
        if not here:
            problem = "holds nothing that a command left" if given.exists() else "does not exist"
            raise ConfigError(f"{given} {problem}: give the --out of fit, evaluate, label, score, quickstart, ...")
        found |= {path: folder for path, folder in here.items() if path not in found}
    return sorted(found.values(), key=lambda folder: folder.began)


def _walk(folder: Path) -> Iterator[Path]:
    yield folder
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        is_open = path.name not in CLOSED and not path.name.startswith(".")
        if is_open and path.is_dir() and not path.is_symlink():  # a link may lead round in a circle
            yield from _walk(path)


def _folder(path: Path, root: Path, *, several: bool) -> Folder | None:
    """A folder that a command left; None for any other."""
    settings: dict[str, Any] = {}
    state, began = "finished", _began(path)
    if (marker := read_marker(path)) is not None:
        kind, state, began = (str(marker.get(key, "")) for key in ("kind", "status", "created"))
        if (config := newest_config(path)) is not None:
            settings = recipe_settings(read_yaml(config, "run's settings"))
    elif (path / SETTINGS_NAME).is_file():
        try:
            settings = read_settings(path)
        except DataError:  # of another program
            return None
        kind, settings = settings.pop("kind"), flat(settings)
        state = "finished" if any((path / each).is_file() for each in (SUMMARY_NAME, RESULTS_NAME)) else "unfinished"
    elif (path / BEST_OF_N_NAME).is_file():
        kind = BEST_OF_N
    elif any((path / name).is_file() for name in LOGS):  # of a Trainer of one's own
        kind = TRAINING
    else:
        return None
    name = path.relative_to(root.parent if several or path == root else root).as_posix()
    known = {key: at for key, at in settings.items() if at not in (None, "", [], {})}
    return Folder(path, visible(name), kind, known, state, began)


def _began(path: Path) -> str:
    """When a job began, by its log; empty without one."""
    log = path / LOG / "rank-0.jsonl"
    with contextlib.suppress(OSError, ValueError, KeyError), open(log, encoding="utf-8") as lines:
        return str(json.loads(lines.readline())["time"])
    return ""


def best_of_n(folders: Sequence[Folder]) -> list[tuple[str, dict[str, Any]]]:
    """Names and results of the best-of-N curves that were stored; without any, those that scored rows give."""
    from stepkd.evaluation.best_of_n import best_of_n_from_files

    runs = [folder.summary.get("stages", {}) for folder in folders if folder.kind == QUICKSTART]
    stages = [each for stages in runs for each in stages.items()]
    found = [(name, dict(stage["best_of_n"])) for name, stage in stages if "best_of_n" in stage]
    found += [(folder.name, folder.summary) for folder in folders if folder.kind == BEST_OF_N]
    for folder in folders if not found else ():
        if folder.kind == SCORES:
            with contextlib.suppress(StepkdError):  # no grades, or duplicates were dropped
                found.append((folder.name, best_of_n_from_files({"score": folder.path}).to_dict()))
    return [(name, result) for name, result in found if len(result["ks"]) > 1]
