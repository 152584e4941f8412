"""Best-of-N from files: rollouts scored by one or several reward models (``stepkd score``) to curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepkd.data.io import read_rows
from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.best_of_n import CurveResult, ProblemSamples, bon_curve
from stepkd.grading import DEFAULT_EXTRACTORS, Grader
from stepkd.grading.judge import votes_of

Row = Mapping[str, Any]

_SAME = ("completion", "completions", "token_ids", "correct")
"""What rows of one sample must share, whichever scorer's file they are in."""


def best_of_n_from_files(
    files: Mapping[str, str | Path],
    *,
    ks: Sequence[int] | None = None,
    extractors: Sequence[str] = DEFAULT_EXTRACTORS,
    seed: int = 0,
) -> CurveResult:
    """Curves of every scorer on the same rollouts, beside majority and pass@N.

    Args:
        files: name of a scorer -> file of rollout rows with ``score`` and ``correct``, all of the same rollouts.
        ks: numbers of samples; None: powers of two up to the samples per problem.
        extractors: how answers are found for the vote.
        seed: seed of intervals and drawn subsets.

    Raises:
        ConfigError: no file, a reserved name, or files of different rollouts.
        DataError: a row without score or grade, or problems with too few samples.
    """
    if not files:
        raise ConfigError("best-of-N needs at least one file of scored rollouts (stepkd score)")
    if reserved := sorted(set(files) & {"pass", "majority"}):
        raise ConfigError(f"a scorer cannot be called {reserved[0]!r}: that is a curve's own name")
    loaded = {name: _by_key(path) for name, path in files.items()}
    first_name, first = next(iter(loaded.items()))
    for name, rows in loaded.items():
        if set(rows) != set(first):
            missing = len(set(first) ^ set(rows))
            raise ConfigError(f"{first_name} and {name} scored different rollouts ({missing} are in one only)")
        for key, row in rows.items():
            if any(row.get(column) != first[key].get(column) for column in _SAME):
                raise ConfigError(
                    f"{first_name} and {name} hold different solutions under one id (sample {key[1]} of problem "
                    f"{key[0]!r}): score one file of rollouts with both"
                )
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in first:
        groups.setdefault(key[0], []).append(key)
    with Grader(extractors=extractors) as grader:
        votes = votes_of([[first[key] for key in keys] for keys in groups.values()], extractors, grader)
    problems = [
        ProblemSamples(problem, [bool(first[key]["correct"]) for key in keys], own)
        for (problem, keys), own in zip(groups.items(), votes, strict=True)
    ]
    smallest = min(len(keys) for keys in groups.values())
    chosen = ks or [k for k in (2**i for i in range(20)) if k <= smallest]
    scores = {name: [[rows[key]["score"] for key in keys] for keys in groups.values()] for name, rows in loaded.items()}
    return bon_curve(problems, chosen, scores, seed=seed)


def _by_key(path: str | Path) -> dict[tuple[str, str], Row]:
    rows: dict[tuple[str, str], Row] = {}
    for row, number in read_rows(path):
        for column in ("score", "correct"):
            if column not in row:
                hint = "score it with stepkd score" if column == "score" else "give graded rollouts"
                raise DataError(f"no {column!r}: {hint}", path=path, line=number, column=column)
        if (row.get("labelling") or {}).get("dedupe"):
            raise DataError(
                "these rollouts lost their duplicates when they were labelled, so that their shares are wrong: sample "
                "them with stepkd label --keep-duplicates",
                path=path,
                line=number,
            )
        if not isinstance(row["correct"], bool):
            raise DataError("the rollout is not graded (correct is null)", path=path, line=number, column="correct")
        problem = str(row.get("problem_id", row.get("prompt")))
        key = (problem, str(row.get("sample", row.get("id", number))))
        if key in rows:
            raise DataError(f"sample {key[1]} of problem {key[0]!r} occurs twice", path=path, line=number)
        rows[key] = row
    return rows
