"""Options of commands that load a step scorer: how it is asked, and what becomes of its scores."""

from __future__ import annotations

import argparse
from typing import Any

TEMPLATE_HELP = "gsm8k, math, plain, task, or a YAML file; default: the one the model was trained with, else the data's"
"""Help of ``--template``."""


def add_scorer_arguments(group: Any) -> None:
    """Arguments that :func:`scorer_options` reads; ``--template`` and the machine's are the command's own."""
    group.add_argument("--temperature-from", metavar="FILE", help="scale the scores with a fitted temperature")
    group.add_argument("--head", metavar="JSON", help="how a plain model scores steps, as in step_head.json")
    group.add_argument("--reference", action="store_true", help="show the gold solution to a judge")
    group.add_argument(
        "--answers", nargs=2, metavar=("YES", "NO"), help="tokens a judge answers with (default: Yes, No)"
    )
    group.add_argument("--separator", help="separator a TRL model was trained with (default: newline)")


def scorer_options(arguments: argparse.Namespace, **more: Any) -> Any:
    """The :class:`~stepkd.scorers.ScorerOptions` of a command line; ``more`` are further fields."""
    from stepkd.scorers.calibration import TemperatureScaling
    from stepkd.scorers.load import ScorerOptions, parse_head

    given = arguments.temperature_from
    return ScorerOptions(
        template=arguments.template,
        head=parse_head(arguments.head) if arguments.head else None,
        reference=arguments.reference,
        answers=tuple(arguments.answers) if arguments.answers else None,
        separator=arguments.separator,
        dtype=arguments.dtype,
        device=arguments.device,
        attention=arguments.attention,
        max_rows=arguments.batch_size,
        temperature=TemperatureScaling.load(given) if given else None,
        **more,
    )


def given_options(arguments: argparse.Namespace, parser: argparse.ArgumentParser, names: tuple[str, ...]) -> list[str]:
    """Which of these options differ from their defaults, as the user writes them."""
    defaults = {action.dest: (action.default, action.option_strings) for action in parser._actions}
    return [defaults[name][1][0] for name in names if getattr(arguments, name) != defaults[name][0]]
