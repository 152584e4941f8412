"""What a run says about its claim: means, statements and verdicts; shown on the terminal, and the file of it that is
committed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from stepkd.claims.claim_file import Claim, SeedValues, overall
from stepkd.claims.runner import seed_values
from stepkd.errors import DataError
from stepkd.runs.files import write_file, write_json
from stepkd.runs.job import SUMMARY_NAME
from stepkd.statistics import RESAMPLES, Estimate, estimate_mean, shown

RESULTS_FORMAT = 1
RESULTS_FOLDER = "results"
LEVEL = 0.95
NOT_RUN = "not run in this form"
MOST_COLUMNS = 5
"""With more arms, every arm is a row."""
STYLES = {"reproduced": "bold green", "not reproduced": "bold red", "inconclusive": "bold yellow"}


def summarise_claim(claim: Claim, out: str | Path, packages: Mapping[str, str | None]) -> dict[str, Any]:
    """Verdicts of a finished run.

    Args:
        claim: the claim.
        out: folder of its run.
        packages: versions it ran under.

    Returns:
        JSON values, the same for the same rows: ``verdict``, ``statements``, ``metrics`` (per variant and arm), and
        what the run was (``settings``, ``arms``, ``seeds``, ``fingerprint``, ``packages``).
        Undefined numbers are None. No paths, dates or per-problem values.
    """
    values = {variant: seed_values(claim, out, variant) for variant in claim.variants}
    statements = []
    verdicts = []
    for variant in claim.variants:
        claim.check_statements(variant, values[variant])
        for statement in claim.statements_of(variant):
            estimate = statement.estimate(values[variant])
            verdict = statement.verdict(estimate.decides)
            verdicts.append(verdict)
            statements.append(
                statement.to_dict()
                | _numbers(estimate)
                | {
                    "variant": variant,
                    "text": str(statement),
                    "over_seeds": [_plain(estimate.seeds.low), _plain(estimate.seeds.high)],
                    "over_problems": [_plain(estimate.problems.low), _plain(estimate.problems.high)],
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
        "metrics": {variant: _metrics(claim, values[variant]) for variant in claim.variants},
        "settings": identity["variants"],
        "arms": identity["arms"],
        "seeds": claim.seeds,
        "fingerprint": claim.fingerprint(),
        "packages": dict(packages),
        "level": LEVEL,
        "resamples": RESAMPLES,
    }


def _metrics(claim: Claim, values: SeedValues) -> dict[str, Any]:
    """Arm -> metric -> numbers."""
    return {
        arm: {name: _numbers(estimate_mean(values[arm][name])) for name in claim.metrics if name in values[arm]}
        for arm in claim.arms
    }


def _numbers(estimate: Estimate) -> dict[str, Any]:
    return {
        "value": _plain(estimate.value),
        "low": _plain(estimate.decides.low),
        "high": _plain(estimate.decides.high),
        "per_seed": [_plain(value) for value in estimate.per_seed],
    }


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


def keep_summary(claim: Claim, out: str | Path, summary: Mapping[str, Any]) -> None:
    """Write a claim's verdicts into the folder of its run, for the report: ``summary.json``, by the claim's name."""
    write_json(Path(out) / SUMMARY_NAME, {claim.name: {**summary, "quick": claim.is_quick}})


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
    """One phrase for the list: the committed verdict, ``no results yet``, or :data:`NOT_RUN` where it belongs to an
    older claim file: the verdict on another sentence would be read as one on this.

    A results file may carry a key ``stale`` with the reason, written by hand by whoever changed the code below it.
    """
    results = read_results(claim)
    if results is None:
        return "no results yet"
    if results.get("stale") or results["fingerprint"] != claim.fingerprint():
        return NOT_RUN
    return str(results["verdict"])


def print_results(console: Console, name: str, summary: Mapping[str, Any], *, quick: bool = False) -> None:
    """Means of every arm, the statements with their verdicts, and the paper's numbers beside them.

    Args:
        console: where to print.
        name: name of the claim.
        summary: :func:`summarise_claim`.
        quick: say that this is the reduced version, which is no result.
    """
    seeds = len(summary["seeds"])
    console.print(f"\n[bold]{escape(name)}[/bold]: {escape(summary['claim'])}", soft_wrap=True, highlight=False)
    console.print(f"source: {escape(summary['source'])}", soft_wrap=True, highlight=False)
    for variant, arms in summary["metrics"].items():
        console.print(_means(variant, arms, seeds, alone=len(summary["metrics"]) == 1))
    console.print(_statements(summary))
    style = STYLES[summary["verdict"]]
    console.print(f"[bold]{escape(name)}[/bold]: [{style}]{summary['verdict']}[/{style}]", highlight=False)
    if seeds == 1:
        console.print("one seed has no interval: nothing can be concluded from it")
    if quick:
        console.print(
            "claims quick: a smaller experiment that shows that it runs; its verdict is not the claim's", soft_wrap=True
        )


def _means(variant: str, arms: Mapping[str, Any], seeds: int, *, alone: bool) -> Table:
    title = f"mean over {seeds} seed{'s' if seeds > 1 else ''}, 95% interval"
    metrics = list(dict.fromkeys(name for numbers in arms.values() for name in numbers))

    def cell(arm: str, metric: str) -> str:
        return number_text(arms[arm][metric]) if metric in arms[arm] else ""

    wide = len(arms) > MOST_COLUMNS
    rows, columns = (list(arms), metrics) if wide else (metrics, list(arms))
    numbers_of = (Column(column, justify="right", overflow="fold") for column in columns)
    table = Table("arm" if wide else "metric", *numbers_of, title_justify="left")
    table.title = title if alone else f"{variant}: {title}"
    for row in rows:
        table.add_row(row, *(cell(row, column) if wide else cell(column, row) for column in columns))
    return table


def _statements(summary: Mapping[str, Any]) -> Table:
    several = len(summary["metrics"]) > 1
    intervals = (Column(name, no_wrap=True) for name in ("measured, 95%", "t over seeds,\nbootstrap"))
    table = Table("statement", *intervals, "verdict", title="statements", title_justify="left")
    for statement in summary["statements"]:
        text = f"{statement['variant']}: {statement['text']}" if several else statement["text"]
        if statement["paper"]:
            text += f"\npaper: {statement['paper']}"
        style = STYLES[statement["verdict"]]
        table.add_row(
            escape(text),
            number_text(statement),
            "\n".join(
                "-" if None in statement[name] else "{:.3g} to {:.3g}".format(*statement[name])
                for name in ("over_seeds", "over_problems")
            ),
            f"[{style}]{statement['verdict']}[/{style}]",
        )
    return table


def number_text(numbers: Mapping[str, Any]) -> str:
    """``0.123`` with ``(0.100 to 0.150)`` below it; a dash where the value is undefined."""
    size = abs(numbers["value"] or 0.0)
    return shown(numbers, ",.0f" if size >= 1000 else ".2g" if 0 < size < 0.01 else ".3f", gap="\n")
