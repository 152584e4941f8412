"""Runs a claim: a job whose units are the seeds of its variants, resumable at any moment.

The folder holds ``settings.json`` (what decides a seed's values), ``parts/`` (the rows of every seed: one per arm),
``units/`` (each seed's models and evaluations, where an interrupted seed is resumed) and, when no seed is missing,
``results.jsonl`` (all rows). Statements and further seeds may be added later: rows that are there are used again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepkd.claims.claim_file import Claim
from stepkd.claims.experiment import ArmResult, Report, Unit, check_results, value_array
from stepkd.claims.statements import SeedValues
from stepkd.errors import DataError
from stepkd.runs.files import write_jsonl
from stepkd.runs.job import PARTS, RESULTS_NAME, Job, JobOptions, finished_rows, package_versions
from stepkd.runs.progress import duration

UNITS_NAME = "units"


def run_claim(claim: Claim, out: str | Path, *, report: Report, overwrite: bool = False) -> dict[str, Any]:
    """Run what is missing of a claim.

    Args:
        claim: the claim.
        out: its folder; begun, or resumed.
        report: called with one line about progress.
        overwrite: delete an earlier run in the folder first.

    Returns:
        The settings of the run: ``packages`` (versions) and what :meth:`Claim.identity` says. The rows are read with
        :func:`seed_values`.

    Raises:
        ConfigError: the folder holds other settings, or something else.
        DataError: the experiment returned something other than it declares.
    """
    job = _job(Path(out), overwrite=overwrite)
    missing = [(v, s) for v in claim.variants for s in claim.seeds if overwrite or job.missing(v, [_key(s)])]
    settings = {"packages": package_versions(), **claim.identity()}
    found = job.begin(settings, free=() if missing else ("packages",))  # a finished run may be looked at later
    if not missing and (job.out / RESULTS_NAME).is_file():
        return found
    with job.alone():
        _run_units(claim, job, missing, report)
    rows = [row for folder in sorted((job.out / PARTS).iterdir()) for row in finished_rows(job.out, folder.name)]
    write_jsonl(job.out / RESULTS_NAME, sorted(rows, key=lambda row: (row["seed"], row["index"])))
    return found


def _run_units(claim: Claim, job: Job, missing: Sequence[tuple[str, int]], report: Report) -> None:
    for number, (variant, seed) in enumerate(missing, start=1):
        label = f"seed {seed}" if len(claim.variants) == 1 else f"{variant}, seed {seed}"
        head = f"{claim.name} {number}/{len(missing)}, {label}"
        start = time.perf_counter()

        def rows_of(unit: Unit, head: str = head) -> list[dict[str, Any]]:
            return _unit_rows(claim, unit, lambda line: report(f"{head}: {line}"))

        job.work(
            variant,
            {_key(seed): Unit(claim.variants[variant], claim.arms, seed, _folder(job, variant, seed), variant)},
            rows_of,
        )
        seconds = time.perf_counter() - start
        left = f", about {duration(seconds * (len(missing) - number))} left" if number < len(missing) else ""
        report(f"{head}: done in {duration(seconds)}{left}")


def _job(out: Path, *, overwrite: bool = False) -> Job:
    return Job(out, "claim", (RESULTS_NAME, UNITS_NAME), JobOptions(overwrite=overwrite))


def _key(seed: int) -> str:
    return f"seed-{seed}"


def _folder(job: Job, variant: str, seed: int) -> Path:
    return job.out / UNITS_NAME / variant / _key(seed)


def seed_values(claim: Claim, out: str | Path, variant: str) -> SeedValues:
    """Metrics and facts of every arm of a variant: one (P, K, 2) array per seed, in the claim's order of seeds.

    Raises:
        DataError: a seed has not been run.
    """
    job = _job(Path(out))
    values: dict[str, dict[str, list[Any]]] = {arm: {} for arm in claim.arms}
    for number, seed in enumerate(claim.seeds):
        rows = {row["arm"]: row for row in job.rows(variant, [_key(seed)]) or ()}
        for arm, metrics in values.items():
            if arm not in rows:
                raise DataError(f"variant {variant!r}, seed {seed}, arm {arm!r} has not been run", path=out)
            for name, numbers in {**rows[arm]["metrics"], **rows[arm]["facts"]}.items():
                metrics.setdefault(name, []).append(value_array(numbers))
            if short := [name for name, arrays in metrics.items() if len(arrays) != number + 1]:
                raise DataError(
                    f"variant {variant!r}, arm {arm!r}: {short[0]!r} is not there for every seed up to {seed}", path=out
                )
    return values


def _unit_rows(claim: Claim, unit: Unit, report: Report) -> list[dict[str, Any]]:
    """Run a unit; its rows, one per arm."""
    unit.folder.mkdir(parents=True, exist_ok=True)
    results = list(claim.experiment.run(unit, report))
    check_results(claim.experiment, unit, results)
    _check_claim(claim, unit, results)
    by_arm = {result.arm: result for result in results}
    return [
        {
            "id": f"{unit.variant}/{unit.seed}/{arm}",
            "index": position,
            "variant": unit.variant,
            "seed": unit.seed,
            "arm": arm,
            "problems": [str(problem) for problem in by_arm[arm].problems],
            "metrics": {
                name: np.asarray(values, dtype=np.float64).tolist() for name, values in by_arm[arm].metrics.items()
            },
            "facts": {name: float(number) for name, number in by_arm[arm].facts.items()},
        }
        for position, arm in enumerate(unit.arms)
    ]


def _check_claim(claim: Claim, unit: Unit, results: Sequence[ArmResult]) -> None:
    """What the statements need was returned, and the budgets that the claim promises to be equal are."""
    facts = {result.arm: result.facts for result in results}
    names = {result.arm: {*result.metrics, *result.facts} for result in results}
    for statement in claim.statements_of(unit.variant):
        for arm in statement.arms:
            if statement.metric not in names[arm]:
                raise DataError(f"statement {str(statement)!r}: the arm {arm!r} returned no {statement.metric!r}")
    for fact, arms in claim.equal.items():
        spent = {arm: facts[arm].get(fact, math.nan) for arm in arms}
        if len(set(spent.values())) > 1:
            shown = ", ".join(f"{arm} {number:g}" for arm, number in spent.items())
            raise DataError(
                f"variant {unit.variant!r}, seed {unit.seed}: the claim wants equal {fact}, and the arms have {shown}"
            )
