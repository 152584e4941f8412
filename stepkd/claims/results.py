"""What a run says about its claim: means, statements and verdicts; and the small file of it that is committed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepkd.claims.claim_file import Claim
from stepkd.claims.runner import seed_values
from stepkd.claims.statements import SeedValues, overall
from stepkd.errors import DataError
from stepkd.runs.files import write_file
from stepkd.statistics import RESAMPLES, Estimate, estimate_mean

RESULTS_FORMAT = 1
RESULTS_FOLDER = "results"
LEVEL = 0.95


def summarise_claim(claim: Claim, out: str | Path, packages: Mapping[str, str | None]) -> dict[str, Any]:
    """Verdicts of a finished run.

    Args:
        claim: the claim.
        out: folder of its run.
        packages: versions it ran under.

    Returns:
        JSON values, the same for the same rows: ``verdict``, ``statements``, ``metrics`` and ``facts`` (per variant and
        arm), and what the run was (``experiment``, ``settings``, ``arms``, ``seeds``, ``fingerprint``, ``packages``).
        Undefined numbers are None. No paths, dates or per-problem values.
    """
    values = {variant: seed_values(claim, out, variant) for variant in claim.variants}
    statements = []
    verdicts = []
    for variant in claim.variants:
        for statement in claim.statements_of(variant):
            for arm in statement.arms:
                if statement.metric not in values[variant][arm]:
                    raise DataError(f"{str(statement)!r}: the arm {arm!r} returned no {statement.metric!r}", path=out)
            estimate = statement.estimate(values[variant])
            verdict = statement.verdict(estimate.decides)
            verdicts.append(verdict)
            statements.append(
                statement.to_dict()
                | _numbers(estimate)
                | {
                    "variant": variant,
                    "text": str(statement),
                    "over_seeds": _bounds(estimate.seeds.low, estimate.seeds.high),
                    "over_problems": _bounds(estimate.problems.low, estimate.problems.high),
                    "method": estimate.decides.method,
                    "paper": statement.paper,
                    "verdict": verdict,
                }
            )
    identity = claim.identity()
    return {
        "format": RESULTS_FORMAT,
        "claim": claim.claim,
        "source": claim.source,
        "verdict": overall(verdicts),
        "statements": statements,
        "metrics": {variant: _metrics(claim, variant, values[variant]) for variant in claim.variants},
        "experiment": claim.experiment_name,
        "settings": identity["variants"],
        "arms": identity["arms"],
        "seeds": list(claim.seeds),
        "fingerprint": claim.fingerprint(),
        "packages": dict(packages),
        "level": LEVEL,
        "resamples": RESAMPLES,
    }


def _metrics(claim: Claim, variant: str, values: SeedValues) -> dict[str, Any]:
    """Arm -> metric or fact -> numbers, facts last."""
    names = [*claim.experiment.metric_names(claim.variants[variant]), *claim.experiment.facts]
    return {
        arm: {name: _numbers(estimate_mean(values[arm][name])) for name in names if name in values[arm]}
        for arm in claim.arms
    }


def _numbers(estimate: Estimate) -> dict[str, Any]:
    return {
        "value": _plain(estimate.value),
        "low": _plain(estimate.decides.low),
        "high": _plain(estimate.decides.high),
        "per_seed": [_plain(value) for value in estimate.per_seed],
    }


def _bounds(low: float, high: float) -> list[float | None]:
    return [_plain(low), _plain(high)]


def _plain(number: float) -> float | None:
    """Six decimals: the last digits of a mean differ between machines."""
    return None if math.isnan(number) else round(number, 6)


def results_path(claim: Claim) -> Path:
    """Where the committed results of a claim are: ``results/<name>.json`` beside its file."""
    return claim.path.parent / RESULTS_FOLDER / f"{claim.name}.json"


def save_results(claim: Claim, summary: Mapping[str, Any]) -> Path:
    """Write the committed file: sorted keys, the same bytes for the same rows."""
    path = results_path(claim)
    text = json.dumps(summary, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_file(path, text.encode() + b"\n")
    return path


def read_results(claim: Claim) -> dict[str, Any] | None:
    """The committed results of a claim; None when there are none.

    Raises:
        DataError: the file is damaged or of another format.
    """
    path = results_path(claim)
    try:
        results = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"not a readable results file: {error}; write it again with --save", path=path) from error
    if not isinstance(results, dict) or results.get("format") != RESULTS_FORMAT:
        raise DataError(f"not claim results of format {RESULTS_FORMAT}; write it again with --save", path=path)
    return results


def committed_verdict(claim: Claim) -> str:
    """One phrase for the list: the committed verdict, ``no results yet``, or that it belongs to an older claim file.

    A results file may carry a key ``stale`` with the reason, written by hand by whoever changed the code below it.
    """
    results = read_results(claim)
    if results is None:
        return "no results yet"
    if results.get("stale") or results["fingerprint"] != claim.fingerprint():
        return f"stale ({results['verdict']} before the last change)"
    return str(results["verdict"])
