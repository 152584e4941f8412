r"""Write what runs left as one HTML page: settings, curves, accuracy with paired differences, plots, every solution.

  stepkd report runs/quickstart
  stepkd report runs/base-gsm8k runs/sft-gsm8k --out comparison.html

Folders of any command may be given, or folders that hold some. The page loads nothing: it can be sent to anybody.
`stepkd samples` shows the solutions on the terminal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stepkd.errors import ConfigError, check_bounds


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of ``stepkd report``."""

    POSITIONAL: ClassVar = ("paths",)

    paths: tuple[str, ...] = ()
    """Folders that commands left (fit, evaluate, search, evaluate-prm, label, score, best-of-n, iterate, claims,
    quickstart), or that hold some."""
    out: str | None = None
    """The HTML file; null: report.html in the first folder."""
    solutions: int = 500
    """Most solutions on the page, 0 or more; 500 keep it below 5 MB."""

    def __post_init__(self) -> None:
        check_bounds("", self, solutions="[0, inf)")
        if not self.paths:
            raise ConfigError("name at least one folder: the --out of a command")


def run(config: ReportConfig) -> int:
    """Run ``stepkd report``."""
    from stepkd.report.page import write_report

    print(f"report: {write_report(config.paths, config.out, solutions=config.solutions)}")
    return 0
