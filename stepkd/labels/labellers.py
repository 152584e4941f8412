"""Labellers by their settings: tokenised solutions in, one label per step out.

Labels come from continuations of every step's prefix (:mod:`stepkd.labels.monte_carlo`), from the tiny world's exact
checkers (free, and true), from the final answer alone (outcome supervision), or from what scores steps: a prompted
judge, a trained process reward model, the sums of a step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, get_args

from stepkd.errors import ConfigError, DataError, check_choice
from stepkd.labels.step_labels import Labeller, Reduce, Row, Solution, StepLabels
from stepkd.sampling.sampler import SamplingConfig
from stepkd.scorers.load import load_scorer
from stepkd.scorers.scorer import ScorerConfig, Solutions, StepScorer
from stepkd.steps.labels import check_threshold, passes
from stepkd.tasks.base import Given
from stepkd.tasks.rows import check_row


def check_noise(sampling: SamplingConfig, what: str) -> None:
    """Refuse several greedy samples of one prefix.

    Raises:
        ConfigError: there is more than one, at temperature 0.
    """
    if sampling.n > 1 and sampling.temperature == 0:
        raise ConfigError(f"{sampling.n} {what} at temperature 0 would all be the same: set a temperature, or n to 1")


def check_has(row: Row, place: str, names: Sequence[str], lacks: str) -> None:
    """Refuse a row in which all of these columns are missing or null.

    Raises:
        DataError: naming the row, with what it lacks and the remedy.
    """
    if all(row.get(name) is None for name in names):
        raise DataError(f"row {str(row['id'])!r} {lacks}", path=place, column=names[0])


def check_task_row(row: Row, place: str, remedy: str) -> None:
    """Refuse a row that no task of the tiny world generated; see :func:`check_has`."""
    lacks = "has no 'task' and 'meta': only rows of the tiny world (source 'task') have an exact checker"
    check_has(row, place, ["task"], f"{lacks}; {remedy}")


class LabellerConfig(ABC):
    """Who labels the steps."""

    continues = False
    """Whether it continues solutions with the policy."""

    @abstractmethod
    def build(self, bench: Any, sampler: Any) -> Labeller:
        """The labeller.

        Args:
            bench: what the job works with (:class:`~stepkd.labels.workbench.Workbench`).
            sampler: draws from its policy.
        """

    def check(self, row: Row, place: str) -> None:  # noqa: B027
        """Refuse a row that the labeller has no use for, before any work is done."""


@dataclass(frozen=True, kw_only=True)
class MonteCarlo(LabellerConfig):
    """How often continuations of a step's prefix reach the correct answer (Math-Shepherd, arXiv 2312.08935)."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(n=8))
    """How every step's prefix is continued, 8 times by default."""
    reduce: Reduce = "any"
    """From shares of successes to labels: correct where any succeeds (the default, Math-Shepherd's hard estimate), the
    mean itself (its soft estimate), correct up to the first_error and nothing behind it (Qwen2.5-Math-PRM, arXiv
    2501.07301), or propagate, correct where any of this step or of a later one succeeds (GLoRe, arXiv 2402.10963)."""
    continues = True

    def __post_init__(self) -> None:
        check_choice("reduce", self.reduce, get_args(Reduce))
        check_noise(self.sampling, "continuations of a step")

    def build(self, bench: Any, sampler: Any) -> Labeller:
        """A :class:`~stepkd.labels.monte_carlo.MonteCarloLabeller`."""
        from stepkd.labels.monte_carlo import MonteCarloLabeller

        return MonteCarloLabeller(sampler, bench.policy, bench.grader, bench.limited(self.sampling), reduce=self.reduce)

    def check(self, row: Row, place: str) -> None:
        """It needs an answer."""
        why = "Monte-Carlo labels compare continuations with it"
        check_has(row, place, ["answer"], f"has no 'answer', and {why}: add the column, or use another labeller")


@dataclass(frozen=True, kw_only=True)
class TaskChecker(LabellerConfig):
    """The exact checker of the tiny world: true labels, for rows of source ``task``."""

    given: Given = "truth"
    """What a step is judged by: what the problem demands at its place (truth), or what the steps before it claim."""

    def __post_init__(self) -> None:
        check_choice("given", self.given, get_args(Given))

    def build(self, bench: Any, sampler: Any) -> Labeller:
        """Itself."""
        return self

    def check(self, row: Row, place: str) -> None:
        """It needs the task."""
        check_task_row(row, place, "use another labeller")

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """See :class:`Labeller`; labels are true or false."""
        return [StepLabels(tuple(check_row(each.row, each.steps, given=self.given))) for each in solutions]

    def provenance(self) -> dict[str, Any]:
        """What the labels came from."""
        return {"labeller": "checker", "given": self.given}


@dataclass(frozen=True)
class Sums(LabellerConfig):
    """The sums that a step writes out, done again; a step without one has no label."""

    def build(self, bench: Any, sampler: Any) -> Labeller:
        """A :class:`ScorerLabeller`."""
        from stepkd.scorers.rules import Arithmetic

        return ScorerLabeller(Arithmetic(unchecked=float("nan")), name="arithmetic")


@dataclass(frozen=True, kw_only=True)
class Outcome(LabellerConfig):
    """Whether the final answer is correct, as an outcome reward model learns it."""

    scope: Literal["last", "all"] = "last"
    """Which steps the outcome labels: the last one only, or all, the crudest guess at a process label."""

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, ("last", "all"))

    def build(self, bench: Any, sampler: Any) -> Labeller:
        """Itself."""
        return self

    def check(self, row: Row, place: str) -> None:
        """It needs an answer, or an outcome."""
        lacks = "has neither an 'answer' nor a stated outcome: nothing says whether its answer is correct"
        check_has(row, place, ["answer", "correct", "outcome"], lacks)

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """See :class:`Labeller`; labels are true or false."""
        found = []
        for each in solutions:
            assert each.correct is not None, "a row that nothing could grade was refused at first"
            before = each.correct if self.scope == "all" else None
            found.append(StepLabels((*[before] * (len(each.steps) - 1), each.correct)))
        return found

    def provenance(self) -> dict[str, Any]:
        """What the labels came from."""
        return {"labeller": "outcome", "scope": self.scope}


@dataclass(frozen=True, kw_only=True)
class Scored(LabellerConfig):
    """What a step scorer says: a prompted judge, a process reward model trained here or published."""

    scorer: ScorerConfig | str
    """What scores the steps, a class of settings such as Judge or PRM, or a word: judge:MODEL, or a path or hub id
    alone, whose kind is told from what is there."""
    threshold: float | None = 0.5
    """Score from which on a step is correct, in (0, 1); null keeps the scores as soft labels."""

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_threshold(self.threshold)

    def build(self, bench: Any, sampler: Any) -> Labeller:
        """A :class:`ScorerLabeller`."""
        scorer = load_scorer(self.scorer, device=bench.config.device, max_rows=bench.config.max_rows)
        return ScorerLabeller(scorer, threshold=self.threshold)


class ScorerLabeller:
    """Label by the scores of a :class:`~stepkd.scorers.scorer.StepScorer`.

    Args:
        scorer: what scores the steps.
        threshold: a step is correct when its score is not below it, in (0, 1); None: the scores themselves are the
            labels.
        name: name of the labeller in the provenance.
    """

    def __init__(self, scorer: StepScorer, *, threshold: float | None = 0.5, name: str = "scorer") -> None:
        self.scorer, self.threshold, self.name = scorer, threshold, name

    def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
        """See :class:`~stepkd.labels.step_labels.Labeller`.

        Neighbouring solutions of one problem are scored together, so that the scorer may read their prompt once. A
        step without a score (cut off by the scorer's context, or not the last one of an outcome scorer) has no label.
        The scores are kept in ``facts``.

        Raises:
            DataError: the scorer's answer does not fit the solutions, or a score is outside [0, 1].
        """
        problems = [list(group) for _, group in groupby(solutions, key=lambda solution: solution.row)]
        scored = self.scorer.score([Solutions(group[0].row, [list(s.steps) for s in group]) for group in problems])
        if [len(scores) for scores in scored] != [len(group) for group in problems]:
            raise DataError("the scorer gave another number of solutions than it was asked for")
        return [
            self._labels(solution, scores)
            for group, group_scores in zip(problems, scored, strict=True)
            for solution, scores in zip(group, group_scores, strict=True)
        ]

    def _labels(self, solution: Solution, scores: Sequence[float]) -> StepLabels:
        if len(scores) != len(solution.steps):
            raise DataError(f"the scorer gave {len(scores)} scores for {len(solution.steps)} steps", path=solution.id)
        invalid = [score for score in scores if not (math.isnan(score) or 0 <= score <= 1)]
        if invalid:
            raise DataError(f"the scorer gave {invalid[0]}: scores lie in [0, 1]", path=solution.id)
        known = tuple(None if math.isnan(score) else float(score) for score in scores)
        at = self.threshold
        # No values: a scorer's guess of the future is no continuation's success.
        labels = known if at is None else tuple(passes(score, at) for score in known)
        return StepLabels(labels, facts={"scores": list(known)})

    def provenance(self) -> dict[str, Any]:
        """What the labels came from."""
        return {
            "labeller": self.name,
            "threshold": self.threshold,
            "meaning": self.scorer.meaning,
            "scorer": self.scorer.provenance(),
        }
