"""Iterated training: generate, label, train, evaluate, K times, with one table of M0 to MK.

  stepkd iterate --config recipes/tiny/iterate_step_kto.yaml --out runs/iterated
  stepkd iterate --config recipes/iterate_step_kto.yaml --problems gsm8k:split=train,limit=500 --iterations 2
  stepkd iterate --config my.yaml --set label.samples=8 --set train.overrides.trainer.max_steps=100

The same command resumes a killed run; nothing that is finished is sampled, labelled or trained again.
--iterations may be raised later. Under --out: iteration-K/ with labels, training, model and evaluation, summary.json.
"""

from __future__ import annotations

import argparse
from typing import Any

from stepkd.errors import ConfigError

KEYS = ("model", "problems", "iterations", "evaluation.problems", "reference", "launcher", "seed")
"""Keys of the file that have an option."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``stepkd iterate``."""
    parser.add_argument("--config", required=True, metavar="FILE", help="settings, for instance a copy of a recipe")
    parser.add_argument("--out", metavar="FOLDER", help="folder of the run; default: runs/<name of the file>")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run in --out and start again")
    keys = parser.add_argument_group("settings of the file that are often changed")
    keys.add_argument("--model", help="M0")
    keys.add_argument("--problems", metavar="SPEC", help="training problems (file or data settings)")
    keys.add_argument(
        "--evaluation", dest="evaluation.problems", metavar="SPEC", help="held-out problems (file or data settings)"
    )
    keys.add_argument("--iterations", type=int, metavar="K")
    keys.add_argument("--reference", choices=("reset", "kept"), help="reference model: M_{k-1} or M0")
    keys.add_argument("--launcher", metavar="COMMAND", help="for instance 'accelerate launch --multi_gpu ...'")
    keys.add_argument("--seed", type=int)
    keys.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key; may be repeated")


def run(arguments: argparse.Namespace) -> int:
    """Run ``stepkd iterate``."""
    from pathlib import Path

    from rich.console import Console

    from stepkd.iteration.loop import run_iterations
    from stepkd.iteration.spec import load_spec
    from stepkd.iteration.table import print_summary
    from stepkd.runs.launcher import check_launch
    from stepkd.runs.process import quiet_libraries
    from stepkd.yaml_files import find_recipe

    if check_launch().world_size > 1:
        raise ConfigError("stepkd iterate starts its launcher itself: run it plainly, and give --launcher")
    quiet_libraries()
    config = find_recipe(arguments.config)
    spec = load_spec(config, overrides(arguments))
    out = Path(arguments.out or f"runs/{config.stem}")
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log file has room for the table
    summary = run_iterations(
        spec,
        out,
        report=lambda line: console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True),
        overwrite=arguments.overwrite,
    )
    print_summary(console, summary)
    console.print(f"models, labels and evaluations: {out}", markup=False, highlight=False, soft_wrap=True)
    return 0


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Dotted key -> value, of the options that were given."""
    import yaml

    found = {key: value for key in KEYS if (value := getattr(arguments, key)) is not None}
    for text in arguments.set:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {text!r}: write KEY=VALUE, for instance label.samples=8")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text!r}: the value is not YAML") from error
    return found
