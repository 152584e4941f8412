"""Feedback and pairs from labelled rows, for Step-KTO, KTO and DPO; and what every conversion is.

Binary keeps the rows (and their sampled ids) and casts their step labels; Unpaired makes TRL's unpaired
preference type, a completion with one label; Preference puts a correct solution over an incorrect one of the same
problem. What a row says is read in one place, :func:`completion_of`.

Sources: Step-KTO (arXiv 2501.10799) takes a binary label per step and per answer; KTO (arXiv 2402.01306); the outcome
pairs of DPO (arXiv 2305.18290) on self-generated solutions, as in iterative reasoning preference optimisation
(arXiv 2404.19733).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from stepkd.data.completion import Completion, Finish
from stepkd.data.rows import PREFERENCE, ROLLOUT, STEPWISE, UNPAIRED, Contract, validate
from stepkd.data.step_labels import write_stepwise
from stepkd.errors import DataError, check_bounds, check_choice
from stepkd.labels.quality import label_column
from stepkd.labels.step_labels import Row
from stepkd.randomness import generator
from stepkd.runs.files import write_jsonl
from stepkd.scorers.scorer import problem_key
from stepkd.steps.format import written_steps
from stepkd.steps.labels import Neutral, check_threshold, label_kind, tally, verdicts

T = TypeVar("T")
PURPOSE = "preference_pairs"
NO_IDS = np.empty(0, np.int64)
PROBLEM_COLUMNS = ("answer", "task", "meta")
"""Columns of a problem that labelled rows keep, so that they can be checked and labelled again."""


@dataclass(frozen=True)
class Converted:
    """Rows of the new kind."""

    rows: list[dict[str, Any]]
    """At least one, else the caller refuses."""
    counts: dict[str, int]
    """What was kept, changed and left out, by reason."""


class ConverterConfig(ABC):
    """A kind of rows that labelled rows are converted to."""

    @abstractmethod
    def convert(self, rows: Sequence[Row]) -> Converted:
        """Labelled rows (rollout or stepwise contract) to new rows."""

    def write(self, rows: Iterable[Row], path: str | Path) -> int:
        """Write the new rows; returns their number."""
        return write_stepwise(rows, path)


@dataclass(frozen=True, kw_only=True)
class Cast(ConverterConfig):
    """What conversions read step labels by that know only correct and incorrect."""

    soft: bool = False
    """Whether the estimated values are taken in place of the labels."""
    neutral: Neutral = "right"
    """What a rating of 0 becomes: right, wrong, or mask, which leaves the step without a label."""
    threshold: float = 0.5
    """Chance from which on a soft label says correct, in (0, 1)."""

    def __post_init__(self) -> None:
        check_choice("neutral", self.neutral, get_args(Neutral))
        check_threshold(self.threshold)

    def marks(self, each: Completion) -> list[bool | None] | None:
        """What the step labels of a solution's row say; None where it has none.

        Raises:
            DataError: another number of labels than steps, or labels that are none.
        """
        row = each.row
        column = "step_values" if self.soft else label_column(row)
        labels = row.get(column)
        if labels is None or all(label is None for label in labels):
            return None
        steps = row["step_ends"] if len(each.token_ids) else row["completions"]
        if len(labels) != len(steps):
            raise DataError(f"has {len(labels)} labels for {len(steps)} steps", path=each.id)
        if self.soft:  # a chance written as 0 or 1 would read as a rating
            labels = [None if label is None else float(label) for label in labels]
        try:
            return verdicts(labels, neutral=self.neutral, threshold=self.threshold)
        except DataError as error:
            raise DataError(str(error), path=each.id, column=column) from error


def completion_of(row: Row) -> Completion:
    """What a rollout row or a stepwise row says of its solution as a whole; no step labels are needed.

    Raises:
        DataError: another kind of row.
    """
    name = str(row.get("id", "?"))
    if "completions" in row:
        return Completion(NO_IDS, NO_IDS, text="".join(written_steps(row["completions"])), id=name, row=row)
    if "token_ids" not in row or "completion" not in row:
        raise DataError("neither a rollout (completion, token_ids) nor a stepwise row (completions)", path=name)
    finish: Finish = "length" if row.get("finish") == "length" else "stop"
    return Completion(NO_IDS, np.asarray(row["token_ids"]), finish=finish, text=row["completion"], id=name, row=row)


def outcome_of(row: Row) -> bool | None:
    """Whether the answer of a rollout row or a stepwise row is correct; None: not graded."""
    return row.get("correct", row.get("outcome"))


def drop_repeated(solutions: Sequence[Completion], *, by_outcome: bool = False) -> tuple[list[Completion], int, int]:
    """Keep the first of several solutions of a problem with the same text; a cut-off one is not a finished one.

    Args:
        solutions: of any number of problems.
        by_outcome: keep one of each outcome.

    Returns:
        Those kept, in order; how many were dropped; and how many problems had several solutions, all equal.
    """
    first: dict[tuple[str, str, str, bool | None], Completion] = {}
    for each in solutions:
        key = (problem_key(each.row), each.text, each.finish, outcome_of(each.row) if by_outcome else None)
        first.setdefault(key, each)
    kept = list(first.values())
    before, after = (Counter(problem_key(each.row) for each in group) for group in (solutions, kept))
    identical = sum(count > 1 and after[problem] == 1 for problem, count in before.items())
    return kept, len(solutions) - len(kept), identical


def write_checked(rows: Iterable[Row], path: str | Path, *contracts: Contract) -> int:
    """Write rows that follow one of the contracts (the first whose required columns a row has)."""

    def checked(row: Row) -> dict[str, Any]:
        contract = next((each for each in contracts if set(each.required) <= set(row)), contracts[0])
        return validate(dict(row), contract, path=path, extra="keep")

    return write_jsonl(path, map(checked, rows))


# ---- feedback ------------------------------------------------------------------------------------------------------

_BINARY_COUNTS = (
    *("right_steps", "wrong_steps", "neutral_steps", "unlabelled_steps", "right_answers_with_a_wrong_step"),
    *("rows_without_labels", "rows_without_outcome", "duplicates", "problems_all_identical"),
)
_UNPAIRED_COUNTS = (
    *("right", "wrong", "cut_off", "rows_without_outcome", "empty_completions", "duplicates", "problems_all_identical"),
)


@dataclass(frozen=True, kw_only=True)
class Binary(Cast):
    """The same rows, with their sampled ids, and correct or incorrect for every step (for Step-KTO)."""

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        counts: Counter[str] = Counter()
        kept, counts["duplicates"], counts["problems_all_identical"] = drop_repeated(list(map(completion_of, rows)))
        done = []
        for each in kept:
            marks, outcome = self.marks(each), outcome_of(each.row)
            if marks is None or all(mark is None for mark in marks):
                counts["rows_without_labels"] += 1
                continue
            labels = each.row["step_values" if self.soft else label_column(each.row)]
            counts["right_steps"] += marks.count(True)
            counts["wrong_steps"] += marks.count(False)
            counts["unlabelled_steps"] += list(labels).count(None)
            counts["neutral_steps"] += list(labels).count(0) if not self.soft and label_kind(labels) == "rating" else 0
            counts["rows_without_outcome"] += outcome is None
            counts["right_answers_with_a_wrong_step"] += tally([outcome], [marks]).flawed
            done.append(dict(each.row) | {"step_labels" if len(each.token_ids) else "labels": marks})
        return Converted(done, {"rows": len(done)} | {name: counts[name] for name in _BINARY_COUNTS})

    def write(self, rows: Iterable[Row], path: str | Path) -> int:
        """See :class:`ConverterConfig`."""
        return write_checked(rows, path, ROLLOUT, STEPWISE)


@dataclass(frozen=True)
class Unpaired(ConverterConfig):
    """TRL's unpaired preference type (for KTO): prompt, completion, and the outcome as label."""

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        counts: Counter[str] = Counter()
        kept, counts["duplicates"], counts["problems_all_identical"] = drop_repeated(list(map(completion_of, rows)))
        done = []
        for each in kept:
            outcome = outcome_of(each.row)
            if outcome is None:
                counts["rows_without_outcome"] += 1
            elif not each.text.strip():
                counts["empty_completions"] += 1
            else:
                counts["right" if outcome else "wrong"] += 1
                counts["cut_off"] += each.finish == "length"
                done.append(
                    _present(each.row, "id", "problem_id")
                    | {"prompt": each.row["prompt"], "completion": each.text, "label": outcome}
                    | _present(each.row, *PROBLEM_COLUMNS)
                )
        return Converted(done, {"rows": len(done)} | {name: counts[name] for name in _UNPAIRED_COUNTS})

    def write(self, rows: Iterable[Row], path: str | Path) -> int:
        """See :class:`ConverterConfig`."""
        return write_checked(rows, path, UNPAIRED)


def _present(row: Row, *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names if row.get(name) is not None}


# ---- pairs ---------------------------------------------------------------------------------------------------------

_PAIR_COUNTS = (
    *("problems", "problems_all_right", "problems_all_wrong", "problems_with_a_single_sample", "problems_ungraded"),
    *("problems_without_a_right_one_to_choose", "problems_identical_sides", "ungraded", "empty_completions"),
    *("duplicates", "right_but_cut_off", "right_but_a_wrong_step"),
)
"""What is counted: problems with pairs, problems without by reason, then solutions left out by reason."""


def even_pairs(right: Sequence[T], wrong: Sequence[T]) -> Iterator[tuple[T, T]]:
    """All pairs of two lists, in an order whose every beginning uses the members of each list as evenly as possible.

    At any point two members of a list have been used equally often or one of them once more. Both lists are walked
    round and round; when both come to their start together, the second one is shifted by one.
    """
    a, b = len(right), len(wrong)
    if not a or not b:
        return
    round_trip = math.lcm(a, b)
    for k in range(a * b):
        yield right[k % a], wrong[(k + k // round_trip) % b]


@dataclass(frozen=True, kw_only=True)
class Preference(Cast):
    """Pairs of a correct and an incorrect solution of each problem (for DPO)."""

    seed: int = 0
    """Keys which solutions are paired."""
    max_pairs: int = 1
    """Most pairs of a problem, at least 1."""
    chosen_steps: Literal["any", "clean"] = "any"
    """Whether the better side may hold incorrect steps (any), or a solution with one is left out (clean)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("chosen_steps", self.chosen_steps, ("any", "clean"))
        check_bounds("", self, max_pairs="[1, inf)")

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        counts: Counter[str] = Counter()
        problems: dict[str, list[Completion]] = {}
        for row in rows:
            problems.setdefault(problem_key(row), []).append(completion_of(row))
        done: list[dict[str, Any]] = []
        for name, solutions in problems.items():
            pairs = self._pairs(name, solutions, counts)
            counts["problems"] += bool(pairs)
            done += [self._row(number, *pair) for number, pair in enumerate(pairs)]
        return Converted(done, {"rows": len(done)} | {name: counts[name] for name in _PAIR_COUNTS})

    def write(self, rows: Iterable[Row], path: str | Path) -> int:
        """See :class:`ConverterConfig`."""
        return write_checked(rows, path, PREFERENCE)

    def _pairs(
        self, name: str, solutions: Sequence[Completion], counts: Counter[str]
    ) -> list[tuple[Completion, Completion]]:
        """The pairs of one problem; counts why there are none, and the solutions left out."""
        told = [each for each in solutions if outcome_of(each.row) is not None]
        graded = [each for each in told if each.text.strip()]
        counts["ungraded"] += len(solutions) - len(told)
        counts["empty_completions"] += len(told) - len(graded)
        outcomes = {outcome_of(each.row) for each in graded}
        if len(outcomes) < 2:
            few = ("problems_ungraded", "problems_with_a_single_sample")
            same = "problems_all_right" if True in outcomes else "problems_all_wrong"
            counts[few[len(graded)] if len(graded) < 2 else same] += 1
            return []
        distinct, repeated, _ = drop_repeated(graded, by_outcome=True)
        counts["duplicates"] += repeated
        right: list[Completion] = []
        for each in (each for each in distinct if outcome_of(each.row)):
            if each.finish == "length":
                counts["right_but_cut_off"] += 1
            elif self.chosen_steps == "clean" and False in (self.marks(each) or ()):
                counts["right_but_a_wrong_step"] += 1
            else:
                right.append(each)
        if not right:
            counts["problems_without_a_right_one_to_choose"] += 1
            return []
        draw = generator(self.seed, PURPOSE, name)
        wrong = [each for each in distinct if not outcome_of(each.row)]
        right, wrong = ([side[i] for i in draw.permutation(len(side))] for side in (right, wrong))
        # An answer can be graded both ways (a grader that ran out of time); text against itself teaches nothing.
        differing = (pair for pair in even_pairs(right, wrong) if pair[0].text != pair[1].text)
        pairs = list(islice(differing, self.max_pairs))
        counts["problems_identical_sides"] += not pairs
        return pairs

    def _row(self, number: int, chosen: Completion, rejected: Completion) -> dict[str, Any]:
        problem = chosen.row.get("problem_id")
        row: dict[str, Any] = {"id": f"{chosen.id if problem is None else problem}/pair-{number}"}
        row |= {} if problem is None else {"problem_id": str(problem)}
        row |= {"prompt": chosen.row["prompt"], "chosen": chosen.text, "rejected": rejected.text}
        for side, each in (("chosen", chosen), ("rejected", rejected)):
            if len(each.token_ids):
                row[f"{side}_ids"] = each.token_ids.tolist()
        row |= _present(chosen.row, *PROBLEM_COLUMNS)
        settings = {name: getattr(self, name) for name in ("seed", "max_pairs", "chosen_steps")}
        row["pairing"] = {"builder": "outcome", **settings, **_present(chosen.row, "model", "sampling")}
        row["pair_facts"] = {"chosen": chosen.id, "rejected": rejected.id}
        return row
