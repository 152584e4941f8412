"""Runs a claim: one row per variant, seed and arm, durable after every seed, resumable at any moment.

The folder holds ``claim.json`` (what decides a seed's values), ``results.jsonl`` (the rows) and ``units/`` (each seed's
models and evaluations, where an interrupted seed goes on). Statements and further seeds may be added later: rows that
are there already are used again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepkd.claims.claim_file import Claim
from stepkd.claims.experiment import ArmResult, Report, Unit, check_results, value_array
from stepkd.claims.statements import SeedValues
from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.manifest import RESULTS_NAME, manifest_differences, package_versions
from stepkd.evaluation.store import ResultStore, read_rows
from stepkd.runs import RunDir
from stepkd.runs.files import write_json
from stepkd.runs.progress import duration

MANIFEST_NAME = "claim.json"
UNITS_NAME = "units"
MANIFEST_FORMAT = 1


def run_claim(claim: Claim, out: str | Path, *, report: Report, overwrite: bool = False) -> dict[str, Any]:
    """Run what is missing of a claim.

    Args:
        claim: the claim.
        out: its folder; begun, or gone on with.
        report: called with one line about progress.
        overwrite: delete an earlier run in the folder first.

    Returns:
        The manifest of the run: ``packages`` (versions) and what :meth:`Claim.identity` says. The rows are read with
        :func:`seed_values`.

    Raises:
        ConfigError: the folder holds other settings, or something else.
        DataError: the experiment returned something other than it declares.
    """
    out = Path(out)
    units = [(variant, seed) for variant in claim.variants for seed in claim.seeds]
    manifest = {"format": MANIFEST_FORMAT, "packages": package_versions(), **claim.identity()}
    earlier = None if overwrite else _read_manifest(out)
    if earlier is not None:
        missing = _missing(units, _rows(out))
        # A finished run may be looked at under other package versions.
        _check_same(earlier, manifest if missing else manifest | {"packages": earlier["packages"]}, out)
        if not missing:
            return earlier
    run_dir = RunDir.open(out, resume=not overwrite, overwrite=overwrite, kind="claims")
    with run_dir.recorded():
        if earlier is None:
            if (out / RESULTS_NAME).exists():
                raise DataError(
                    f"results without {MANIFEST_NAME}: nothing says of what; --overwrite deletes them", path=out
                )
            write_json(out / MANIFEST_NAME, manifest)
        with ResultStore(out / RESULTS_NAME) as store:
            _run_units(claim, _missing(units, store.rows()), store, out / UNITS_NAME, report)
    return manifest


def seed_values(claim: Claim, out: str | Path, variant: str) -> SeedValues:
    """Metrics and facts of every arm of a variant: one (P, K, 2) array per seed, in the claim's order of seeds.

    Raises:
        DataError: a seed has not been run.
    """
    rows = {(row["variant"], row["seed"], row["arm"]): row for row in _rows(Path(out))}
    values: dict[str, dict[str, list[Any]]] = {arm: {} for arm in claim.arms}
    for arm, metrics in values.items():
        for number, seed in enumerate(claim.seeds):
            row = rows.get((variant, seed, arm))
            if row is None:
                raise DataError(f"variant {variant!r}, seed {seed}, arm {arm!r} has not been run", path=out)
            for name, numbers in {**row["metrics"], **row["facts"]}.items():
                metrics.setdefault(name, []).append(value_array(numbers))
            if short := [name for name, arrays in metrics.items() if len(arrays) != number + 1]:
                raise DataError(
                    f"variant {variant!r}, arm {arm!r}: {short[0]!r} is not there for every seed up to {seed}", path=out
                )
    return values


def _run_units(
    claim: Claim, units: Sequence[tuple[str, int]], store: ResultStore, folder: Path, report: Report
) -> None:
    variants = list(claim.variants)
    for number, (variant, seed) in enumerate(units, start=1):
        label = f"seed {seed}" if len(variants) == 1 else f"{variant}, seed {seed}"
        where = folder / variant / f"seed-{seed}"
        where.mkdir(parents=True, exist_ok=True)
        unit = Unit(claim.variants[variant], claim.arms, seed, where, variant)
        start = time.perf_counter()

        def tell(line: str, head: str = f"{claim.name} {number}/{len(units)}, {label}") -> None:
            report(f"{head}: {line}")

        results = list(claim.experiment.run(unit, tell))
        check_results(claim.experiment, unit, results)
        _check_claim(claim, unit, results)
        batch = seed * len(variants) + variants.index(variant)
        store.append_batch(batch, _unit_rows(unit, results, batch * len(claim.arms)))
        seconds = time.perf_counter() - start
        left = f", about {duration(seconds * (len(units) - number))} left" if number < len(units) else ""
        tell(f"done in {duration(seconds)}{left}")


def _unit_rows(unit: Unit, results: Sequence[ArmResult], first: int) -> list[dict[str, Any]]:
    by_arm = {result.arm: result for result in results}
    return [
        {
            "id": f"{unit.variant}/{unit.seed}/{arm}",
            "index": first + position,
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


def _rows(out: Path) -> list[dict[str, Any]]:
    path = out / RESULTS_NAME
    return read_rows(path) if path.is_file() else []


def _missing(units: Sequence[tuple[str, int]], rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    done = {(row["variant"], row["seed"]) for row in rows}
    return [unit for unit in units if unit not in done]


def _read_manifest(out: Path) -> dict[str, Any] | None:
    path = out / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"not a readable claim manifest: {error}; --overwrite starts again", path=path) from error
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise DataError(f"not a claim manifest of format {MANIFEST_FORMAT}; --overwrite starts again", path=path)
    return manifest


def _check_same(earlier: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    if differences := manifest_differences(earlier, now):
        lines = [f"  {key}: {then!r} then, {today!r} now" for key, (then, today) in differences.items()]
        raise ConfigError(
            f"{out} was begun under other settings, so it cannot be gone on with:\n"
            + "\n".join(lines)
            + "\nGive the old settings again, another --out, or --overwrite to start again."
        )
