"""Which solutions of a pool to have labelled where not all can be, and which labels a budget of tokens pays for.

Sources: k-centre in probability space of PCoreSet (arXiv 2506.00910); the uncertainty of an ensemble of ActPRM (Duan et
al. 2025, arXiv 2504.10559); convincing solutions with incorrect answers of Let's Verify Step by Step (Lightman et al.
2023, arXiv 2305.20050). Reconstructions: PCoreSet's probabilities are those of one image's classes, here they are the
scores of a solution's steps; ActPRM labels whatever is beyond one of its thresholds, here what is farthest beyond one
comes first.

Axes: M members of an ensemble, X files and members, S steps of a solution, N solutions, K centres, P points of a
profile.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np

from stepkd.data.config import parse_spec
from stepkd.data.load import load_rows
from stepkd.data.rows import check_unique_ids
from stepkd.errors import DataError, check_bounds
from stepkd.labels.convert import Converted, ConverterConfig, solution_text
from stepkd.labels.labellers import Row, outcome_of
from stepkd.scorers.scorer import problem_key
from stepkd.statistics import FloatArray
from stepkd.steps.labels import passes

SPREAD, DOUBT = 0.01, 0.1
"""ActPRM's thresholds, as in its code: of the standard deviation among members, and of 1 - confidence."""
INCORRECT_SHARE = 0.8
"""Share of a selection whose answers are incorrect in Let's Verify; the rest is whatever else convinces most."""
POINTS = 16
"""Points that a solution's profile of step scores is read at, whatever its number of steps."""


class Candidate(NamedTuple):
    """A solution of the pool."""

    row: Row
    means_S: FloatArray
    """Step scores, in [0, 1], mean over the files; steps that a member did not score are left out."""
    deviations_S: FloatArray
    """Standard deviation among all members, over n - 1; 0 for one alone."""
    score: float
    """Of the whole solution, mean over the files; NaN: one did not score it."""


@dataclass(frozen=True, kw_only=True)
class Selected(ConverterConfig):
    """The rows of a scored pool (results.jsonl of stepkd score) that are most worth labelling, the most so first."""

    count: int
    """Rows to select, at least 1; a pool that holds fewer is taken whole."""
    by: Literal["k_center", "uncertainty", "convincing"]
    """What makes a row worth it: step scores unlike those of all rows selected before (k_center, PCoreSet), uncertainty
    about the steps up to the first one that is called incorrect (ActPRM), or an incorrect answer with a high score, for
    80% of the rows, and a high score for the rest, problems taking turns (convincing, Let's Verify)."""
    members: tuple[str, ...] = ()
    """Files of the same rows as scored by other runs, which make an ensemble with the first: their scores are averaged,
    and uncertainty also reads how they differ; none by default. Of a reward model with ``head.members`` above 1 every
    head is a member: one file of its scores is enough."""
    labelled: str | None = None
    """Rows that have labels already, scored as the pool was, a file: none of them is selected, and k_center keeps away
    from them, too; null where nothing is labelled yet."""

    def __post_init__(self) -> None:
        check_bounds("", self, count="[1, inf)")

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`~stepkd.labels.convert.ConverterConfig`."""
        counts = Counter[str]()
        others = [{str(row["id"]): row for row in load_rows(parse_spec(word))} for word in self.members]
        known = [] if self.labelled is None else load_rows(parse_spec(self.labelled))
        centres = [each for row in known if (each := _candidate([row], f"{self.labelled}: ")).means_S.size]
        if known and len(scorers := {_scorer(row) for row in (*rows, *known)} - {None}) > 1:
            raise DataError(
                f"pool and labelled rows have {len(scorers)} scorers: score all with one", path=self.labelled
            )
        done = {str(row["id"]) for row in known}
        check_unique_ids(rows, path="the pool")
        candidates = []
        for row in rows:
            each = _candidate(
                [row, *(_same(row, other, name) for name, other in zip(self.members, others, strict=True))]
            )
            if str(row["id"]) in done:
                counts["labelled_already"] += 1
            elif not each.means_S.size or (self.by == "convincing" and np.isnan(each.score)):
                counts["unscored"] += 1
            elif self.by == "convincing" and outcome_of(row) is None:
                counts["ungraded"] += 1
            else:
                candidates.append(each)
        if self.by == "k_center":
            profiles_NP = [_profile(each) for each in candidates]
            order = k_centres(profiles_NP, [_profile(each) for each in centres], self.count)
        elif self.by == "uncertainty":
            doubts = [uncertainty(each.means_S, each.deviations_S) for each in candidates]
            counts["uncertain"] = sum(doubt > 1 for doubt in doubts)
            order = sorted(range(len(doubts)), key=lambda i: -doubts[i])
        else:
            order = _convincing(candidates, self.count)
        kept = [dict(candidates[i].row) for i in order[: self.count]]
        counts["less_worth"], counts["short_of_count"] = len(candidates) - len(kept), self.count - len(kept)
        return Converted(kept, {"rows": len(kept)} | {name: count for name, count in counts.items() if count})


def _same(row: Row, others: Mapping[str, Row], name: str) -> Row:
    """The row of another file that holds the same solution.

    Raises:
        DataError: there is none.
    """
    other = others.get(str(row["id"]))
    if other is None or solution_text(row) != solution_text(other):
        what = "lacks" if other is None else "holds another solution under the id of"
        raise DataError(f"{what} row {row['id']!r} of the pool: score the same rows with every member", path=name)
    return other


def _scorer(row: Row) -> str | None:
    """What scored a row's steps; None: it does not say."""
    return json.dumps({**row["scorer"], "reduction": None}, sort_keys=True) if row.get("scorer") else None


def _candidate(versions: Sequence[Row], where: str = "") -> Candidate:
    """A row as scored by every member; messages name it behind `where`.

    Raises:
        DataError: a row without scores, with scores that are no probabilities, or scored step by step otherwise.
    """
    name = where + str(versions[0].get("id", "?"))
    if any(row.get("step_scores") is None for row in versions):
        raise DataError("no step scores: score it first (stepkd score)", path=name, column="step_scores")
    files = [list(row["step_scores"]) for row in versions]
    heads = [each for row in versions for each in (row.get("score_facts") or {}).get("members", [row["step_scores"]])]
    scores = files + heads
    if len(lengths := sorted({*map(len, scores)})) > 1:
        raise DataError(f"members score {lengths} steps: cut alike", path=name, column="step_scores")
    if any(value is not None and not 0 <= value <= 1 for each in scores for value in each):
        raise DataError(f"step scores are numbers in [0, 1] or null, found {scores}", path=name, column="step_scores")
    scores_XS = np.array([[np.nan if value is None else value for value in each] for each in scores], dtype=np.float64)
    scores_XS = scores_XS[:, ~np.isnan(scores_XS).any(0)]
    means_S, members_MS = scores_XS[: len(files)].mean(0), scores_XS[len(files) :]
    deviations_S = members_MS.std(0, ddof=1) if len(heads) > 1 else np.zeros_like(means_S)
    wholes = [np.nan if row.get("score") is None else float(row["score"]) for row in versions]
    return Candidate(versions[0], means_S, deviations_S, float(np.mean(wholes)))


def _profile(candidate: Candidate) -> FloatArray:
    """(P,) mean step scores at even distances from the first step to the last, by linear interpolation."""
    means_S = candidate.means_S
    profile: FloatArray = np.interp(np.linspace(0, 1, POINTS), np.linspace(0, 1, len(means_S)), means_S)
    return profile


def k_centres(points_NP: Sequence[FloatArray], centres_KP: Sequence[FloatArray], count: int) -> list[int]:
    """Choose points one by one, each the farthest from its nearest centre or point chosen before (Euclidean).

    Args:
        points_NP: to choose from; of equal ones the first is taken.
        centres_KP: what is covered already; without any, the first choice is the point nearest to the mean of all
            (PCoreSet always has labelled ones).
        count: how many; all where there are fewer.

    Returns:
        Their numbers, in the order of choice.

    Source: PCoreSet (arXiv 2506.00910), after the greedy k-centre of Sener and Savarese (arXiv 1708.00489).
    """
    if not len(points_NP):
        return []
    points, chosen = np.array(points_NP), list[int]()
    distance_N = np.full(len(points), np.inf)
    for centre in centres_KP:
        distance_N = np.minimum(distance_N, np.linalg.norm(points - centre, axis=1))
    while len(chosen) < min(count, len(points)):
        first = not chosen and not len(centres_KP)
        next_one = np.linalg.norm(points - points.mean(0), axis=1).argmin() if first else distance_N.argmax()
        chosen.append(int(next_one))
        distance_N = np.minimum(distance_N, np.linalg.norm(points - points[next_one], axis=1))
        distance_N[chosen] = -1.0  # also where all that is left equals what is chosen
    return chosen


def uncertainty(means_S: FloatArray, deviations_S: FloatArray) -> float:
    """How far a solution's step scores are beyond ActPRM's thresholds; it labels those above 1.

    Args:
        means_S: probabilities that a step is correct, in [0, 1], mean over the files; at least one.
        deviations_S: their standard deviations among the members, at least 0.

    Returns:
        The greatest, over the steps up to the first whose mean calls it incorrect, of the deviation over 0.01 and of
        1 - max(mean, 1 - mean) over 0.1.

    Source: ActPRM (arXiv 2504.10559); the quotients, in place of two comparisons, are ours.
    """
    incorrect = [not passes(float(mean)) for mean in means_S]
    judged = [*incorrect, True].index(True) + 1
    return float(np.maximum(deviations_S / SPREAD, np.minimum(means_S, 1 - means_S) / DOUBT)[:judged].max())


def _convincing(candidates: Sequence[Candidate], count: int) -> list[int]:
    """Those with incorrect answers and high scores, then any with high scores."""
    incorrect = [i for i, each in enumerate(candidates) if outcome_of(each.row) is False]
    first = _taking_turns(candidates, incorrect)[: round(INCORRECT_SHARE * count)]
    taken = set(first)
    return first + _taking_turns(candidates, [i for i in range(len(candidates)) if i not in taken])


def _taking_turns(candidates: Sequence[Candidate], numbers: Sequence[int]) -> list[int]:
    """The highest score of every problem, then every second highest, and so on; Let's Verify takes as many of each."""
    numbers, turn, seen = sorted(numbers, key=lambda i: -candidates[i].score), dict[int, int](), Counter[str]()
    for i in numbers:
        turn[i] = seen[problem_key(candidates[i].row)]
        seen[problem_key(candidates[i].row)] += 1
    return sorted(numbers, key=lambda i: turn[i])


@dataclass(frozen=True, kw_only=True)
class WithinBudget(ConverterConfig):
    """The first labelled rows, as many as labels for so many generated tokens pay for: labellings can be compared at
    equal cost. What was spent on solutions that got no label is in the job's summary alone (``labelling``: its
    ``generated_tokens`` less those of the rows)."""

    tokens: int
    """Most tokens generated for the labels of all rows (generated_tokens of their label_facts), at least 0."""

    def __post_init__(self) -> None:
        check_bounds("", self, tokens="[0, inf)")

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`~stepkd.labels.convert.ConverterConfig`."""
        costs = [*accumulate(row_cost(row) for row in rows)]
        kept = bisect_right(costs, self.tokens)
        if rows and not kept:
            raise DataError(
                f"the labels of the first row ({rows[0].get('id', '?')}) cost {costs[0]} tokens: tokens={self.tokens} "
                "has to be at least that"
            )
        counts = {
            "rows": kept,
            "generated_tokens": costs[kept - 1] if kept else 0,
            "beyond_the_budget": len(rows) - kept,
        }
        return Converted([dict(row) for row in rows[:kept]], counts)


def row_cost(row: Row) -> int:
    """Tokens generated for a row's labels: of continuations, or of critiques; else 0."""
    facts: dict[str, Any] = row.get("label_facts") or {}
    return int(facts.get("generated_tokens", 0))
