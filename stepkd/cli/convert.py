"""Convert labelled rows to another kind of rows.

stepkd convert agreed.jsonl --to TRLStepwise --out trl.jsonl
stepkd convert runs/labels --to Unpaired --out unpaired.jsonl                         (TRL's KTO; ours reads labels)
stepkd convert runs/labels --to Preference --to.max_pairs 2 --out pairs.jsonl         (DPO)
stepkd convert runs/labels --to Demonstrations --to.clean true --out clean.jsonl      (SFT on one's own solutions)
stepkd convert runs/labels --to Refinements --to.max_pairs 4 --out refine.jsonl       (SFT of a refiner: GLoRe)
stepkd convert runs/prm-scores/results.jsonl --to Selected --to.by convincing --to.count 200 --out to_label.jsonl
stepkd convert runs/labels --to WithinBudget --to.tokens 100000 --out cheap.jsonl     (what labels for that much)
stepkd convert runs/critiques --to Critiques --out graded.jsonl                       (then Demonstrations, Preference)
stepkd convert new.jsonl --to Replay --to.earlier runs/earlier.jsonl --out mixed.jsonl (SFT that does not forget)
stepkd convert runs/samples --to ThinkMode --out modes.jsonl                          (think or not, by pass rate)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stepkd.labels import critiques, curriculum, refinements, selection  # noqa: F401 (choices of --to)
from stepkd.labels.convert import ConverterConfig, convert_rows


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Settings of ``stepkd convert``."""

    POSITIONAL: ClassVar = ("rows",)

    rows: str
    """Labelled rows (to be Selected: scored ones; for Replay any): a file, the folder of a job, or a word such as
    gsm8k:split=train."""
    to: ConverterConfig
    """Kind of the new rows: Stepwise, TRLStepwise, MathShepherd, Balanced, Unpaired, Preference, Demonstrations,
    Refinements, Selected, WithinBudget, Critiques, Tagged, Replay or ThinkMode."""
    out: str
    """File of rows to write."""


def run(config: ConvertConfig) -> int:
    """Run ``stepkd convert``."""
    from stepkd.cli.consensus import print_counts
    from stepkd.data.config import parse_spec
    from stepkd.data.load import load_rows

    converted = convert_rows(load_rows(parse_spec(config.rows)), config.to, path=config.rows)
    written = config.to.write(converted.rows, Path(config.out))
    print_counts(converted.counts)
    print(f"{written} rows in {config.out}")
    return 0
