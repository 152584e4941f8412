"""Best-of-N curves: choosing among k samples by score, by vote or by both, with pass@k as the ceiling.

Every value at k is the expectation over all subsets of k of a problem's N samples, not one lucky draw: exact for
best-of-k, majority and pass@k, and for the weighted vote as long as the subsets are few. PRM800K's own evaluation
(openai/prm800k) estimates the same expectation from 400 drawn subsets. A curve that falls after its best k shows
over-optimisation of the scorer (Gao et al. 2022, arXiv 2210.10760): its peak, and the fall behind it, stand beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from stepkd.data.io import read_rows
from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.metrics import default_ks
from stepkd.grading.judge import votes_of
from stepkd.grading.pool import Grader, GradingConfig
from stepkd.runs.job import RESULTS_NAME
from stepkd.search.best_of_n import TIE, best_of_k, maj_at_k, pass_at_k, weighted_vote_at_k
from stepkd.statistics import FloatArray, Interval, Resampling, Result, cluster_bootstrap, mean_interval, proper_width

CEILING = "pass"
MAJORITY = "majority"


@dataclass(frozen=True)
class ProblemSamples:
    """The samples of one problem, as best-of-k and votes need them."""

    id: str
    """Its id; keys the drawn subsets."""
    correct: Sequence[bool]
    """(N,) whether each sample's answer is correct."""
    votes: Sequence[str | None]
    """(N,) key of each answer's equivalence class; None when no answer was found."""


@dataclass(frozen=True)
class PairedDifference(Result):
    """B minus A on the same problems."""

    a: str
    """Method A."""
    b: str
    """Method B."""
    k: int
    """Samples chosen from; for a growth, the largest k."""
    difference: Interval
    """Difference of expected accuracies, paired bootstrap over problems; no bounds where all problems have the same."""


@dataclass(frozen=True)
class Peak(Result):
    """Where a method's curve is highest, and how far it falls behind that."""

    k: int
    """Number of samples with the highest expected accuracy, the largest of equal ones."""
    fall: Interval
    """Expected accuracy there minus that at the largest k, paired bootstrap over problems; no bounds where all problems
    have the same. The k is picked on the same problems, so an interval that only just excludes 0 is no evidence of
    over-optimisation."""


@dataclass(frozen=True)
class CurveResult(Result):
    """Best-of-k curves of several methods on the same problems."""

    ks: tuple[int, ...]
    """Numbers of samples, ascending."""
    curves: Mapping[str, tuple[Interval, ...]]
    """Method -> expected accuracy at each k. Methods: ``pass`` (ceiling), ``majority``, every score's name (best-of-k
    by that score) and ``<name>_vote`` (vote weighted by it)."""
    differences: tuple[PairedDifference, ...]
    """Every pair of methods, without the ceiling, at every k."""
    growth: tuple[PairedDifference, ...]
    """For every pair the gap at the largest k minus the gap at the smallest k above 1: does the gap grow with N?
    Empty without two such k."""
    peaks: Mapping[str, Peak]
    """Method -> where its curve is highest, and its fall from there to the largest k."""
    unscored: Mapping[str, int]
    """Score -> samples without one; they rank last and add nothing to a vote."""
    problems: int
    """Problems."""
    per_problem: Mapping[str, FloatArray]
    """Method -> (problems, ks) expected accuracy of every problem."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON, without the values per problem."""
        result = super().to_dict()
        del result["per_problem"]
        return result


def bon_curve(
    problems: Sequence[ProblemSamples],
    ks: Sequence[int],
    scores: Mapping[str, Sequence[Sequence[float | None]]],
    **settings: Unpack[Resampling],
) -> CurveResult:
    """Curves over k of best-of-k and weighted vote by each score, of the majority vote and of pass@k.

    Args:
        problems: the problems with their samples; each has at least max(ks), and what is drawn is k of all it has.
        ks: numbers of samples, each at least 1.
        scores: name -> per problem one score in [0, 1] per sample, or None (unscored).
        **settings: see :class:`~stepkd.statistics.Resampling`; the seed also draws the subsets of large weighted votes.

    Returns:
        The curves with intervals, their paired differences, and how the gaps grow.

    Raises:
        ConfigError, DataError: as :func:`expected_accuracies`.
    """
    curves, grid = expected_accuracies(problems, ks, scores, seed=settings.get("seed", 0)), tuple(sorted(set(ks)))
    pairs = list(combinations([name for name in curves if name != CEILING], 2))
    differences = tuple(
        PairedDifference(a, b, k, difference(curves[b][:, i] - curves[a][:, i], **settings))
        for a, b in pairs
        for i, k in enumerate(grid)
    )
    first = next((i for i, k in enumerate(grid) if k > 1), len(grid) - 1)
    growth = []
    for a, b in pairs if first < len(grid) - 1 else []:
        gap = curves[b] - curves[a]
        growth.append(PairedDifference(a, b, grid[-1], difference(gap[:, -1] - gap[:, first], **settings)))
    shown, peaks = described(curves, grid, **settings)
    return CurveResult(
        ks=grid,
        curves=shown,
        differences=differences,
        growth=tuple(growth),
        peaks=peaks,
        unscored={name: sum(score is None for own in rows for score in own) for name, rows in scores.items()},
        problems=len(problems),
        per_problem=curves,
    )


def expected_accuracies(
    problems: Sequence[ProblemSamples],
    ks: Sequence[int],
    scores: Mapping[str, Sequence[Sequence[float | None]]],
    *,
    seed: int = 0,
) -> dict[str, FloatArray]:
    """Expected accuracy of every problem under every way to choose among k of its samples.

    Args:
        problems, ks, scores: as for :func:`bon_curve`.
        seed: seed of the drawn subsets of large weighted votes.

    Returns:
        Method (:attr:`CurveResult.curves`) -> (problems, ks ascending) values in [0, 1].

    Raises:
        ConfigError: no problem, no k, a k below 1 or above some problem's samples (named), or a reserved or repeated
            name.
        DataError: scores that do not fit (problem named).
    """
    _check_problems(problems, ks, scores)
    grid = tuple(sorted(set(ks)))
    sizes, hits = ([count(p.correct) for p in problems] for count in (len, sum))
    curves: dict[str, FloatArray] = {
        CEILING: np.stack([pass_at_k(sizes, hits, k) for k in grid], axis=1),
        MAJORITY: np.array([[maj_at_k(p.votes, p.correct, k) for k in grid] for p in problems]),
    }
    for name, per_problem in scores.items():
        best, vote = np.empty((2, len(problems), len(grid)))
        for i, (p, own) in enumerate(zip(problems, per_problem, strict=True)):
            try:
                best[i] = [best_of_k(own, p.correct, k) for k in grid]
                vote[i] = [weighted_vote_at_k(own, p.votes, p.correct, k, seed=seed, key=p.id) for k in grid]
            except DataError as error:
                raise DataError(f"problem {p.id!r}, score {name!r}: {error}") from None
        curves[name], curves[f"{name}_vote"] = best, vote
    return curves


def described(
    curves: Mapping[str, FloatArray], ks: Sequence[int], **settings: Unpack[Resampling]
) -> tuple[dict[str, tuple[Interval, ...]], dict[str, Peak]]:
    """Intervals of curves at each k, and where each is highest, with its fall from there.

    Args:
        curves: name -> (problems, ks) expected accuracy of every problem.
        ks: numbers of samples, ascending.
        **settings: see :class:`~stepkd.statistics.Resampling`.
    """
    shown, peaks = {}, {}
    for name, values in curves.items():
        shown[name] = tuple(mean_interval(np.clip(column, 0.0, 1.0), **settings) for column in values.T)
        means = values.mean(axis=0)
        best = int(np.flatnonzero(means >= means.max() - TIE)[-1])
        peaks[name] = Peak(ks[best], difference(values[:, best] - values[:, -1], **settings))
    return shown, peaks


def outvoted(result: Mapping[str, Any]) -> list[str]:
    """Where choosing by a score alone is correct less often than the majority vote: a sentence for each such score.

    Args:
        result: :meth:`CurveResult.to_dict`; without ``differences``, as of a search's pool, nothing is said. Only
            those count whose interval is below 0.
    """
    below: dict[str, list[str]] = {}
    for each in result.get("differences", ()):
        if each["a"] == MAJORITY and f"{each['b']}_vote" in result["curves"] and (each["difference"]["high"] or 0) < 0:
            below.setdefault(each["b"], []).append(str(each["k"]))
    return [
        f"At N={', '.join(ks)} the solution that {name} scores highest\nis correct less often than the majority vote"
        for name, ks in below.items()
    ]


def difference(values: FloatArray, **settings: Unpack[Resampling]) -> Interval:
    """Mean of (problems,) differences, without bounds where all problems have the same."""
    return proper_width(cluster_bootstrap(values, **settings))


def _check_problems(
    problems: Sequence[ProblemSamples], ks: Sequence[int], scores: Mapping[str, Sequence[Sequence[float | None]]]
) -> None:
    if not problems or not ks:
        raise ConfigError(f"a best-of-N curve needs a problem and an N, found {len(problems)} problems, ks={list(ks)}")
    names = [CEILING, MAJORITY, *(each for name in scores for each in (name, f"{name}_vote"))]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"methods {names} would share a name: rename the scores, {CEILING!r} and {MAJORITY!r} are taken"
        )
    fewest = min(problems, key=lambda problem: len(problem.correct))
    if not 1 <= min(ks) <= max(ks) <= len(fewest.correct):
        raise ConfigError(
            f"ks={list(ks)} must lie between 1 and the samples of every problem, and {fewest.id!r} has "
            f"{len(fewest.correct)}: draw more samples or lower k"
        )


# --- curves from files of scored completions --------------------------------------------------------------------------

_SAME = ("completion", "completions", "token_ids", "correct")
"""What rows of one sample must share, whichever scorer's file they are in."""


def best_of_n_from_files(
    files: Mapping[str, str | Path],
    *,
    ks: Sequence[int] = (),
    grading: GradingConfig | None = None,
    seed: int = 0,
    samples: int | None = None,
) -> CurveResult:
    """Curves of every scorer on the same completions, beside majority and pass@N.

    Args:
        files: name of a scorer -> folder of ``stepkd score``, or file of completion rows with ``score`` and
            ``correct``, all of the same completions.
        ks: numbers of samples; none: those of :func:`~stepkd.evaluation.metrics.default_ks`.
        grading: how answers are found and compared for the vote; None: the defaults.
        seed: seed of intervals and drawn subsets.
        samples: how many were drawn of every problem. One that is in no file, or not in all, has no text or no step to
            score: it counts as incorrect, or as unscored. A problem is counted where some sample of it is in a file.
            None: every sample must be in every file.

    Raises:
        ConfigError: no file, a reserved name, or files of different completions.
        DataError: a row without score or grade, or problems with too few samples.
    """
    if not files:
        raise ConfigError("scores: needs at least one file: give NAME=PATH, what stepkd score wrote")
    loaded = {name: _by_key(path) for name, path in files.items()}
    found = {key: row for rows in reversed(loaded.values()) for key, row in rows.items()}
    first_name, first = next(iter(loaded.items()))
    for name, rows in loaded.items():
        missing = len(set(first) ^ set(rows))
        if missing and samples is None:
            raise ConfigError(f"{first_name} and {name} scored different completions ({missing} are in one only)")
        for key, row in rows.items():
            if any(row.get(column) != found[key].get(column) for column in _SAME):
                raise ConfigError(
                    f"{first_name} and {name} hold different solutions under one id (sample {key[1]} of problem "
                    f"{key[0]!r}): score one file of completions with both"
                )
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in dict.fromkeys([*first, *found]):
        groups.setdefault(key[0], []).append(key)

    def padded(values: list[Any], missing: Any = None) -> list[Any]:
        return values + [missing] * ((samples or 0) - len(values))

    with Grader(grading) as grader:
        votes = votes_of([[found[key] for key in keys] for keys in groups.values()], grader.extractors, grader)
    problems = [
        ProblemSamples(problem, padded([found[key]["correct"] for key in keys], False), padded(list(own)))
        for (problem, keys), own in zip(groups.items(), votes, strict=True)
    ]
    smallest = min((len(problem.correct) for problem in problems), default=0)
    chosen = ks or default_ks(smallest)
    scores = {
        name: [padded([rows[key]["score"] if key in rows else None for key in keys]) for keys in groups.values()]
        for name, rows in loaded.items()
    }
    return bon_curve(problems, chosen, scores, seed=seed)


def _by_key(path: str | Path) -> dict[tuple[str, str], Mapping[str, Any]]:
    rows: dict[tuple[str, str], Mapping[str, Any]] = {}
    path = Path(path) / RESULTS_NAME if Path(path).is_dir() else path
    for row, number in read_rows(path):
        if "score" not in row:
            raise DataError("no 'score': score it with stepkd score", path=path, line=number, column="score")
        score = row["score"]
        if isinstance(score, bool) or not (score is None or (isinstance(score, int | float) and abs(score) < math.inf)):
            told = f"{score!r} is no score: a finite number, or null for a solution that could not be scored"
            raise DataError(told, path=path, line=number, column="score")
        if not isinstance(row.get("correct"), bool):
            raise DataError("no verdict: give graded completions", path=path, line=number, column="correct")
        if (row.get("labelling") or {}).get("dedupe"):
            raise DataError(
                "these completions lost their duplicates when they were labelled, so that their shares are biased: "
                "sample them with stepkd label --solutions.dedupe false",
                path=path,
                line=number,
            )
        problem = str(row.get("problem_id", row.get("prompt")))
        key = (problem, str(row.get("sample", row.get("id", number))))
        if key in rows:
            raise DataError(f"sample {key[1]} of problem {key[0]!r} occurs twice", path=path, line=number)
        rows[key] = row
    return rows
