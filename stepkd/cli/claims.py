"""Run a claim: does a method's effect show in the tiny world?

  stepkd claims --list
  stepkd claims noisy_student --quick
  stepkd claims noisy_student --save
  stepkd claims my-claim.yaml

A claim compares arms over several seeds and says for every statement: reproduced, not reproduced, or inconclusive.
The same command resumes a killed run. The exit code is 0 whatever the verdict.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stepkd.errors import ConfigError, StepkdError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``stepkd claims``."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="claims to run: names of the list, or YAML files")
    parser.add_argument("--list", action="store_true", help="every claim with its committed verdict")
    parser.add_argument("--quick", action="store_true", help="the reduced version, in folders of its own")
    parser.add_argument(
        "--out", default="runs/claims", metavar="FOLDER", help="holds one folder per claim (default: runs/claims)"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run of these claims in --out")
    parser.add_argument(
        "--save", action="store_true", help="write results/NAME.json beside the claim's file, to be committed"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run ``stepkd claims``."""
    from rich.console import Console

    from stepkd.claims.claim_file import load_claim
    from stepkd.runs.launcher import check_alone

    if arguments.list:
        return _list()
    if not arguments.names:
        raise ConfigError("name at least one claim; `stepkd claims --list` shows them")
    if arguments.quick and arguments.save:
        raise ConfigError("--quick is no result, so --save does not go with it")
    claims = [load_claim(find_claim(name), quick=arguments.quick) for name in dict.fromkeys(arguments.names)]
    check_alone("stepkd claims")

    from stepkd.claims.results import print_results, save_results, summarise_claim
    from stepkd.claims.runner import run_claim
    from stepkd.runs.process import quiet_libraries

    quiet_libraries()
    console = Console()
    begun: set[str] = set()
    for claim in claims:
        out = Path(arguments.out) / claim.run
        with _quiet_trainings():
            settings = run_claim(
                claim,
                out,
                report=lambda line: console.print(line, style="dim", markup=False, highlight=False),
                overwrite=arguments.overwrite and claim.run not in begun,  # claims may share a run
            )
        begun.add(claim.run)
        summary = summarise_claim(claim, out, settings["packages"])
        print_results(console, claim.name, summary, quick=claim.quick)
        console.print(f"rows, models and evaluations: {out}", markup=False, highlight=False, soft_wrap=True)
        if arguments.save:
            path = save_results(claim, summary)
            console.print(f"results to commit: {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


@contextmanager
def _quiet_trainings() -> Iterator[None]:
    """Without the log lines of every small training and evaluation."""
    logger = logging.getLogger("stepkd")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def all_claims() -> dict[str, Path]:
    """Claim files by name."""
    from stepkd.yaml_files import recipes_folder

    return {path.stem: path for path in sorted((recipes_folder() / "claims").glob("*.yaml"))}


def find_claim(name: str) -> Path:
    """A claim's file, by its path or its name; ConfigError with the nearest name when there is none."""
    from stepkd.yaml_files import find_recipe

    return find_recipe(name, all_claims(), "claim")


def _list() -> int:
    from stepkd.claims.claim_file import load_claim
    from stepkd.claims.results import committed_verdict

    found = all_claims()
    width = max(map(len, found), default=0)
    code = 0
    for name, path in found.items():
        try:
            claim = load_claim(path)
            print(f"{name:<{width}}  {committed_verdict(claim)}\n{'':<{width}}    {claim.claim}")
        except StepkdError as error:  # the others are still worth seeing
            print(f"{name:<{width}}  {error}")
            code = 2
    return code
