"""Best-of-N curves: accuracy of choosing among N samples by each scorer, by majority vote, and the ceiling pass@N.

stepkd score --scorer runs/prm --completions runs/samples --out runs/prm-scores
stepkd best-of-n prm=runs/prm-scores orm=runs/orm-scores --out runs/best-of-n
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from stepkd.errors import ConfigError, check_bounds
from stepkd.grading.pool import GradingConfig


@dataclass(frozen=True, kw_only=True)
class BestOfNConfig:
    """Settings of ``stepkd best-of-n``."""

    POSITIONAL: ClassVar = ("scores",)

    scores: tuple[str, ...]
    """NAME=PATH of every scorer: a folder of stepkd score, or a file of scored completions; all of the same
    completions."""
    ks: tuple[int, ...] = ()
    """Numbers of samples N to choose from, each at least 1; the default takes the powers of two up to what there is,
    and that number."""
    grading: GradingConfig = field(default_factory=GradingConfig)
    """How answers are found and compared for the vote."""
    seed: int = 0
    """Seed of the intervals' resampling and of the drawn subsets of large votes, at least 0."""
    out: str | None = None
    """Folder for best_of_n.json and the figure best_of_n.svg; without it the curves are only shown."""

    def __post_init__(self) -> None:
        check_bounds("", self, seed="[0, inf)")

    def files(self) -> dict[str, str]:
        """Path of every scorer by its name."""
        files: dict[str, str] = {}
        for word in self.scores:
            name, equals, path = word.partition("=")
            if not (name and equals and path):
                raise ConfigError(
                    f"{word!r} is no scorer with its scores: write NAME=PATH, such as prm=runs/prm-scores"
                )
            if name in files:
                raise ConfigError(
                    f"{name!r} is given twice ({files[name]} and {path}): every scorer needs its own name"
                )
            files[name] = path
        return files


def run(config: BestOfNConfig) -> int:
    """Run ``stepkd best-of-n``."""
    from rich.console import Console
    from rich.table import Column, Table

    from stepkd.evaluation.best_of_n import best_of_n_from_files
    from stepkd.evaluation.figures import best_of_n_figure
    from stepkd.runs.files import write_json
    from stepkd.statistics import percent

    result = best_of_n_from_files(config.files(), ks=config.ks, grading=config.grading, seed=config.seed)
    console = Console()
    table = Table("method", *(Column(f"N={k}", justify="right") for k in result.ks), title_justify="left")
    table.title = f"best-of-N on {result.problems} problems, 95% intervals"
    for name, curve in result.curves.items():
        table.add_row(name, *(percent(interval.to_dict(), "\n") for interval in curve))
    console.print(table)
    for each in result.differences:
        if each.k == result.ks[-1]:
            shown = each.difference.to_dict()
            console.print(f"N={each.k}: {each.b} - {each.a} = {percent(shown)}", markup=False, highlight=False)
    for each in result.growth:
        first = next(k for k in result.ks if k > 1)
        grown = f"from N={first} to {each.k}, {each.b} - {each.a} grows by {percent(each.difference.to_dict())}"
        console.print(grown, markup=False, highlight=False)
    for name, peak in result.peaks.items():
        if peak.k < result.ks[-1] and peak.fall.low > 0:
            fall = f"{percent(peak.fall.to_dict())} percentage points lower at N={result.ks[-1]}"
            fallen = f"{name} is highest at N={peak.k}, picked on the same problems, and {fall}"
            console.print(fallen, markup=False, highlight=False)
    for name, count in result.unscored.items():
        if count:
            console.print(f"{count} samples have no score by {name}: they rank last", markup=False)
    if config.out:
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "best_of_n.json", result.to_dict())
        console.print(f"figure: {best_of_n_figure(result.to_dict(), out / 'best_of_n.svg')}", markup=False)
    return 0
