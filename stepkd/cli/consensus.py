"""Keep of one labelling what another one of the same solutions agrees on (arXiv 2501.07301).

stepkd consensus runs/labels runs/judged --out agreed.jsonl
stepkd consensus runs/labels runs/judged --truth runs/true --out agreed.jsonl
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from stepkd.errors import ConfigError

if TYPE_CHECKING:
    from stepkd.labels.quality import LabelQuality


@dataclass(frozen=True, kw_only=True)
class ConsensusConfig:
    """Settings of ``stepkd consensus``."""

    POSITIONAL: ClassVar = ("first", "second")

    first: str
    """Labelled rows, of which those are kept that agree: a file, or the folder of a labelling job."""
    second: str
    """Another labelling of the same solutions."""
    out: str
    """File of rows to write."""
    truth: str | None = None
    """True labels of the same solutions, against which precision and recall of both labellings and of what is kept are
    shown; null shows none."""


def run(config: ConsensusConfig) -> int:
    """Run ``stepkd consensus``."""
    from stepkd.data.config import parse_spec
    from stepkd.data.load import load_rows
    from stepkd.labels.convert import consensus_filter
    from stepkd.labels.quality import label_quality
    from stepkd.runs.files import write_jsonl

    first, second = (load_rows(parse_spec(word)) for word in (config.first, config.second))
    agreed = consensus_filter(first, second, names=(config.first, config.second))
    print_counts(agreed.counts)
    if not agreed.rows:
        raise ConfigError("the two labellings agree on no solution: nothing was written")
    if config.truth is not None:
        truth = load_rows(parse_spec(config.truth))
        known = {row["id"] for row in truth}
        for name, rows in (("A", first), ("B", second), ("agreed", agreed.rows)):
            _print_quality(name, label_quality([row for row in rows if row["id"] in known], truth))
    written = write_jsonl(Path(config.out), agreed.rows)
    print(f"{written} rows in {config.out}")
    return 0


def print_counts(counts: dict[str, int]) -> None:
    """One line of counts by name."""
    print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))


def _print_quality(name: str, quality: LabelQuality) -> None:
    shares = {fact.replace("_", " "): value for fact, value in vars(quality).items() if not isinstance(value, int)}
    texts = [f"{fact} {'-' if value is None else f'{value.value:.1%}'}" for fact, value in shares.items()]
    print(f"{name}: {', '.join(texts)}  ({quality.solutions} solutions, {quality.steps} steps up to the first error)")
