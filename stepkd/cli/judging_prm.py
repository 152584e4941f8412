"""The part of ``stepkd evaluate`` that judges step scorers: ProcessBench, labelled sets, best-of-N."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from stepkd.cli.options import (
    add_scorer_arguments,
    say_share_is_done,
    scorer_from,
    start_job,
)
from stepkd.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments for step scorers."""
    group = parser.add_argument_group("judging a step scorer (--benchmark processbench or step_labels)")
    group.add_argument("--subsets", nargs="+", metavar="NAME", help="ProcessBench subsets (default: gsm8k math)")
    group.add_argument("--threshold", type=float, default=0.5, help="a lower step score means wrong (default 0.5)")
    group.add_argument("--tune-on", metavar="SET", help="subset or data settings on which a second threshold is tuned")
    add_scorer_arguments(group)
    group.add_argument("--no-figures", action="store_true", help="write no reliability and argmin figures")
    best = parser.add_argument_group("best-of-N")
    best.add_argument(
        "--best-of-n", nargs="+", metavar="NAME=FILE", help="curves of rollouts scored by stepkd score, one file each"
    )


def run_process(arguments: argparse.Namespace) -> int:
    """``stepkd evaluate --benchmark processbench``."""
    from stepkd.evaluation.process_runner import SOLUTIONS, ProcessConfig, evaluate_process
    from stepkd.yaml_files import settings_from

    console, launch, job = start_job(arguments, {SOLUTIONS: "scoring"})
    spec = settings_from(ProcessConfig, vars(arguments) | {"batch_size": arguments.max_rows})
    scorer = scorer_from(arguments)
    summary = evaluate_process(
        spec, lambda: scorer.build(device=arguments.device, max_rows=spec.batch_size), options=job
    )
    if not summary:
        return say_share_is_done(console, launch, "results")
    print_process(console, summary)
    if not arguments.no_figures:
        for path in write_figures(summary, Path(spec.out)):
            console.print(f"figure: {path}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nper-solution scores, settings and summary: {spec.out}", markup=False, soft_wrap=True)
    return 0


def write_figures(summary: dict[str, Any], out: Path) -> list[Path]:
    """Reliability and argmin figures of every set."""
    from stepkd.evaluation.figures import argmin_histogram, reliability_diagram
    from stepkd.evaluation.process_runner import figure_names

    paths = []
    for name, section in summary["sets"].items():
        reliability, argmin = figure_names(name)
        paths.append(reliability_diagram(section["calibration"], out / reliability))
        if section["argmin"] is not None:
            paths.append(argmin_histogram(section["argmin"], out / argmin))
    return paths


def print_process(console: Any, summary: dict[str, Any]) -> None:
    """One table of F1 with baselines per set, one of step metrics."""
    from rich.table import Table

    console.print(f"{summary['model']} on {summary['benchmark']}", highlight=False, markup=False)
    table = Table(title="first wrong step, 95% intervals", title_justify="left")
    for column in ("set", "rule", "F1", "with an error", "all correct"):
        table.add_column(column, justify="left" if column in ("set", "rule") else "right", overflow="fold")
    for name, section in summary["sets"].items():
        label = f"{name}\n{section['solutions']} solutions"
        if section["unscored_solutions"]:
            label += f"\n({section['unscored_solutions']} more left out:\ntoo long for the context)"
        if section["unknown_first_error"]:
            label += f"\n({section['unknown_first_error']} not in F1: labels\nmissing before an error)"
        rules = [(f"below {section['fixed']['threshold']:.2f}", section["fixed"])]
        if "tuned" in section:
            where = "here: optimistic" if section["tuned"]["optimistic"] else f"on {summary['tuned_on']}"
            rules.append((f"below {section['tuned']['threshold']:.2f},\ntuned {where}", section["tuned"]))
        for i, (rule, found) in enumerate(rules):
            shown = (_percent(found[key], "\n") for key in _FIRST_ERROR)
            table.add_row(label if i == 0 else "", rule, *shown)
        for rule, found in section["baselines"].items():
            if found is None:
                continue
            shown = (_percent(found[key], None) for key in _FIRST_ERROR)
            table.add_row("", f"{rule} (baseline)", *shown, style="dim")
        table.add_section()
    console.print(table)
    steps = Table(title="steps up to and including the first error", title_justify="left")
    names = list(summary["sets"])
    steps.add_column("metric")
    for name in names:
        steps.add_column(name, justify="right", overflow="fold")
    for title, group, key, show in _STEP_ROWS:
        groups = (summary["sets"][name][group] for name in names)
        steps.add_row(title, *("-" if found is None else show(found[key]) for found in groups))
    argmin = [summary["sets"][name]["argmin"] for name in names]
    chance = ["-" if found is None else f"{100 * found['expected_last']:.1f}" for found in argmin]
    steps.add_row("  expected by chance", *chance)
    swaps = [summary["sets"][name]["order_swap"] for name in names]
    if any(swaps):
        shown_swaps = ("-" if swap is None else _percent(swap["dependent_drop_rate"]) for swap in swaps)
        steps.add_row("score falls when dependent\nsteps are swapped (%)", *shown_swaps)
    console.print(steps)
    for what, why in summary["undefined"].items():
        console.print(f"no {what.replace('_', ' ')}: {why}", markup=False, highlight=False)


def run_best_of_n(arguments: argparse.Namespace) -> int:
    """``stepkd evaluate --best-of-n NAME=FILE ...``."""
    from rich.console import Console
    from rich.table import Table

    from stepkd.evaluation.best_of_n import best_of_n_from_files
    from stepkd.evaluation.figures import best_of_n_figure
    from stepkd.runs.files import write_json

    files: dict[str, str] = {}
    for word in arguments.best_of_n:
        name, equals, path = word.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--best-of-n {word}: write NAME=FILE, for instance prm=runs/prm-scores.jsonl")
        files[name] = path
    settings = {"extractors": tuple(arguments.extractors)} if arguments.extractors else {}
    result = best_of_n_from_files(files, ks=arguments.ks, seed=arguments.seed, **settings)
    console = Console()
    table = Table(title=f"best-of-N on {result.problems} problems, 95% intervals", title_justify="left")
    table.add_column("method")
    for k in result.ks:
        table.add_column(f"N={k}", justify="right")
    for name, curve in result.curves.items():
        table.add_row(name, *(_percent(interval.to_dict(), "\n") for interval in curve))
    console.print(table)
    for each in result.differences:
        if each.k == result.ks[-1]:
            shown = each.difference.to_dict()
            console.print(f"N={each.k}: {each.b} - {each.a} = {_percent(shown)}", markup=False, highlight=False)
    for each in result.growth:
        first = next(k for k in result.ks if k > 1)
        grown = f"from N={first} to {each.k}, {each.b} - {each.a} grows by {_percent(each.difference.to_dict())}"
        console.print(grown, markup=False, highlight=False)
    for name, count in result.unscored.items():
        if count:
            console.print(f"{count} samples have no score by {name}: they rank last", markup=False)
    if arguments.out:
        out = Path(arguments.out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "best_of_n.json", result.to_dict())
        console.print(f"figure: {best_of_n_figure(result.to_dict(), out / 'best_of_n.svg')}", markup=False)
    return 0


def compare_scorers(arguments: argparse.Namespace, summaries: tuple[dict[str, Any], dict[str, Any]]) -> int:
    """``stepkd evaluate --compare A B`` of two step scorers."""
    from stepkd.evaluation.process import compare_process

    a, b = arguments.compare
    differences = compare_process(a, b, summaries, seed=arguments.seed)
    print(f"F1 of {b} minus F1 of {a}, paired by solution, 95% intervals:")
    for name, interval in differences.items():
        print(f"  {name:<24} {_percent(interval.to_dict())}")
    return 0


def _percent(figure: dict[str, Any] | float | None, gap: str | None = " ") -> str:
    """A share, with its interval behind the gap where both are there."""
    return _shown(figure, 100.0, 1, gap)


def _number(figure: dict[str, Any] | None) -> str:
    return _shown(figure, 1.0, 3, " ")


def _shown(figure: dict[str, Any] | float | None, scale: float, digits: int, gap: str | None) -> str:
    interval = figure if isinstance(figure, dict) else {"value": figure, "low": None, "high": None}
    if interval["value"] is None:
        return "-"
    value = f"{scale * interval['value']:.{digits}f}"
    if gap is None or interval["low"] is None or interval["high"] is None:
        return value
    return f"{value}{gap}({scale * interval['low']:.{digits}f} to {scale * interval['high']:.{digits}f})"


_FIRST_ERROR = ("f1", "acc_error", "acc_correct")
"""Keys of a rule's figures, in the order of the table."""
_STEP_ROWS: tuple[tuple[str, str, str, Any], ...] = (
    ("steps", "steps", "steps", str),
    ("right (%)", "steps", "positive_share", _percent),
    ("AUROC", "steps", "auroc", _number),
    ("accuracy (%)", "steps", "accuracy", _percent),
    ("balanced accuracy (%)", "steps", "balanced_accuracy", _percent),
    ("ECE", "calibration", "ece", _number),
    ("Brier", "calibration", "brier", _number),
    ("Brier skill", "calibration", "skill_base_rate", _number),
    ("lowest score is last (%)", "argmin", "share_last", _percent),
)
"""Title, group and key in a set's summary, how it is shown."""
