"""What the rows of a search say: accuracy and cost of every method, and paired differences at equal cost.

Methods that draw different numbers of tokens are compared with best-of-N *at the same token budget*. The pool holds N
samples of every problem; choosing among k of them costs k times the mean length of a sample, and is worth the
expectation over all subsets of k. At a method's mean generated tokens per problem lies a k between two whole numbers,
where each problem's expectation is interpolated linearly. The k counts as known: its own chance is not in the interval.
Differences that are the same for every problem have no interval: resampling them would say that they are certain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack, get_args

import numpy as np

from stepkd.errors import DataError
from stepkd.evaluation.best_of_n import MAJORITY, ProblemSamples, described, difference, expected_accuracies
from stepkd.scorers.scorer import Reduction
from stepkd.statistics import FloatArray, Resampling, cluster_bootstrap, mean_interval, ratio_of_sums

POOL, DIFFICULTY = "pool", "difficulty"
"""Rows of samples that are no method's answer."""
GREEDY = "greedy"
"""The method that the others are compared with."""
BINS = ("0", "0 to 1/3", "1/3 to 2/3", "2/3 to 1", "1")
"""Bins of the pass rate, the most difficult problems first; a bound belongs to the bin below it, 1 is a bin alone."""

Row = Mapping[str, Any]


def budget_of(generated: FloatArray, pool: FloatArray, size: int) -> dict[str, Any]:
    """The number of samples at a method's token budget.

    Args:
        generated: (problems,) tokens that the method drew, whole numbers.
        pool: (problems,) tokens of all samples in the pool, whole numbers.
        size: samples of a problem in the pool, at least 1.

    Returns:
        ``samples``: mean generated tokens of the method over those of one sample; ``used``: the number that it is
        compared at, the same or the nearest that there is; ``clamped``: whether they differ, because the method draws
        more than the whole pool, or less than one sample.

    Raises:
        DataError: no sample has a token.
    """
    if not (drawn := pool.sum()):
        raise DataError("the samples of all problems are empty: the model ends every solution at once", column="tokens")
    samples = float(size * generated.sum() / drawn)  # in this order exact for what draws as many as the whole pool
    used = min(max(samples, 1.0), float(size))
    return {"samples": samples, "used": used, "clamped": used != samples}


def at_budget(values: FloatArray, samples: float) -> FloatArray:
    """A curve between whole numbers of samples, problem by problem.

    Args:
        values: (problems, 1 or 2) expected accuracies at the whole numbers below and above ``samples``, one where it is
            whole.
        samples: at least 1.

    Returns:
        (problems,) linear interpolation.
    """
    below, above = values[:, 0], values[:, -1]
    return np.asarray(below + samples % 1 * (above - below))


def difficulty_bin(pass_rate: float) -> int:
    """Number of the bin (:data:`BINS`) of a pass rate in [0, 1]."""
    return 4 if pass_rate == 1 else math.ceil(3 * pass_rate - 1e-9)


def summarise_search(
    rows: Sequence[Row],
    methods: Sequence[str],
    ks: Sequence[int],
    *,
    reduction: Reduction | None = None,
    **settings: Unpack[Resampling],
) -> dict[str, Any]:
    """Metrics of a search from its rows (layout in :mod:`stepkd.evaluation.search`).

    Args:
        rows: all rows of all methods, in any order.
        methods: names of the methods, ``greedy`` among them.
        ks: numbers of samples at which best-of-N is shown.
        reduction: from step scores to one where best-of-N is compared with the methods; None: there is no scorer.
        **settings: see :class:`~stepkd.statistics.Resampling`.

    Returns:
        JSON values; an interval is ``{"value", "low", "high", "method"}``. ``problems``; ``seed`` and ``n_resamples``
        where given; and

        - ``methods``: name -> ``accuracy``; ``generated_tokens``, ``scored_tokens``, ``scorer_calls`` (means per
          problem); ``accuracy_per_1000_tokens`` (correct answers per 1,000 generated tokens); ``cut_off``, ``unparsed``
          (answers), ``unscored`` (solutions), ``no_room`` (prompts about drafts), counts; where there is that,
          ``drafted`` (tokens of a small model) and ``passes`` (of the policy), means per problem; ``minus_greedy``
          (paired difference of accuracies; null for greedy); ``budget`` (``samples``, ``used``, ``clamped``) and
          ``minus_best_of_n``: paired difference to choosing among ``used`` samples by ``majority``, and with a scorer
          by ``max`` and ``weighted``;
          ``by_difficulty``: bin -> accuracy or null.
        - ``pool``: ``samples``, ``generated_tokens`` of one sample, ``unscored``, ``reduction``, ``ks``, ``curves``
          (name -> interval at each k: ``pass``, ``majority``, and with a scorer every reduction by itself and with
          ``_vote``, the weighted vote), ``peaks`` (name -> ``k`` with the highest accuracy and the ``fall`` from there
          to the largest k).
        - ``difficulty``: ``samples``, ``pass_rate``, ``bins`` (bin -> problems); null without such samples.

    Raises:
        DataError: a method without a row for a problem that others have.
    """
    groups = {name: _sorted(rows, name) for name in (*methods, POOL, DIFFICULTY)}
    numbers = [row["index"] for row in groups[POOL]]
    for name in methods:
        if [row["index"] for row in groups[name]] != numbers:
            raise DataError(f"the rows of {name!r} are not of the problems of the pool", column="method")
    pool = _Pool(groups[POOL], reduction, settings.get("seed", 0))
    rates = [float(np.mean([_is_correct(sample) for sample in row["samples"]])) for row in groups[DIFFICULTY]]
    bins: dict[str, list[int]] = {name: [] for name in BINS} if rates else {}
    for number, rate in enumerate(rates):
        bins[BINS[difficulty_bin(rate)]].append(number)
    greedy, summaries = _column(groups[GREEDY], "correct"), {}
    for name in methods:
        correct, (budget, others) = _column(groups[name], "correct"), pool.beside(groups[name])
        by_bin = {
            each: mean_interval(correct[own], **settings).to_dict() if own else None for each, own in bins.items()
        }
        summaries[name] = _method(groups[name], settings) | {
            "minus_greedy": None if name == GREEDY else difference(correct - greedy, **settings).to_dict(),
            "budget": budget,
            "minus_best_of_n": {
                vote: difference(correct - values, **settings).to_dict() for vote, values in others.items()
            },
            "by_difficulty": by_bin,
        }
    difficulty = {
        "samples": len(groups[DIFFICULTY][0]["samples"]) if rates else 0,
        "pass_rate": mean_interval(rates, **settings).to_dict() if rates else None,
        "bins": {name: len(own) for name, own in bins.items()},
    }
    return {
        "problems": len(numbers),
        **settings,
        "methods": summaries,
        "pool": pool.summary(ks, settings),
        "difficulty": difficulty if rates else None,
    }


def search_columns(
    rows: Sequence[Row], methods: Sequence[str], *, reduction: Reduction | None = None, seed: int = 0
) -> dict[str, Any]:
    """Numbers of a search in the order of its problems.

    Args:
        rows, methods, reduction: as for :func:`summarise_search`.
        seed: seed of the drawn subsets of large weighted votes.

    Returns:
        For every method ``NAME`` (1 where its answer is correct), ``NAME.tokens``, ``NAME.scored_tokens``,
        ``NAME.scorer_calls``; ``NAME.over_majority``, and with a scorer ``NAME.over_max`` and ``NAME.over_weighted``:
        its gain over best-of-N at its mean generated tokens; one entry per problem each. Where it draws more than the
        whole pool the gain is undefined, as ``[0, 0]``: best-of-N at fewer tokens is no comparison.
    """
    pool, columns = _Pool(_sorted(rows, POOL), reduction, seed), dict[str, Any]()
    for name in methods:
        own = _sorted(rows, name)
        correct, (budget, others) = _column(own, "correct"), pool.beside(own)
        columns |= {name: correct.tolist(), f"{name}.tokens": _column(own, "generated_tokens").tolist()}
        columns |= {f"{name}.{cost}": _column(own, cost).tolist() for cost in ("scored_tokens", "scorer_calls")}
        beyond = [[0.0, 0.0]] * len(own) if budget["samples"] > budget["used"] else None
        columns |= {f"{name}.over_{vote}": beyond or (correct - values).tolist() for vote, values in others.items()}
    return columns


def _sorted(rows: Sequence[Row], method: str) -> list[Row]:
    return sorted((row for row in rows if row["method"] == method), key=lambda row: row["index"])


def _is_correct(sample: Row) -> bool:
    return bool(sample["verdict"] == "correct")


def _column(rows: Sequence[Row], name: str) -> FloatArray:
    """A number of each row: whether its answer is ``correct``, or a cost by its name in the summary."""
    if name == "correct":
        return np.array([float(_is_correct(row["samples"][0])) for row in rows])
    kind = {"generated_tokens": "generated", "scored_tokens": "scored"}.get(name)
    return np.array([float(row["tokens"][kind] if kind else row.get(name, 0)) for row in rows])


def _method(rows: Sequence[Row], settings: Resampling) -> dict[str, Any]:
    correct, generated = _column(rows, "correct"), _column(rows, "generated_tokens")
    answers = [row["samples"][0] for row in rows]
    rate = cluster_bootstrap(np.stack([1000 * correct, generated], axis=1), ratio_of_sums, **settings)
    costs = {name: _column(rows, name) for name in ("scorer_calls", "drafted", "passes")}
    costs = {"generated_tokens": generated, "scored_tokens": _column(rows, "scored_tokens")} | {
        name: values for name, values in costs.items() if name == "scorer_calls" or values.any()
    }
    return {
        "accuracy": mean_interval(correct, **settings).to_dict(),
        **{name: cluster_bootstrap(values, **settings).to_dict() for name, values in costs.items()},
        "accuracy_per_1000_tokens": rate.to_dict(),
        "cut_off": sum(answer["finish"] == "length" for answer in answers),
        "unparsed": sum(answer["verdict"] == "unparsed" for answer in answers),
        "unscored": sum(row["unscored"] for row in rows),
        "no_room": sum(row.get("no_room", 0) for row in rows),
    }


class _Pool:
    """The shared samples, and what choosing among them is worth."""

    def __init__(self, rows: Sequence[Row], reduction: Reduction | None, seed: int) -> None:
        self.rows, self.reduction, self.seed = rows, reduction, seed
        self.problems = [
            ProblemSamples(
                str(row["id"]),
                [_is_correct(sample) for sample in row["samples"]],
                [sample["vote"] for sample in row["samples"]],
            )
            for row in rows
        ]
        self.size = len(rows[0]["samples"])

    def curves(self, ks: Sequence[int], scores: Mapping[str, Reduction]) -> dict[str, FloatArray]:
        """Expected accuracy of every problem, by votes and by reductions of the scores."""
        by = {
            name: [[sample["scores"][each] for sample in row["samples"]] for row in self.rows]
            for name, each in scores.items()
        }
        return expected_accuracies(self.problems, ks, by, seed=self.seed)

    def beside(self, rows: Sequence[Row]) -> tuple[dict[str, Any], dict[str, FloatArray]]:
        """How many samples cost what a method costs, and what best-of-N by each vote is worth there in every
        problem."""
        budget = budget_of(_column(rows, "generated_tokens"), _column(self.rows, "generated_tokens"), self.size)
        ks = sorted({math.floor(budget["used"]), math.ceil(budget["used"])})
        curves = self.curves(ks, {"max": self.reduction} if self.reduction else {})
        names = {"majority": MAJORITY} | ({"max": "max", "weighted": "max_vote"} if self.reduction else {})
        return budget, {vote: at_budget(curves[name], budget["used"]) for vote, name in names.items()}

    def summary(self, ks: Sequence[int], settings: Resampling) -> dict[str, Any]:
        """What the summary says of it."""
        grid = sorted(set(ks))
        curves = self.curves(grid, {each: each for each in get_args(Reduction)} if self.reduction else {})
        shown, peaks = described(curves, grid, **settings)
        drawn = _column(self.rows, "generated_tokens") / self.size
        return {
            "samples": self.size,
            "generated_tokens": cluster_bootstrap(drawn, **settings).to_dict(),
            "unscored": sum(row["unscored"] for row in self.rows),
            "reduction": self.reduction,
            "ks": grid,
            "curves": {name: [each.to_dict() for each in curve] for name, curve in shown.items()},
            "peaks": {name: each.to_dict() for name, each in peaks.items()},
        }
