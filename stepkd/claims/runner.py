"""Runs a claim: a job whose units are the seeds of its variants, resumable at any moment.

The folder holds ``settings.json`` (what decides a seed's values), ``parts/`` (the rows of every seed: one per arm),
``units/`` (a folder per seed, with one folder per job: models, labels, evaluations) and, when no seed is missing,
``results.jsonl`` (all rows). Statements and further seeds may be added later: rows that are there are used again.

A job's folder is named by the job and a fingerprint of its settings, so that arms which need the same student or the
same labels share them; beside it ``<job>.json`` holds its numbers when it is done. Claims of one ``run`` have their
jobs' folders in common (:func:`units_folder`), and share what they have in common in the same way.

Several processes may run the same claims: each takes the seeds at which no other process of this machine works.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from stepkd.claims.claim_file import Arm, Claim, SeedValues
from stepkd.claims.jobs import Measured, run_job
from stepkd.errors import ConfigError, DataError
from stepkd.runs.files import delete, write_json, write_jsonl
from stepkd.runs.job import PARTS, RESULTS_NAME, SUMMARY_NAME, Job, JobOptions, finished_rows, package_versions
from stepkd.runs.process import check_unused, this_process
from stepkd.runs.progress import duration
from stepkd.statistics import FloatArray
from stepkd.yaml_files import find_recipe, read_yaml

Report: TypeAlias = Callable[[str], None]
"""Takes one line about what is being done now."""
UNITS_NAME, RUNNING_NAME = "units", "running.json"


def run_claim(claim: Claim, out: str | Path, *, report: Report, overwrite: bool = False) -> dict[str, Any] | None:
    """Run what is missing of a claim.

    Args:
        claim: the claim.
        out: its folder; begun, or resumed.
        report: called with one line about progress.
        overwrite: delete an earlier run in the folder first; jobs of a ``run``, shared with other claims, stay.

    Returns:
        The settings of the run: ``packages`` (versions), ``recipes`` and what :meth:`Claim.identity` says. The rows are
        read with :func:`seed_values`. None: other processes have not finished their seeds.

    Raises:
        ConfigError: the folder holds other settings, or something else.
        StepkdError: what a job refuses.
        DataError: a job's numbers do not fit the claim.
    """
    job = _job(Path(out), overwrite=overwrite)
    if overwrite and claim.run:
        units = units_folder(claim, job.out)
        report(f"{claim.name}: jobs of {units} may be those of other claims, and stay: delete it to do them again")
    elif overwrite:
        job.check()
        _delete_jobs(job.out / UNITS_NAME)
    missing = [(v, s) for v in claim.variants for s in claim.seeds if overwrite or job.missing(v, [_key(s)])]
    settings = {"packages": package_versions(), "recipes": _recipes(claim), **claim.identity()}
    found = job.begin(settings, free=() if missing else ("packages", "recipes"))  # a finished run may be looked at
    if not missing and (job.out / RESULTS_NAME).is_file():
        return found
    (job.out / RESULTS_NAME).unlink(missing_ok=True)  # of fewer seeds
    _run_units(claim, job, missing, report)
    if left := [str(s) for v, s in missing if job.missing(v, [_key(s)])]:
        report(f"{claim.name}: another process works at seed {', '.join(left)}: when it is done, repeat the command")
        return None
    rows = [row for folder in sorted((job.out / PARTS).iterdir()) for row in finished_rows(job.out, folder.name)]
    write_jsonl(job.out / RESULTS_NAME, sorted(rows, key=lambda row: (row["seed"], row["index"])))
    return found


def _recipes(claim: Claim) -> dict[str, Any]:
    """Names and settings of the recipes that the jobs of all arms train with."""
    return {name: each for _, settings in claim.wanted() for name, each in _trained_with(settings).items()}


def _trained_with(settings: Any) -> dict[str, Any]:
    """Names and settings of the recipes that a job's settings name, at any depth."""
    if not isinstance(settings, Mapping):
        return {}
    found = {name: read_yaml(find_recipe(name), "recipe") for name in settings.get("recipes", ())}
    return found | {name: each for below in settings.values() for name, each in _trained_with(below).items()}


def _run_units(claim: Claim, job: Job, missing: Sequence[tuple[str, int]], report: Report) -> None:
    for number, (variant, seed) in enumerate(missing, start=1):
        label = f"seed {seed}" if len(claim.variants) == 1 else f"{variant}, seed {seed}"
        head = f"{claim.name} {number}/{len(missing)}, {label}"
        start = time.perf_counter()
        folder = units_folder(claim, job.out) / variant / _key(seed)

        def rows_of(folder: Path, head: str = head, variant: str = variant, seed: int = seed) -> list[dict[str, Any]]:
            return _unit_rows(claim, variant, seed, folder, lambda line: report(f"{head}: {line}"))

        with _taken(folder) as is_free:
            if is_free:
                job.work(variant, {_key(seed): folder}, rows_of)
        if is_free:
            seconds = time.perf_counter() - start
            left = f", about {duration(seconds * (len(missing) - number))} left" if number < len(missing) else ""
            report(f"{head}: done in {duration(seconds)}{left}")


@contextlib.contextmanager
def _taken(folder: Path) -> Iterator[bool]:
    """Keep other processes of this machine out of a seed's folder while a block works; False: one works there."""
    mark, own = folder / RUNNING_NAME, folder / f".{os.getpid()}.tmp"
    write_json(own, this_process())
    try:
        _check_free(mark)
        mark.unlink(missing_ok=True)  # of a process that is gone
        os.link(own, mark)  # fails where another process has just done so
    except (ConfigError, FileExistsError):
        yield False
        return
    finally:
        own.unlink()
    try:
        yield True
    finally:
        mark.unlink(missing_ok=True)


def _check_free(mark: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        check_unused(mark.parent, json.loads(mark.read_bytes()))


def _delete_jobs(folder: Path) -> None:
    """Delete a folder of jobs (:func:`units_folder`).

    Raises:
        ConfigError: a process of this machine works at one of them.
    """
    for mark in folder.glob(f"*/*/{RUNNING_NAME}"):
        _check_free(mark)
    delete(folder)


def units_folder(claim: Claim, out: str | Path) -> Path:
    """The folder of a claim's jobs: in the claim's own, or in that of its ``run`` beside it."""
    return (Path(out).parent / claim.run if claim.run else Path(out)) / UNITS_NAME


def _job(out: Path, *, overwrite: bool = False) -> Job:
    return Job(out, "claim", (RESULTS_NAME, SUMMARY_NAME, UNITS_NAME), JobOptions(overwrite=overwrite))


def _key(seed: int) -> str:
    return f"seed-{seed}"


def _unit_rows(claim: Claim, variant: str, seed: int, folder: Path, report: Report) -> list[dict[str, Any]]:
    """All arms of one seed; one row each."""
    where = f"variant {variant!r}, seed {seed}"
    measured: dict[str, Measured] = {}

    def do(name: str, kind: str, settings: Mapping[str, Any]) -> str:
        plain = json.dumps([kind, settings, list(_trained_with(settings).values())], sort_keys=True).replace(
            str(folder), ""
        )
        out = folder / f"{name}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"
        done = folder / f"{out.name}.json"
        if str(out) not in measured:
            if not done.is_file():
                report(f"{name} ({kind})")
                found = run_job(kind, settings, out)
                write_json(done, {"columns": found.columns, "problems": list(found.problems)})
            measured[str(out)] = Measured(**json.loads(done.read_bytes()))
        return str(out)

    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for index, arm in enumerate(claim.arms):
        asked = Arm(claim, variant, arm, seed, do)
        metrics = _measure(asked, measured, problems, f"{where}, arm {arm!r}")
        row = {"id": f"{variant}/{seed}/{arm}", "index": index, "variant": variant, "seed": seed, "arm": arm}
        rows.append(row | {"problems": problems, "metrics": metrics})
    _check_rows(claim, variant, {row["arm"]: row["metrics"] for row in rows}, where)
    return rows


def _measure(arm: Arm, measured: Mapping[str, Measured], problems: list[str], where: str) -> dict[str, Any]:
    """The metrics of an arm; ``problems`` are those that all arms' metrics are about, set by the first."""
    metrics: dict[str, Any] = {}
    for name in arm.metrics:
        if (source := arm.source(name)) is None:
            continue
        folder, column = source
        if folder not in measured:
            raise DataError(f"{where}: the metric {name!r} comes from {folder!r}, which is no job")
        values = measured[folder].columns.get(column)
        if values is None:
            continue
        try:
            array = value_array(values)
        except (ValueError, TypeError) as error:
            raise DataError(f"{where}: the metric {name!r} {error}") from error
        if isinstance(values, list):
            of = [str(problem) for problem in measured[folder].problems]
            if len(array) != len(of):
                raise DataError(f"{where}: the metric {name!r} has {len(array)} entries for {len(of)} problems")
            problems[:] = problems or of
            if problems != of:
                raise DataError(f"{where}: the metric {name!r} is about other problems than those before it")
        metrics[name] = values
    return metrics


def _check_rows(claim: Claim, variant: str, values: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """What the claim names was measured, and the budgets that it wants equal are."""
    for name, text in claim.metrics.items():
        if not any(name in metrics for metrics in values.values()):
            raise DataError(f"{where}: no arm has the metric {name!r}: is there such a column ({text})?")
    claim.check_statements(variant, values)
    for name, arms in claim.equal.items():
        spent = {arm: values[arm].get(name, math.nan) for arm in arms or claim.arms}
        if len(set(spent.values())) > 1:
            shown = ", ".join(f"{arm} {number:g}" for arm, number in spent.items())
            raise DataError(f"{where}: the claim wants equal {name}, and the arms have {shown}")


def value_array(values: float | Sequence[Any]) -> FloatArray:
    """Values of a metric in one seed as (problems, ratios, 2): mean over ratios of sum[..., 0] / sum[..., 1].

    Args:
        values: one number for the whole seed; or one entry per problem, which is a number (the metric is their mean), a
            pair ``[part, whole]`` (the sum of parts over the sum of wholes), or a list of such pairs (the mean of those
            ratios, for example a balanced accuracy).

    Raises:
        ValueError: none of these, or not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0:
        array = array.reshape(1)
    if array.ndim == 1:
        array = np.stack([array, np.ones_like(array)], axis=-1)
    if array.ndim == 2:
        array = array[:, None, :]
    if array.ndim != 3 or array.shape[-1] != 2 or not array.size:
        raise ValueError(f"has shape {np.shape(values)}: give numbers, [part, whole] pairs, or lists of such pairs")
    if not np.isfinite(array).all() or (array[..., 1] < 0).any():
        raise ValueError("holds a value that is not a finite number, or a pair whose whole is negative")
    return array


def seed_values(claim: Claim, out: str | Path, variant: str) -> SeedValues:
    """Metrics of every arm of a variant that has been run: one (P, K, 2) array per seed, in the claim's order of seeds.

    Raises:
        DataError: an arm has a metric in some of the seeds only.
    """
    job, values = _job(Path(out)), {}
    of_seeds = [{row["arm"]: row["metrics"] for row in job.rows(variant, [_key(seed)]) or ()} for seed in claim.seeds]
    for arm in claim.arms:
        found = [metrics[arm] for metrics in of_seeds]
        for name in (names := dict.fromkeys(name for metrics in found for name in metrics)):
            if lacking := [seed for seed, metrics in zip(claim.seeds, found, strict=True) if name not in metrics]:
                raise DataError(f"variant {variant!r}, arm {arm!r}: seed {lacking[0]} has no {name!r}", path=out)
        values[arm] = {name: [value_array(metrics[name]) for metrics in found] for name in names}
    return values
