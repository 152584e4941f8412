"""From labelled rows to other kinds of rows, for ``stepkd convert``.

A converter is a class of settings with a method from rows to rows and counts of what was left out: step-labelled rows
in other layouts, feedback for Step-KTO and KTO, pairs for DPO, demonstrations for fine-tuning. What a row says of its
solution is read in one place, :func:`completion_of`.

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
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np

from stepkd.data.completion import Completion, Finish
from stepkd.data.rows import COMPLETION, DEMONSTRATION, PREFERENCE, STEPWISE, UNPAIRED, Contract, passed_on, validate
from stepkd.data.step_labels import to_stepwise, trl_row, write_math_shepherd, write_stepwise
from stepkd.errors import DataError, check_bounds, check_choice
from stepkd.labels.quality import label_column, row_labels
from stepkd.labels.step_labels import PROBLEM_COLUMNS, Row, outcome_of
from stepkd.randomness import generator
from stepkd.runs.files import write_jsonl
from stepkd.scorers.scorer import problem_key
from stepkd.steps.format import written_steps
from stepkd.steps.labels import Label, Neutral, check_threshold, label_kind, tally, verdicts

T = TypeVar("T")
PURPOSE = "preference_pairs"
NO_IDS = np.empty(0, np.int64)
KEPT = ("labelling", "label_facts", "step_values", "task", "meta", "problem_id")
"""Columns of a labelled completion that its stepwise row keeps."""


@dataclass(frozen=True)
class Converted:
    """Rows of the new kind."""

    rows: list[dict[str, Any]]
    """At least one, else the caller refuses."""
    counts: dict[str, int]
    """What was kept, changed and left out, by reason."""


class ConverterConfig(ABC):
    """A kind of rows that labelled rows are converted to."""

    contracts: ClassVar[tuple[Contract, ...]] = ()
    """What the new rows are, the first whose required columns a row has; none: step-labelled rows in their own way."""

    @abstractmethod
    def convert(self, rows: Sequence[Row]) -> Converted:
        """Labelled rows (completion or stepwise contract) to new rows."""

    def write(self, rows: Iterable[Row], path: str | Path) -> int:
        """Write the new rows; returns their number."""
        if not self.contracts:
            return write_stepwise(rows, path)

        def checked(row: Row) -> dict[str, Any]:
            fitting = (each for each in self.contracts if set(each.required) <= set(row))
            return validate(dict(row), next(fitting, self.contracts[0]), path=path, extra="keep")

        return write_jsonl(path, map(checked, rows))


@dataclass(frozen=True, kw_only=True)
class Cast(ConverterConfig):
    """What conversions read step labels by that know only correct and incorrect."""

    neutral: Neutral = "correct"
    """What a rating of 0 becomes: correct, incorrect, or mask, which leaves the step without a label."""
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
        row, column = each.row, label_column(each.row)
        labels = row.get(column)
        if labels is None or all(label is None for label in labels):
            return None
        steps = row["step_ends"] if len(each.token_ids) else row["completions"]
        if len(labels) != len(steps):
            raise DataError(f"has {len(labels)} labels for {len(steps)} steps", path=each.id)
        try:
            return verdicts(labels, neutral=self.neutral, threshold=self.threshold)
        except DataError as error:
            raise DataError(str(error), path=each.id, column=column) from error


def convert_rows(rows: Sequence[Row], to: ConverterConfig) -> Converted:
    """Convert labelled rows.

    Args:
        rows: rows with step labels.
        to: a converter.

    Raises:
        DataError: rows it cannot convert, or none left.
    """
    converted = to.convert(rows)
    if not converted.rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in converted.counts.items() if count)
        raise DataError(f"none of {len(rows)} rows is left ({reasons or 'no reason given'})")
    return converted


def completion_of(row: Row) -> Completion:
    """What a completion row or a stepwise row says of its solution as a whole; no step labels are needed.

    Raises:
        DataError: another kind of row.
    """
    name = str(row.get("id", "?"))
    if "completions" in row:
        return Completion(NO_IDS, NO_IDS, text="".join(written_steps(row["completions"])), id=name, row=row)
    if "token_ids" not in row or "completion" not in row:
        raise DataError("neither a completion (completion, token_ids) nor a stepwise row (completions)", path=name)
    finish: Finish = "length" if row.get("finish") == "length" else "stop"
    return Completion(NO_IDS, np.asarray(row["token_ids"]), finish=finish, text=row["completion"], id=name, row=row)


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


# ---- step-labelled rows --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stepwise(ConverterConfig):
    """Prompt, completions, labels, with what else the rows carry."""

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        done = [to_stepwise(row, keep=KEPT) for row in rows]
        return Converted(done, {"rows": len(done)})


@dataclass(frozen=True, kw_only=True)
class TRLStepwise(Cast):
    """TRL's stepwise-supervision type: one true or false per step."""

    columns: ClassVar[tuple[str, ...] | None] = ("prompt", "completions", "labels")

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        counts: Counter[str] = Counter()
        stepwise = [to_stepwise(row, keep=KEPT) for row in rows]
        cast = [trl_row(row, neutral=self.neutral, threshold=self.threshold, counts=counts) for row in stepwise]
        kept = [{name: row[name] for name in self.columns or row} for row in cast if row is not None]
        return Converted(kept, {"rows": len(kept)} | dict(counts))


@dataclass(frozen=True, kw_only=True)
class MathShepherd(TRLStepwise):
    """Math-Shepherd's texts with step tags and + or -."""

    columns = None

    def write(self, rows: Iterable[Row], path: str | Path) -> int:
        """See :class:`ConverterConfig`."""
        return write_math_shepherd(rows, path)


@dataclass(frozen=True, kw_only=True)
class Balanced(ConverterConfig):
    """The same rows with as many correct as incorrect labels at every step number."""

    seed: int = 0
    """Keys which labels in surplus go."""

    contracts = (COMPLETION, STEPWISE)

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        before = [row_labels(row) for row in rows]
        for row, labels in zip(rows, before, strict=True):
            if odd := [label for label in labels if isinstance(label, float) or label not in (None, -1, 0, 1)]:
                raise DataError(
                    f"{odd[0]!r} is no hard label (true, false, -1, 0, 1): soft labels cannot be balanced",
                    path=str(row.get("id", "?")),
                    column=label_column(row),
                )
        after = balance_by_prefix_length(before, self.seed)
        kept = [
            dict(row) | {label_column(row): labels}
            for row, labels in zip(rows, after, strict=True)
            if any(label is not None for label in labels)
        ]
        signed = [sum(_sign(label) != 0 for labels in each for label in labels) for each in (before, after)]
        counts = {"rows": len(kept), "rows_without_labels_now": len(rows) - len(kept)}
        return Converted(kept, counts | {"labels_before": signed[0], "labels_kept": signed[1]})


def balance_by_prefix_length(labels: Sequence[Sequence[Label]], seed: int) -> list[list[Label]]:
    """Make positive and negative labels equal in number at every prefix length, by dropping labels in surplus.

    Without it a model learns "early is good", because an early prefix can nearly always still be solved. Which labels
    go is drawn by the stream of ``(seed, "balance", step)``. Where all labels of a prefix length have one sign, all go.

    Args:
        labels: per solution true or false, or -1/0/1 of which 0 counts as neither and stays; None: no label.
        seed: seed of the run.

    Returns:
        The labels, None in the place of those in surplus.

    Source: GLoRe (arXiv 2402.10963).
    """
    kept = [list(each) for each in labels]
    for step in range(max(map(len, kept), default=0)):
        signs = [_sign(each[step]) if step < len(each) else 0 for each in kept]
        positives, negatives = ([i for i, each in enumerate(signs) if each == sign] for sign in (1, -1))
        surplus = max(positives, negatives, key=len)
        for i in generator(seed, "balance", step).permutation(len(surplus))[min(len(positives), len(negatives)) :]:
            kept[surplus[i]][step] = None
    return kept


def _sign(label: Label) -> int:
    """1, -1, or 0 for a neutral rating and for no label."""
    return -1 if label is False else 0 if label is None else int(label)


# ---- feedback ------------------------------------------------------------------------------------------------------

_BINARY_COUNTS = (
    "correct_steps", "incorrect_steps", "neutral_steps", "unlabelled_steps", "correct_answers_with_an_incorrect_step",
    "rows_without_labels", "rows_without_outcome", "duplicates", "problems_all_identical",
)  # fmt: skip
_UNPAIRED_COUNTS = (
    "correct", "incorrect", "cut_off", "rows_without_outcome", "empty_completions", "duplicates",
    "problems_all_identical",
)  # fmt: skip


def _distinct(rows: Sequence[Row], names: Sequence[str]) -> tuple[list[Completion], dict[str, int]]:
    """The distinct solutions of rows, and counts of these names that say how many were left out so far."""
    kept, duplicates, identical = drop_repeated(list(map(completion_of, rows)))
    left_out = {"duplicates": duplicates, "problems_all_identical": identical}
    return kept, dict.fromkeys(("rows", *names), 0) | left_out


@dataclass(frozen=True, kw_only=True)
class Binary(Cast):
    """The same rows, with their sampled ids, and correct or incorrect for every step (for Step-KTO)."""

    contracts = (COMPLETION, STEPWISE)

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        done = []
        kept, counts = _distinct(rows, _BINARY_COUNTS)
        for each in kept:
            marks, outcome = self.marks(each), outcome_of(each.row)
            if marks is None or all(mark is None for mark in marks):
                counts["rows_without_labels"] += 1
                continue
            labels = each.row[label_column(each.row)]
            counts["correct_steps"] += marks.count(True)
            counts["incorrect_steps"] += marks.count(False)
            counts["unlabelled_steps"] += list(labels).count(None)
            counts["neutral_steps"] += list(labels).count(0) if label_kind(labels) == "rating" else 0
            counts["rows_without_outcome"] += outcome is None
            counts["correct_answers_with_an_incorrect_step"] += tally([outcome], [marks]).flawed
            done.append(dict(each.row) | {"step_labels" if len(each.token_ids) else "labels": marks})
        return Converted(done, counts | {"rows": len(done)})


@dataclass(frozen=True)
class Unpaired(ConverterConfig):
    """TRL's unpaired preference type (for KTO): prompt, completion, and the outcome as label."""

    contracts = (UNPAIRED,)

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        done = []
        kept, counts = _distinct(rows, _UNPAIRED_COUNTS)
        for each in kept:
            outcome = outcome_of(each.row)
            if outcome is None:
                counts["rows_without_outcome"] += 1
            elif not each.text.strip():
                counts["empty_completions"] += 1
            else:
                counts["correct" if outcome else "incorrect"] += 1
                counts["cut_off"] += each.finish == "length"
                done.append(
                    passed_on(each.row, "id", "problem_id")
                    | {"prompt": each.row["prompt"], "completion": each.text, "label": outcome}
                    | passed_on(each.row, *PROBLEM_COLUMNS)
                )
        return Converted(done, counts | {"rows": len(done)})


# ---- pairs ---------------------------------------------------------------------------------------------------------

_PAIR_COUNTS = (
    "problems", "problems_all_correct", "problems_all_incorrect", "problems_with_a_single_sample", "problems_ungraded",
    "problems_without_a_correct_one_to_choose", "problems_identical_sides", "ungraded", "empty_completions",
    "duplicates", "correct_but_cut_off", "correct_but_an_incorrect_step",
)  # fmt: skip
"""What is counted: problems with pairs, problems without by reason, then solutions left out by reason."""


def even_pairs(first: Sequence[T], second: Sequence[T]) -> Iterator[tuple[T, T]]:
    """All pairs of two lists, in an order whose every beginning uses the members of each list as evenly as possible.

    At any point two members of a list have been used equally often or one of them once more. Both lists are walked
    round and round; when both come to their start together, the second one is shifted by one.
    """
    a, b = len(first), len(second)
    if not a or not b:
        return
    round_trip = math.lcm(a, b)
    for k in range(a * b):
        yield first[k % a], second[(k + k // round_trip) % b]


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

    contracts = (PREFERENCE,)

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        counts = dict.fromkeys(("rows", *_PAIR_COUNTS), 0)
        problems: dict[str, list[Completion]] = {}
        for row in rows:
            problems.setdefault(problem_key(row), []).append(completion_of(row))
        done: list[dict[str, Any]] = []
        for name, solutions in problems.items():
            pairs = self._pairs(name, solutions, counts)
            counts["problems"] += bool(pairs)
            done += [self._row(number, *pair) for number, pair in enumerate(pairs)]
        return Converted(done, counts | {"rows": len(done)})

    def _pairs(
        self, name: str, solutions: Sequence[Completion], counts: dict[str, int]
    ) -> list[tuple[Completion, Completion]]:
        """The pairs of one problem; counts why there are none, and the solutions left out."""
        told = [each for each in solutions if outcome_of(each.row) is not None]
        graded = [each for each in told if each.text.strip()]
        counts["ungraded"] += len(solutions) - len(told)
        counts["empty_completions"] += len(told) - len(graded)
        outcomes = {outcome_of(each.row) for each in graded}
        if len(outcomes) < 2:
            few = ("problems_ungraded", "problems_with_a_single_sample")
            same = "problems_all_correct" if True in outcomes else "problems_all_incorrect"
            counts[few[len(graded)] if len(graded) < 2 else same] += 1
            return []
        distinct, repeated, _ = drop_repeated(graded, by_outcome=True)
        counts["duplicates"] += repeated
        correct: list[Completion] = []
        for each in (each for each in distinct if outcome_of(each.row)):
            if each.finish == "length":
                counts["correct_but_cut_off"] += 1
            elif self.chosen_steps == "clean" and False in (self.marks(each) or ()):
                counts["correct_but_an_incorrect_step"] += 1
            else:
                correct.append(each)
        if not correct:
            counts["problems_without_a_correct_one_to_choose"] += 1
            return []
        draw = generator(self.seed, PURPOSE, name)
        incorrect = [each for each in distinct if not outcome_of(each.row)]
        correct, incorrect = ([side[i] for i in draw.permutation(len(side))] for side in (correct, incorrect))
        # An answer can be graded both ways (a grader that ran out of time); text against itself teaches nothing.
        differing = (pair for pair in even_pairs(correct, incorrect) if pair[0].text != pair[1].text)
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
        row |= passed_on(chosen.row, *PROBLEM_COLUMNS)
        settings = {name: getattr(self, name) for name in ("seed", "max_pairs", "chosen_steps")}
        row["pairing"] = {"builder": "outcome", **settings, **passed_on(chosen.row, "model", "sampling")}
        row["pair_facts"] = {"chosen": chosen.id, "rejected": rejected.id}
        return row


# ---- demonstrations ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Demonstrations(ConverterConfig):
    """Solutions whose answer is correct, to fine-tune a model on its own (rejection sampling: RFT, arXiv 2308.01825;
    STaR, arXiv 2203.14465 without its hints); texts without sampled ids, so that one with another tokenizer may learn.
    """

    clean: bool = False
    """Whether those that hold an incorrect step are left out."""

    contracts = (DEMONSTRATION,)

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        counts: Counter[str] = Counter()
        kept = []
        for row in rows:
            if (reason := self._refused(row)) is not None:
                counts[reason] += 1
                continue
            done = {"prompt": row["prompt"], "solution": completion_of(row).text}
            kept.append(done | passed_on(row, "id", "answer", "problem_id", "task", "meta", "labelling"))
        return Converted(kept, {"rows": len(kept)} | dict(sorted(counts.items())))

    def _refused(self, row: Row) -> str | None:
        """Why a solution is no demonstration; None if it is one."""
        correct = outcome_of(row)
        if correct is None:
            return "ungraded"
        if not correct:
            return "incorrect_answer"
        if row.get("finish") == "length":  # the answer is there, and no end: it would teach to go on for ever
            return "cut_off"
        if self.clean and row.get(label_column(row)) is not None and False in verdicts(row_labels(row)):
            return "incorrect_step"
        return None
