"""Two evaluation runs of one benchmark, compared problem by problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepkd.errors import ConfigError, DataError
from stepkd.runs.job import RESULTS_NAME, differences, read_results, read_settings
from stepkd.statistics import Interval, Resampling, mcnemar_exact, mean_interval, paired_bootstrap

LISTED_IDS = 10
"""Most problem ids printed per list; ``to_dict`` has them all."""


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of run A and run B over the problems both have."""

    name_a: str
    """Folder of run A."""
    name_b: str
    """Folder of run B."""
    benchmark: str
    """Name of the benchmark."""
    problems: int
    """Problems in both runs, >= 1."""
    pass1_a: Interval
    """pass@1 of A on the common problems."""
    pass1_b: Interval
    """pass@1 of B on the common problems."""
    difference: Interval
    """pass@1 of B minus A, paired bootstrap over problems."""
    fixed: tuple[str, ...]
    """Ids whose first sample is right only in B."""
    broken: tuple[str, ...]
    """Ids whose first sample is right only in A."""
    p_value: float
    """Two-sided exact McNemar p on the first samples."""
    mid_p_value: float
    """Its mid-p variant, less conservative."""
    settings: Mapping[str, tuple[Any, Any]]
    """Settings that differ -> (A, B)."""
    warnings: tuple[str, ...]
    """What a reader must know before trusting the numbers."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON."""
        return {
            "a": self.name_a,
            "b": self.name_b,
            "benchmark": self.benchmark,
            "problems": self.problems,
            "level": self.difference.level,
            "pass@1_a": self.pass1_a.to_dict(),
            "pass@1_b": self.pass1_b.to_dict(),
            "difference": self.difference.to_dict(),
            "first_sample": {
                "fixed": list(self.fixed),
                "broken": list(self.broken),
                "mcnemar_p": self.p_value,
                "mcnemar_mid_p": self.mid_p_value,
            },
            "settings": {key: list(pair) for key, pair in self.settings.items()},
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        gap = self.difference
        lines = [
            f"{self.benchmark}: {self.problems} problems in both runs, {gap.level:.0%} intervals",
            f"  A       {self.pass1_a}  {self.name_a}",
            f"  B       {self.pass1_b}  {self.name_b}",
            f"  B - A  {gap.text('+.3f')}  pass@1, paired bootstrap over problems",
            f"first sample: {len(self.fixed)} fixed, {len(self.broken)} broken in B, "
            f"exact McNemar p = {self.p_value:.3g} (mid-p {self.mid_p_value:.3g})",
        ]
        lines += [f"  {name}: {_shorten(ids)}" for name, ids in (("fixed", self.fixed), ("broken", self.broken)) if ids]
        if self.settings:
            lines.append("settings that differ (A -> B):")
            lines += [f"  {key}: {a} -> {b}" for key, (a, b) in self.settings.items()]
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])


def compare_runs(
    dir_a: str | Path, dir_b: str | Path, *, level: float = 0.95, seed: int = 0, n_resamples: int = 10_000
) -> Comparison:
    """Compares two output folders of ``stepkd evaluate``, pairing problems by id.

    pass@1 of a problem is the share of its samples that are right, so runs with different numbers of samples can be
    compared. The McNemar test uses the first sample of each problem: the only one under greedy decoding.

    Args:
        dir_a: folder of the baseline run.
        dir_b: folder of the run it is compared with.
        level: confidence level in (0, 1).
        seed: seed of the bootstrap.
        n_resamples: resamples of the bootstrap.

    Returns:
        The comparison; ``str()`` of it is a small table.

    Raises:
        ConfigError: the runs are of different benchmarks or different data.
        DataError: missing or damaged files, or no problem in common.
    """
    settings_a, settings_b = read_settings(dir_a), read_settings(dir_b)
    settings = differences(settings_a, settings_b)
    for key, what in (("benchmark.name", "benchmarks"), ("benchmark.data", "data (fingerprints)")):
        if key in settings:
            a, b = settings[key]
            raise ConfigError(
                f"{dir_a} and {dir_b} hold different {what}: {a!r} and {b!r}; compare runs on the same problems"
            )
    a_rows, b_rows = _by_id(dir_a), _by_id(dir_b)
    ids = [problem_id for problem_id in a_rows if problem_id in b_rows]
    if not ids:
        raise DataError(f"{dir_a} and {dir_b} have no finished problem in common ({len(a_rows)} and {len(b_rows)})")
    warnings = []
    only_a, only_b = len(a_rows) - len(ids), len(b_rows) - len(ids)
    if only_a or only_b:
        warnings.append(f"{only_a} problems only in A and {only_b} only in B are left out")
    a_rate, b_rate = ([sum(rows[i]) / len(rows[i]) for i in ids] for rows in (a_rows, b_rows))
    fixed = tuple(i for i in ids if b_rows[i][0] and not a_rows[i][0])
    broken = tuple(i for i in ids if a_rows[i][0] and not b_rows[i][0])
    resampling: Resampling = {"level": level, "seed": seed, "n_resamples": n_resamples}
    return Comparison(
        name_a=str(dir_a),
        name_b=str(dir_b),
        benchmark=str(settings_a["benchmark"]["name"]),
        problems=len(ids),
        pass1_a=mean_interval(a_rate, **resampling),
        pass1_b=mean_interval(b_rate, **resampling),
        difference=paired_bootstrap(a_rate, b_rate, **resampling),
        fixed=fixed,
        broken=broken,
        p_value=mcnemar_exact(len(broken), len(fixed)),
        mid_p_value=mcnemar_exact(len(broken), len(fixed), mid_p=True),
        settings=settings,
        warnings=tuple(warnings),
    )


def _by_id(directory: str | Path) -> dict[str, list[bool]]:
    """Problem id -> whether each sample is right."""
    path = Path(directory) / RESULTS_NAME
    right: dict[str, list[bool]] = {}
    for row in read_results(directory):
        samples = row.get("samples")
        if not samples:
            raise DataError(f"problem {row['id']!r} has no samples", path=path, column="samples")
        right[row["id"]] = [sample.get("verdict") == "correct" for sample in samples]
    return right


def _shorten(ids: Sequence[str]) -> str:
    more = len(ids) - LISTED_IDS
    return ", ".join(ids[:LISTED_IDS]) + (f", and {more} more" if more > 0 else "")
