"""A claim's results on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

MOST_COLUMNS = 5
"""With more arms, every arm is a row."""
STYLES = {"reproduced": "bold green", "not reproduced": "bold red", "inconclusive": "bold yellow"}


def print_results(console: Console, name: str, summary: Mapping[str, Any], *, quick: bool = False) -> None:
    """Means of every arm, the statements with their verdicts, and the paper's numbers beside them.

    Args:
        console: where to print.
        name: name of the claim.
        summary: :func:`stepkd.claims.results.summarise_claim`.
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
            "--quick: a smaller experiment that shows that it runs; its verdict is not the claim's", soft_wrap=True
        )


def _means(variant: str, arms: Mapping[str, Any], seeds: int, *, alone: bool) -> Table:
    title = f"mean over {seeds} seed{'s' if seeds > 1 else ''}, 95% interval"
    table = Table(title=title if alone else f"{variant}: {title}", title_justify="left")
    metrics = list(dict.fromkeys(name for numbers in arms.values() for name in numbers))

    def cell(arm: str, metric: str) -> str:
        return number_text(arms[arm][metric]) if metric in arms[arm] else ""

    wide = len(arms) > MOST_COLUMNS
    rows, columns = (list(arms), metrics) if wide else (metrics, list(arms))
    table.add_column("arm" if wide else "metric")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        table.add_row(row, *(cell(row, column) if wide else cell(column, row) for column in columns))
    return table


def _statements(summary: Mapping[str, Any]) -> Table:
    table = Table(title="statements", title_justify="left")
    several = len(summary["metrics"]) > 1
    table.add_column("statement", overflow="fold")
    table.add_column("measured, 95%", no_wrap=True)
    table.add_column("t over seeds,\nbootstrap", no_wrap=True)
    table.add_column("verdict")
    for statement in summary["statements"]:
        text = f"{statement['variant']}: {statement['text']}" if several else statement["text"]
        if statement["paper"]:
            text += f"\npaper: {statement['paper']}"
        style = STYLES[statement["verdict"]]
        table.add_row(
            escape(text),
            number_text(statement),
            "\n".join(interval_text(*statement[name]) for name in ("over_seeds", "over_problems")),
            f"[{style}]{statement['verdict']}[/{style}]",
        )
    return table


def number_text(numbers: Mapping[str, Any]) -> str:
    """``0.123`` with ``(0.100 to 0.150)`` below it; a dash where the value is undefined."""
    if numbers["value"] is None:
        return "-"
    value, low, high = (numbers[name] for name in ("value", "low", "high"))
    constant = low == high  # a budget, the same for every seed; or no interval at all
    return _number(value) + ("" if constant else f"\n({interval_text(low, high)})")


def interval_text(low: float | None, high: float | None) -> str:
    """``0.100 to 0.150``; a dash when undefined."""
    return "-" if low is None or high is None else f"{_number(low)} to {_number(high)}"


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"
