"""Iterated training: generate, label, train, evaluate, K times, with one table of M0 to MK.

  stepkd iterate --config recipes/tiny/iterate_step_kto.yaml --out runs/iterated
  stepkd iterate --config recipes/iterate_step_kto.yaml --problems gsm8k:split=train,limit=500 --iterations 2
  stepkd iterate --config my.yaml --label.sampling.n 8 --train.overrides.trainer.max_steps 100

The same command resumes a killed run; nothing that is finished is sampled, labelled or trained again.
--iterations may be raised later. Under --out: iteration-K/ with labels, training, model and evaluation, summary.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stepkd.errors import ConfigError
from stepkd.iteration.spec import IterateConfig


@dataclass(frozen=True, kw_only=True)
class IterateRunConfig(IterateConfig):
    """Settings of ``stepkd iterate``."""

    out: str
    """Folder of the run; one that holds this run is resumed."""
    overwrite: bool = False
    """Delete an earlier run in ``out`` and start again."""


def run(config: IterateRunConfig) -> int:
    """Run ``stepkd iterate``."""
    from rich.console import Console

    from stepkd.iteration.loop import run_iterations
    from stepkd.iteration.measure import print_summary
    from stepkd.runs.launcher import check_launch
    from stepkd.runs.process import quiet_libraries

    if check_launch().world_size > 1:
        raise ConfigError("stepkd iterate starts its launcher itself: run it plainly, and give --launcher")
    quiet_libraries()
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log file has room for the table
    summary = run_iterations(
        config,
        Path(config.out),
        report=lambda line: console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True),
        overwrite=config.overwrite,
    )
    print_summary(console, summary)
    console.print(f"models, labels and evaluations: {config.out}", markup=False, highlight=False, soft_wrap=True)
    return 0
