"""The part of ``stepkd label`` that makes preference data: its arguments, and the jobs behind ``--to`` that sample."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from stepkd.commands.label_tree import add_tree_arguments, tree_preference
from stepkd.errors import ConfigError

PairJob = Callable[[argparse.Namespace, dict[str, Any], dict[str, Any]], dict[str, Any] | None]
"""Arguments, settings common to all jobs, and what the job runner takes, to the summary."""


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of converters and builders."""
    to = parser.add_argument_group("other kinds of rows")
    to.add_argument("--convert", metavar="FILE", help="labelled rows to convert (a file, or the folder of a job)")
    to.add_argument(
        "--to",
        metavar="KIND",
        help="of --convert: stepwise, trl, math_shepherd, balanced, binary, unpaired or preference; of --rollouts: "
        "step_preference; of --problems: tree_preference",
    )
    to.add_argument(
        "--max-pairs", type=int, metavar="N", help="per problem, or per solution (default 1; tree_preference: 8)"
    )
    to.add_argument(
        "--chosen-steps", default="any", help="preference: chosen solutions may have wrong steps (any) or not (clean)"
    )
    to.add_argument("--from", dest="take", default="wrong", help="step_preference: solutions wrong (default) or all")
    to.add_argument(
        "--continuations", type=int, default=20, metavar="N", help="step_preference: per right prefix (default 20)"
    )
    to.add_argument(
        "--check-step",
        action="store_true",
        help="step_preference: the better step must be right, by --judge MODEL or else the tiny world's checker",
    )
    add_tree_arguments(parser)


def _step_preference(
    arguments: argparse.Namespace, common: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any] | None:
    from stepkd.labels.pair_job import run_pair_job
    from stepkd.labels.pair_settings import StepPairSpec
    from stepkd.labels.step_pair_setup import step_pair_parts

    if arguments.rollouts is None:
        raise ConfigError("--to step_preference needs labelled rollouts: --rollouts FOLDER (an --out of stepkd label)")
    if arguments.problems is not None:
        raise ConfigError("--to step_preference starts from labelled rollouts: label --problems first, then drop it")
    same = ("rollouts", "take", "continuations", "neutral", "check_step", "judge", "reference")
    limit = {} if arguments.max_pairs is None else {"max_pairs": arguments.max_pairs}
    spec = StepPairSpec(
        **{name: getattr(arguments, name) for name in (*same, "threshold", "segmenter")},
        **limit,
        **common,
    )
    parts = step_pair_parts(spec, rank=options["rank"], overwrite=options["overwrite"])
    return run_pair_job(parts, spec.out, **options)


PAIR_JOBS: dict[str, PairJob] = {"step_preference": _step_preference, "tree_preference": tree_preference}
"""Kinds of ``--to`` that sample, and what runs them."""


_COMMON = ("items", "items_with_pairs", "pairs", "problems", "dropped", "by_position", "facts")
"""Entries of every summary; a job may have more."""


def _shown(name: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1%}" if name.endswith("share") else f"{value:.2f}"


def print_pair_summary(console: Any, summary: Mapping[str, Any]) -> None:
    """Counts, what was left out and why, and where in the solutions the pairs are."""
    from rich.table import Table

    dropped = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in summary["dropped"].items())
    more = {name: value for name, value in summary.items() if name not in _COMMON and value is not None}
    lines = (
        f"{summary['pairs']} pairs of {summary['problems']} problems, from {summary['items_with_pairs']} of "
        f"{summary['items']} items" + (f" (dropped: {dropped})" if dropped else ""),
        ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in summary["facts"].items() if value),
        ", ".join(f"{name.replace('_', ' ')} {_shown(name, value)}" for name, value in more.items()),
    )
    for line in filter(None, lines):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    table = Table()
    for column in ("step", "pairs", "share"):
        table.add_column(column, justify="right")
    for part in summary["by_position"][:12]:
        table.add_row(str(part["position"] + 1), str(part["pairs"]), f"{part['share']:.1%}")
    console.print(table)
