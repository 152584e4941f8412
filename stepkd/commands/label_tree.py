"""``stepkd label --to tree_preference``: its arguments, and the job."""

from __future__ import annotations

import argparse
from typing import Any

from stepkd.errors import ConfigError


def add_tree_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the tree search."""
    tree = parser.add_argument_group("tree_preference: Monte-Carlo tree search (after arXiv 2405.00451)")
    tree.add_argument("--iterations", type=int, default=64, metavar="N", help="walks per decision (default 64)")
    tree.add_argument("--root-factor", type=int, default=4, metavar="N", help="times as many at the root (default 4)")
    tree.add_argument("--actions", type=int, default=2, metavar="N", help="steps sampled at a node (default 2)")
    tree.add_argument("--root-actions", type=int, metavar="N", help="steps sampled at the root; default: --actions")
    tree.add_argument("--depth", type=int, default=3, metavar="N", help="look-ahead in steps (default 3)")
    tree.add_argument("--max-steps", type=int, default=32, metavar="N", help="longest solution in steps (default 32)")
    tree.add_argument("--max-step-tokens", type=int, default=128, metavar="N", help="longest step (default 128)")
    tree.add_argument(
        "--until", default="end", help="a walk ends where the solution does (end) or at a new node (leaf)"
    )
    tree.add_argument("--exploration", type=float, default=1.0, metavar="C", help="of PUCT (default 1)")
    tree.add_argument("--gamma", type=float, default=1.0, help="discount of what follows a step (default 1)")
    tree.add_argument("--outcome", type=float, default=1.0, metavar="X", help="for a right end, against a wrong one")
    tree.add_argument("--damp-after", type=int, metavar="DEPTH", help="smaller estimates deeper down (default: off)")
    tree.add_argument(
        "--value",
        default="rollout",
        help="of a state: rollout (--rollouts-per-step continuations; default), scorer (--judge MODEL) or "
        "self_evaluation (the policy, or --judge, asked with the reference shown)",
    )
    tree.add_argument(
        "--reduction", help="of scores: product, last (the newest step's), min or mean; default: by their meaning"
    )
    tree.add_argument("--choose", default="worst", help="the worse side: worst (default) or second best")
    tree.add_argument("--keep-unsolved", action="store_true", help="pairs of trees without a right solution, too")


def tree_preference(
    arguments: argparse.Namespace, common: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any] | None:
    """Run the job; see :data:`~stepkd.commands.label_pairs.PairJob`."""
    from stepkd.labels.pair_job import run_pair_job
    from stepkd.labels.tree_pairs import tree_pair_parts
    from stepkd.labels.tree_settings import TreePairSpec
    from stepkd.search import PairSettings, SearchSettings

    if arguments.problems is None or arguments.rollouts is not None:
        raise ConfigError("--to tree_preference searches solutions of problems: give --problems SPEC, not --rollouts")
    searching = (
        *("iterations", "root_factor", "actions", "root_actions", "depth", "max_steps", "until", "exploration"),
        *("gamma", "outcome", "damp_after"),
    )
    limit = {} if arguments.max_pairs is None else {"max_pairs": arguments.max_pairs}
    same = ("problems", "value", "judge", "judge_template", "reduction", "max_step_tokens")
    spec = TreePairSpec(
        **{name: getattr(arguments, name) for name in same},
        search=SearchSettings(**{name: getattr(arguments, name) for name in searching}),
        pairs=PairSettings(choose=arguments.choose, solved_only=not arguments.keep_unsolved, **limit),
        rollouts=arguments.rollouts_per_step,
        segmenter=arguments.segmenter or "newline",
        **common,
    )
    parts = tree_pair_parts(spec, rank=options["rank"], overwrite=options["overwrite"])
    return run_pair_job(parts, spec.out, **options)
