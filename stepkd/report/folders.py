"""What paths hold: the folders that stepkd's commands left there, with their settings, numbers and solutions."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stepkd.data.config import LABELS_NAME
from stepkd.data.io import SAMPLES_FILE, read_rows, read_samples
from stepkd.errors import ConfigError, DataError, StepkdError
from stepkd.report.solutions import Solution, rollout_rows, sampled_rows, searched_rows, solution, visible
from stepkd.runs.job import LOG, PARTS, RESULTS_NAME, SETTINGS_NAME, SUMMARY_NAME, flat, read_results, read_settings
from stepkd.runs.rundir import newest_config, read_marker, recipe_settings
from stepkd.safe import SECRET_NAME
from stepkd.yaml_files import read_yaml

TRAINING, EVALUATION, SCORES, JUDGEMENT = "fit", "evaluation", "scoring job", "judgement of a step scorer"
SEARCH = "search"
LABELS, CLAIM, ITERATED, QUICKSTART = "labelling job", "claim", "iterated training", "quick start"
BEST_OF_N, BEST_OF_N_NAME, CACHE = "best of N", "best_of_n.json", "teacher's cache"
LOGS = {"metrics.jsonl": "run", SAMPLES_FILE: "samples"}
"""What a training logs -> what each of its lines has, beside the step."""
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
    """``finished``, ``running``, ...; empty where its folder does not say."""
    began: str
    """When its work began, as ISO 8601 text."""

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Its numbers; empty while it is not finished."""
        return _summary(self.path / (BEST_OF_N_NAME if self.kind == BEST_OF_N else SUMMARY_NAME))

    @cached_property
    def rows(self) -> list[Mapping[str, Any]]:
        """Its rows: of an evaluation problems, of a search problems by method, of other jobs solutions, of a training
        entries of its rollouts."""
        if self.kind in (EVALUATION, SEARCH, JUDGEMENT, SCORES):
            results = (RESULTS_NAME,) if self.kind == SCORES else (RESULTS_NAME, PARTS)
            return [*read_results(self.path)] if any((self.path / name).exists() for name in results) else []
        if self.kind == LABELS:
            path = self.path / LABELS_NAME
            return [row for row, _ in read_rows(path)] if path.is_file() else []
        return [*read_samples(self.path)] if self.kind == TRAINING and _is_log(self.path / SAMPLES_FILE) else []

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """What a training logged, a row per step."""
        from stepkd.runs.logger import read_metrics

        return read_metrics(self.path) if _is_log(self.path / "metrics.jsonl") else []

    @cached_property
    def solutions(self) -> list[Solution]:
        """Its solutions; of a training its rollouts, as far as they were kept, of a search every method's answers."""
        reading = {EVALUATION: sampled_rows, SEARCH: searched_rows, TRAINING: rollout_rows}.get(self.kind, iter)
        each = (
            (f"{self.name}, {row['method']}" if self.kind == SEARCH else self.name, row) for row in reading(self.rows)
        )
        return [found for name, row in each if (found := solution(name, row)) is not None]


def find_folders(paths: Sequence[str | Path]) -> list[Folder]:
    """Everything that commands left in these folders and below, in the order in which it was begun.

    Args:
        paths: folders, or files directly in them.

    Raises:
        ConfigError: no such path, or nothing of stepkd's in it.
        DataError: a damaged file.
    """
    found: dict[Path, Folder] = {}
    roots = {given: (given if given.is_dir() else given.parent).resolve() for given in map(Path, paths)}
    above = {root: root.parent for root in roots.values()}
    if len({root.name for root in above}) < len(above):  # of one last name: longer ones tell them apart
        above = dict.fromkeys(above, Path(os.path.commonpath(above.values())))
    for given, root in roots.items():
        own = root if len(paths) == 1 else above[root]
        below = {path: _folder(path, root.parent if path == own else own) for path in _walk(root) if given.exists()}
        here = {path: folder for path, folder in below.items() if folder is not None}
        if not here:
            problem = "holds nothing that a command left" if given.exists() else "does not exist"
            raise ConfigError(f"{given} {problem}: give the --out of fit, evaluate, label, score, quickstart, ...")
        found |= {path: folder for path, folder in here.items() if path not in found}
    return sorted(found.values(), key=lambda folder: folder.began)


def _walk(root: Path) -> Iterator[Path]:
    for folder, names, _ in os.walk(root):  # no link is followed: it may lead round in a circle
        names[:] = sorted(name for name in names if name not in CLOSED and not name.startswith("."))
        yield Path(folder)


def _is_log(path: Path) -> bool:
    """Whether this is what a training logged, and its first line is whole: other programs have files of these names."""
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as lines:
        line = lines.readline()
        record = json.loads(line)
        return line.endswith(b"\n") and isinstance(record, dict) and {"step", LOGS[path.name]} <= record.keys()
    return False


_STAGES = Path(__file__).parents[1] / "quickstart.yaml"
"""Names all stages of the quick start, which imports this package."""


def _state(path: Path, kind: str) -> str:
    """How far a job is; a quick start and an iterated training write their numbers after every part of them."""
    if kind == CACHE:  # it has no summary
        return ""
    if not any((path / each).is_file() for each in (SUMMARY_NAME, RESULTS_NAME)):
        return "unfinished"
    done, total, parts = 0, 0, "stages"
    if kind in (QUICKSTART, ITERATED) and (config := newest_config(path)) is not None:
        told, summary = read_yaml(config, "job's settings"), _summary(path / SUMMARY_NAME)
        if kind == QUICKSTART:
            known = (name for name in read_yaml(_STAGES, "quick start")["seconds"] if name != "report")
            stages = told.get("stages") or list(known)
            done, total = sum(name in summary["stages"] for name in stages), len(stages)
        else:
            done, total, parts = len(summary["models"]), 1 + told["iterations"], "models"
    return f"{done} of {total} {parts}" if done < total else "finished"


def _summary(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise DataError("damaged: run its command again", path=path) from error


def _folder(path: Path, above: Path) -> Folder | None:
    """A folder that a command left, named by its path from one above it; None for any other."""
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
        state = _state(path, kind)
    elif (path / BEST_OF_N_NAME).is_file():
        kind = BEST_OF_N
    elif any(_is_log(path / name) for name in LOGS):  # of a Trainer of one's own
        kind = TRAINING
    else:
        return None
    known = {key: at for key, at in settings.items() if at not in (None, "", [], {})}
    known = {key: "(hidden)" if SECRET_NAME.search(key) else at for key, at in known.items()}
    return Folder(path, visible(path.relative_to(above).as_posix()), kind, known, state, began)


def _began(path: Path) -> str:
    """When a job began, by its log; empty without one."""
    log = path / LOG / "rank-0.jsonl"
    with contextlib.suppress(OSError, ValueError, KeyError), open(log, encoding="utf-8") as lines:
        return str(json.loads(lines.readline())["time"])
    return ""


def best_of_n(folders: Sequence[Folder]) -> list[tuple[str, dict[str, Any]]]:
    """Names and results of best-of-N curves: stored ones, and those that scoring jobs outside quick starts give, unless
    there is one of ``stepkd best-of-n``, which may hold them."""
    from stepkd.evaluation.best_of_n import best_of_n_from_files

    runs = [folder for folder in folders if folder.kind == QUICKSTART]
    found = [
        (name if len(runs) == 1 else f"{run.name}, {name}", dict(stage["best_of_n"]))
        for run in runs
        for name, stage in run.summary.get("stages", {}).items()
        if "best_of_n" in stage
    ]
    found += [(folder.name, folder.summary) for folder in folders if folder.kind == BEST_OF_N]
    is_stored = any(folder.kind == BEST_OF_N for folder in folders)
    for folder in folders if not is_stored else ():
        if folder.kind == SCORES and not any(run.path in folder.path.parents for run in runs):
            with contextlib.suppress(StepkdError):  # no grades, or duplicates were dropped
                found.append((folder.name, best_of_n_from_files({"score": folder.path}).to_dict()))
    return [(name, result) for name, result in found if len(result["ks"]) > 1]
