"""What a set of result rows says: pass@k, maj@k, failure rates, step accuracy, each with an interval; and two runs of
one benchmark, compared problem by problem.

A result row is one problem::

    {"id": str, "index": int, "prompt": str, "answer": str,
     "samples": [{"completion": str, "extracted": str | None, "verdict": "correct" | "incorrect" | "unparsed" |
     "timeout",
                  "tokens": int, "finish": "stop" | "length", "vote": str | None, "logprob": float | None,
                  "step_labels": [bool | None] | None}, ...]}

``vote`` is the key of the answer's equivalence class: equal keys are equal answers. The intervals and paired tests
live in :mod:`stepkd.statistics`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
from numpy.typing import ArrayLike

from stepkd.errors import ConfigError, DataError
from stepkd.runs.job import differences, read_results, read_settings
from stepkd.search.best_of_n import maj_at_k, pass_at_k
from stepkd.statistics import (
    FloatArray,
    Interval,
    Resampling,
    Result,
    cluster_bootstrap,
    mcnemar_exact,
    mean_interval,
    ratio_interval,
    ratio_of_sums,
)
from stepkd.steps.labels import tally

MIN_G_PASS = 4
"""Least k of G-Pass@k that is reported: of fewer samples it says little beside pass@k."""


def default_ks(samples: int) -> list[int]:
    """The k of pass@k and maj@k that are reported.

    Args:
        samples: completions per problem, at least 1.

    Returns:
        Powers of two up to the number of samples, and that number, increasing: 6 gives 1, 2, 4, 6.
    """
    return sorted({samples, *(2**i for i in range(samples.bit_length()))})


THRESHOLDS = (0.5, 0.75, 1.0)
"""The tau of G-Pass@k_tau that are reported."""


def g_pass_at_k(n: ArrayLike, c: ArrayLike, k: int, tau: float | None) -> FloatArray:
    """Unbiased G-Pass@k_tau, and their mean mG-Pass@k (Liu et al. 2024, arXiv 2412.13147).

    Args:
        n, c, k: as in :func:`pass_at_k`.
        tau: share of the k samples that must be correct, in [0, 1]; near 0 it is pass@k. None: mG-Pass@k, twice the
            integral over tau from 0.5 to 1, by the paper's sum ``2/k * sum(G-Pass@k_(i/k) for i > ceil(k/2))``.

    Returns:
        Float array of the broadcast shape, values in [0, 1]: the chance that at least ceil(tau * k) of k samples, drawn
        without replacement, are correct.

    Raises:
        ConfigError: counts out of range, k larger than some n, or tau outside [0, 1].
    """
    from scipy.stats import hypergeom

    pass_at_k(n, c, k)  # refuses impossible counts
    if tau is not None and not 0 <= tau <= 1:
        raise ConfigError(f"G-Pass@{k} at tau={tau}: tau is a share and must lie between 0 and 1")
    drawn = np.arange(k + 1)
    chances = hypergeom.pmf(drawn, np.asarray(n)[..., None], np.asarray(c)[..., None], k)
    # sum over i > m of P(X >= i) is the mean of how far X lies above m.
    worth = 2 / k * np.maximum(drawn - -(-k // 2), 0) if tau is None else drawn >= tau * k - 1e-9
    return np.asarray(np.minimum((chances * worth).sum(axis=-1), 1.0), dtype=np.float64)


def summarise(
    rows: Iterable[Mapping[str, Any]], ks: Sequence[int] = (1,), *, seed: int = 0, n_resamples: int = 10_000
) -> dict[str, Any]:
    """Metrics of a run from its result rows (layout in the module's docstring).

    Args:
        rows: one mapping per problem, in any order.
        ks: numbers of samples k for pass@k and, where k > 1, maj@k; pass@1 is always given, as avg@n too where every
            problem has the same n > 1 samples, and G-Pass@k for the largest k of 4 or more with at least 3k
            samples (the paper's n).
        seed: seed of the bootstrap.
        n_resamples: resamples of the bootstrap.

    Returns:
        ``problems``, ``samples``, ``total_tokens``, ``seed``, ``n_resamples`` and ``metrics``: a dict from
        name to ``{"value", "low", "high", "method"}``. Names: ``pass@K``, ``maj@K``, ``avg@N``, ``G-Pass@K_TAU``,
        ``mG-Pass@K``, ``unparsed_rate``,
        ``timeout_rate``, ``truncated_rate``, ``truncated_answered_rate`` (samples cut off behind a complete answer),
        ``mean_tokens``, and with step labels ``step_accuracy`` (correct steps among labelled steps) and
        ``correct_with_incorrect_step`` (:class:`~stepkd.steps.labels.Tally`). A ratio without
        denominator has the value None. The result does not depend on the order of the rows.

    Raises:
        DataError: no rows, a problem without samples, or a repeated id.
        ConfigError: a k larger than some problem's number of samples, or settings out of range.
    """
    problems = sorted((problem_counts(row) for row in rows), key=lambda problem: problem.id)
    if not problems:
        raise DataError("there are no results to summarise")
    for first, second in pairwise(problems):
        if first.id == second.id:
            raise DataError(f"problem id {first.id!r} occurs twice in the results", column="id")
    n = np.array([len(problem.correct) for problem in problems], dtype=np.float64)

    def counted(name: str) -> FloatArray:
        return np.array([problem.counts[name] for problem in problems], dtype=np.float64)

    settings: Resampling = {"seed": seed, "n_resamples": n_resamples}
    rate, ratio = partial(mean_interval, **settings), partial(ratio_interval, **settings)
    metrics: dict[str, Interval] = {}
    for k in sorted({1, *ks}):
        metrics[f"pass@{k}"] = rate(pass_at_k(n, counted("correct"), k))
        if k > 1:
            metrics[f"maj@{k}"] = rate(np.array([maj_at_k(problem.votes, problem.correct, k) for problem in problems]))
    if n.min() == n.max() > 1:
        metrics[f"avg@{int(n.max())}"] = metrics["pass@1"]
    if several := [k for k in ks if k >= MIN_G_PASS and 3 * k <= n.min()]:
        k = max(several)
        for name, tau in [*((f"G-Pass@{k}_{tau}", tau) for tau in THRESHOLDS), (f"mG-Pass@{k}", None)]:
            metrics[name] = rate(g_pass_at_k(n, counted("correct"), k, tau))
    for name in ("unparsed", "timeout", "truncated", "truncated_answered"):
        metrics[f"{name}_rate"] = rate(counted(name) / n)
    metrics["mean_tokens"] = cluster_bootstrap(counted("tokens") / n, **settings)
    if counted("labelled").any():
        metrics["step_accuracy"] = ratio(counted("correct_steps"), counted("steps"))
        metrics["correct_with_incorrect_step"] = ratio(
            counted("correct_with_incorrect_step"), counted("correct_labelled")
        )
    return {
        "problems": len(problems),
        "samples": int(n.sum()),
        "total_tokens": int(counted("tokens").sum()),
        **settings,
        "metrics": {name: interval.to_dict() for name, interval in metrics.items()},
    }


class ProblemCounts(NamedTuple):
    """One problem's samples, counted by :func:`problem_counts`."""

    id: str
    votes: list[str | None]
    correct: list[bool]
    counts: Counter[str]


def problem_counts(row: Mapping[str, Any]) -> ProblemCounts:
    """What a problem's metrics are made of.

    Args:
        row: a result row: ``id``, and ``samples`` with ``verdict``, ``finish``, ``tokens``, and perhaps ``vote`` and
            ``step_labels``.

    Returns:
        For each sample its vote (None: unparsed) and whether it is correct; and counts over the samples: of every
        verdict, ``samples``, ``truncated``, ``truncated_answered``, ``tokens``, ``labelled``, ``steps``,
        ``correct_steps``, ``correct_labelled`` and ``correct_with_incorrect_step``.

    Raises:
        DataError: no id, or no samples.
    """
    samples = row.get("samples")
    if row.get("id") is None or not samples:
        raise DataError(f"result row with id {row.get('id')!r} has no id or no samples", column="samples")
    correct = [sample["verdict"] == "correct" for sample in samples]
    labels = [sample.get("step_labels") for sample in samples]
    marks = [mark for steps in labels for mark in steps or ()]
    counts = Counter(sample["verdict"] for sample in samples)
    counts["samples"] = len(samples)
    counts["truncated"] = sum(sample["finish"] == "length" for sample in samples)
    counts["truncated_answered"] = sum(s["finish"] == "length" and s["verdict"] != "unparsed" for s in samples)
    counts["tokens"] = sum(sample["tokens"] for sample in samples)
    counts["labelled"] = sum(steps is not None for steps in labels)
    counts["steps"], counts["correct_steps"] = len(marks) - marks.count(None), sum(map(bool, marks))
    _, counts["correct_labelled"], counts["correct_with_incorrect_step"] = tally(correct, labels)
    return ProblemCounts(str(row["id"]), [sample.get("vote") for sample in samples], correct, counts)


# --- two runs of one benchmark, compared problem by problem -----------------------------------------------------------

PAIRED = {
    "pass@1": ("correct", "samples"),
    "correct_with_incorrect_step": ("correct_with_incorrect_step", "correct_labelled"),
    "step_accuracy": ("correct_steps", "steps"),
    "mean_tokens": ("tokens", "samples"),
}
"""Metrics of which differences are given: which of :func:`problem_counts` over which."""


def paired_differences(
    rows: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], **settings: Unpack[Resampling]
) -> dict[str, Any]:
    """A model minus another one on the same problems, for the metrics of :data:`PAIRED`.

    Problems are resampled with both models' solutions together. A share without denominator on either side is None.

    Args:
        rows, base: result rows of the model and of the other one, over the same problems.
        **settings: see :class:`~stepkd.statistics.Resampling`.
    """
    before = {row["id"]: problem_counts(row).counts for row in base}
    pairs = [(problem_counts(row).counts, before[row["id"]]) for row in rows]
    shares: dict[str, Any] = {}
    for name, (top, bottom) in PAIRED.items():
        counts = np.array([[new[top], new[bottom], old[top], old[bottom]] for new, old in pairs], dtype=np.float64)
        known = counts[:, 1].sum() and counts[:, 3].sum()
        shares[name] = ratio_difference(counts, **settings).to_dict() if known else None
    return shares


def ratio_difference(counts: FloatArray, **settings: Unpack[Resampling]) -> Interval:
    """``sum(c0) / sum(c1) - sum(c2) / sum(c3)`` of (problems, 4) counts, problems resampled together."""

    def statistic(resampled: FloatArray) -> FloatArray:
        return ratio_of_sums(resampled[:, :, :2]) - ratio_of_sums(resampled[:, :, 2:])

    return cluster_bootstrap(counts, statistic, **settings)


COMPARISON_NAME = "comparison.json"
LISTED_IDS = 10
"""Most problem ids printed per list; ``to_dict`` has them all."""


@dataclass(frozen=True)
class Comparison(Result):
    """Paired comparison of run A and run B over the problems both have."""

    a: str
    """Folder of run A."""
    b: str
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
    """Ids whose first sample is correct only in B."""
    broken: tuple[str, ...]
    """Ids whose first sample is correct only in A."""
    mcnemar_p: float
    """Two-sided exact McNemar p on the first samples."""
    mcnemar_mid_p: float
    """Its mid-p variant, less conservative."""
    settings: Mapping[str, tuple[Any, Any]]
    """Settings that differ -> (A, B)."""
    warnings: tuple[str, ...]
    """What a reader must know before trusting the numbers."""

    def __str__(self) -> str:
        lines = [
            f"{self.benchmark}: {self.problems} problems in both runs, 95% intervals",
            f"  A       {self.pass1_a}  {self.a}",
            f"  B       {self.pass1_b}  {self.b}",
            f"  B - A  {self.difference.text('+.3f')}  pass@1, paired bootstrap over problems",
            f"first sample: {len(self.fixed)} fixed, {len(self.broken)} broken in B, "
            f"exact McNemar p = {self.mcnemar_p:.3g} (mid-p {self.mcnemar_mid_p:.3g})",
        ]
        lines += [f"  {name}: {_shorten(ids)}" for name, ids in (("fixed", self.fixed), ("broken", self.broken)) if ids]
        if self.settings:
            lines.append("settings that differ (A -> B):")
            lines += [f"  {key}: {a} -> {b}" for key, (a, b) in self.settings.items()]
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])


def compare_runs(dir_a: str | Path, dir_b: str | Path, **resampling: Unpack[Resampling]) -> Comparison:
    """Compares two output folders of ``stepkd evaluate``, pairing problems by id.

    pass@1 of a problem is the share of its samples that are correct, so runs with different numbers of samples can be
    compared. The McNemar test uses the first sample of each problem: the only one under greedy decoding.

    Args:
        dir_a: folder of the baseline run.
        dir_b: folder of the run it is compared with.
        **resampling: see :class:`~stepkd.statistics.Resampling`.

    Returns:
        The comparison; ``str()`` of it is a small table.

    Raises:
        ConfigError: the runs are of different benchmarks or different data.
        DataError: missing or damaged files, or no problem in common.
    """
    settings_a, settings_b = read_settings(dir_a), read_settings(dir_b)
    for folder, own in ((dir_a, settings_a), (dir_b, settings_b)):
        if "benchmark" not in own or "methods" in own:  # a search has several rows a problem
            raise ConfigError(f"{folder} holds no evaluation, but another kind of job ({own['kind']})")
    settings = differences(settings_a, settings_b)
    for key, what in (("benchmark.name", "benchmarks"), ("benchmark.data", "data (fingerprints)")):
        if key in settings:
            a, b = settings[key]
            raise ConfigError(
                f"{dir_a} and {dir_b} hold different {what}: {a!r} and {b!r}; compare runs on the same problems"
            )
    a_rows, b_rows = (
        {row["id"]: problem_counts(row).correct for row in read_results(folder)} for folder in (dir_a, dir_b)
    )
    ids = [problem_id for problem_id in a_rows if problem_id in b_rows]
    if not ids:
        raise DataError(f"{dir_a} and {dir_b} have no finished problem in common ({len(a_rows)} and {len(b_rows)})")
    only_a, only_b = len(a_rows) - len(ids), len(b_rows) - len(ids)
    left_out = f"{only_a} problems only in A and {only_b} only in B are left out"
    a_rate, b_rate = ([sum(rows[i]) / len(rows[i]) for i in ids] for rows in (a_rows, b_rows))
    fixed = tuple(i for i in ids if b_rows[i][0] and not a_rows[i][0])
    broken = tuple(i for i in ids if a_rows[i][0] and not b_rows[i][0])
    return Comparison(
        a=str(dir_a),
        b=str(dir_b),
        benchmark=str(settings_a["benchmark"]["name"]),
        problems=len(ids),
        pass1_a=mean_interval(a_rate, **resampling),
        pass1_b=mean_interval(b_rate, **resampling),
        difference=cluster_bootstrap(np.subtract(b_rate, a_rate), **resampling),
        fixed=fixed,
        broken=broken,
        mcnemar_p=mcnemar_exact(len(broken), len(fixed)),
        mcnemar_mid_p=mcnemar_exact(len(broken), len(fixed), mid_p=True),
        settings=settings,
        warnings=(left_out,) if only_a or only_b else (),
    )


def _shorten(ids: Sequence[str]) -> str:
    more = len(ids) - LISTED_IDS
    return ", ".join(ids[:LISTED_IDS]) + (f", and {more} more" if more > 0 else "")
