"""Run a claim: does a method's effect show in the tiny world?

  stepkd claims list
  stepkd claims quick noisy_student
  stepkd claims run noisy_student --save
  stepkd claims run my-claim.yaml

A claim compares arms over several seeds and says for every statement: reproduced, not reproduced, or inconclusive.
The same command resumes a killed run; given twice at a time, the two divide the seeds. The exit code is 0 whatever the
verdict.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stepkd.errors import ConfigError, StepkdError


@dataclass(frozen=True)
class ListClaimsConfig:
    """``stepkd claims list``: every claim with its committed verdict."""


@dataclass(frozen=True, kw_only=True)
class QuickConfig:
    """``stepkd claims quick NAME ...``: a smaller version that shows that all works; never a result."""

    POSITIONAL: ClassVar = ("names",)

    names: tuple[str, ...] = ()
    """Claims to run, one or more: names of ``stepkd claims list``, or YAML files."""
    out: str = "runs/claims"
    """Folder that holds one folder per claim."""
    overwrite: bool = False
    """Delete an earlier run of these claims in ``out`` and start again; jobs that a claim shares by its ``run`` stay
    and are used again, for they may be those of other claims: delete their folder, RUN/units, to do them again."""

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigError("name at least one claim; `stepkd claims list` shows them")


@dataclass(frozen=True, kw_only=True)
class RunConfig(QuickConfig):
    """``stepkd claims run NAME ...``: the whole experiment."""

    save: bool = False
    """Write results/NAME.json beside the claim's file, to be committed."""


ACTIONS = {"list": ListClaimsConfig, "run": RunConfig, "quick": QuickConfig}


def run(config: ListClaimsConfig | QuickConfig) -> int:
    """Run ``stepkd claims``."""
    from rich.console import Console

    from stepkd.claims.claim_file import load_claim
    from stepkd.runs.launcher import check_alone

    if isinstance(config, ListClaimsConfig):
        return _list()
    quick = not isinstance(config, RunConfig)
    claims = [load_claim(_find_claim(name), quick=quick) for name in dict.fromkeys(config.names)]
    check_alone("stepkd claims")

    from stepkd.claims.results import keep_summary, print_results, save_results, summarise_claim
    from stepkd.claims.runner import run_claim
    from stepkd.runs.process import quiet_libraries

    quiet_libraries()
    console = Console()
    for claim in claims:
        out = Path(config.out) / claim.folder
        with _quiet_trainings():
            settings = run_claim(
                claim,
                out,
                report=lambda line: console.print(line, style="dim", markup=False, highlight=False),
                overwrite=config.overwrite,
            )
        if settings is None:
            continue
        summary = summarise_claim(claim, out, settings["packages"])
        keep_summary(claim, out, summary)
        print_results(console, claim.name, summary, quick=claim.is_quick)
        console.print(f"rows, models and evaluations: {out}", markup=False, highlight=False, soft_wrap=True)
        if isinstance(config, RunConfig) and config.save:
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


def _find_claim(name: str) -> Path:
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
