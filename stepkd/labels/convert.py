"""From labelled rows to other kinds of rows, for ``stepkd convert``; and the consensus of two labellings.

A converter is a class of settings with a method from rows to rows and counts of what was left out: step-labelled rows
in other layouts, unpaired rows for KTO, pairs for DPO, demonstrations for fine-tuning. Step-KTO and KTO need no
conversion: they read labelled rows as they are.

Sources: KTO (arXiv 2402.01306); the outcome pairs of DPO (arXiv 2305.18290) on self-generated solutions, as in
iterative reasoning preference optimisation (arXiv 2404.19733).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from stepkd.data.rows import check_unique_ids, detect_contract, passed_on, validate
from stepkd.data.sources.contract_rows import to_stepwise, trl_row
from stepkd.data.sources.math_shepherd import write_math_shepherd
from stepkd.errors import DataError, check_bounds
from stepkd.labels.labellers import PROBLEM_COLUMNS, Row, outcome_of
from stepkd.labels.quality import check_same_steps, label_column, row_labels
from stepkd.randomness import generator
from stepkd.runs.files import write_jsonl
from stepkd.scorers.scorer import problem_key
from stepkd.steps.format import written_steps
from stepkd.steps.labels import Label, Neutral, check_threshold, first_incorrect, label_kind, verdicts

T = TypeVar("T")
PURPOSE = "preference_pairs"
KEPT = ("labelling", "label_facts", "step_values", "pass_rate", "task", "meta", "problem_id")
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

    @abstractmethod
    def convert(self, rows: Sequence[Row]) -> Converted:
        """Labelled rows (completion or stepwise contract) to new rows."""

    def write(self, rows: Iterable[Row], path: str | Path) -> int:
        """Write the new rows, each checked against its contract; returns their number."""
        if Path(path).suffix != ".jsonl":
            raise DataError(f"rows are written as .jsonl, not {Path(path).suffix!r}; rename the target", path=path)
        return write_jsonl(path, (validate(dict(row), detect_contract(row), path=path, extra="keep") for row in rows))


def convert_rows(rows: Sequence[Row], to: ConverterConfig, *, path: str | Path | None = None) -> Converted:
    """Convert labelled rows.

    Args:
        rows: rows with step labels.
        to: a converter.
        path: where the rows come from, for messages.

    Raises:
        DataError: rows it cannot convert, or none left.
    """
    try:
        converted = to.convert(rows)
    except DataError as error:
        if path is None or error.path is not None:
            raise
        raise DataError(str(error), path=path) from None
    if not converted.rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in converted.counts.items() if count)
        raise DataError(f"none of {len(rows)} rows is left ({reasons or 'no reason given'})", path=path)
    return converted


def solution_text(row: Row) -> str:
    """The whole solution of a completion row or a stepwise row.

    Raises:
        DataError: another kind of row.
    """
    if "completions" in row:
        return "".join(written_steps(row["completions"]))
    if "completion" not in row:
        name = str(row.get("id", "?"))
        raise DataError("neither a completion (completion, token_ids) nor a stepwise row (completions)", path=name)
    return str(row["completion"])


def drop_repeated(rows: Sequence[Row], *, by_outcome: bool = True) -> list[Row]:
    """Keep the first of several solutions of a problem with the same text and end, one of each outcome or in all."""
    first: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        outcome = outcome_of(row) if by_outcome else None
        first.setdefault((problem_key(row), solution_text(row), row.get("finish") == "length", outcome), row)
    return list(first.values())


def holds_incorrect_step(row: Row) -> bool:
    """Whether a row's labels call one of its steps incorrect; a row without labels holds none."""
    return False in verdicts(row.get(label_column(row)) or ())


# ---- step-labelled rows --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stepwise(ConverterConfig):
    """Prompt, completions, labels, with what else the rows carry."""

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        done = [to_stepwise(row, keep=KEPT) for row in rows]
        return Converted(done, {"rows": len(done)})


@dataclass(frozen=True, kw_only=True)
class TRLStepwise(Stepwise):
    """TRL's stepwise-supervision type: one true or false per step."""

    neutral: Neutral = "correct"
    """What a rating of 0 becomes: correct, incorrect, or mask, which leaves the step without a label."""
    threshold: float = 0.5
    """Chance from which on a soft label says correct, in (0, 1)."""
    columns: ClassVar[tuple[str, ...] | None] = ("prompt", "completions", "labels")

    def __post_init__(self) -> None:
        check_bounds("", self)
        check_threshold(self.threshold)

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
        """See :func:`~stepkd.data.sources.math_shepherd.write_math_shepherd`."""
        return write_math_shepherd(rows, path)


@dataclass(frozen=True, kw_only=True)
class Balanced(ConverterConfig):
    """The same rows with as many correct as incorrect labels at every step number (GLoRe, arXiv 2402.10963); a reward
    model that learns from them should have labels.after_error: keep, which hides none of those that are left."""

    seed: int = 0
    """Keys which labels in surplus go."""

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        before = [row_labels(row) for row in rows]
        for row, labels in zip(rows, before, strict=True):
            if label_kind(labels) == "soft":
                raise DataError(
                    "soft labels cannot be balanced: give rows labelled true/false or -1, 0, 1",
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
        return Converted(kept, {"rows": len(kept), "labels_before": signed[0], "labels_kept": signed[1]})


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


# ---- feedback, pairs, demonstrations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unpaired(ConverterConfig):
    """TRL's unpaired preference type (for its KTO trainer): prompt, completion, and the outcome as label."""

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        counts: Counter[str] = Counter()
        graded = []
        for row in rows:
            empty = not solution_text(row).strip()
            if empty or outcome_of(row) is None:
                counts["rows_without_outcome" if outcome_of(row) is None else "empty_completions"] += 1
            else:
                graded.append(row)
        # An answer can be graded both ways (a grader that ran out of time); one text has one label.
        distinct = drop_repeated(graded, by_outcome=False)
        counts["duplicates"] = len(graded) - len(distinct)
        done = []
        for row in distinct:
            outcome, text = outcome_of(row), solution_text(row)
            counts["correct" if outcome else "incorrect"] += 1
            counts["cut_off"] += row.get("finish") == "length"
            new = {"prompt": row["prompt"], "completion": text, "label": outcome}
            done.append(passed_on(row, "id", "problem_id") | new | passed_on(row, *PROBLEM_COLUMNS))
        return Converted(done, {"rows": len(done)} | dict(counts))


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
class Preference(ConverterConfig):
    """Pairs of a correct and an incorrect solution of each problem (for DPO)."""

    seed: int = 0
    """Keys which solutions are paired."""
    max_pairs: int = 1
    """Most pairs of a problem, at least 1."""
    chosen_steps: Literal["any", "clean"] = "any"
    """Whether the better side may hold incorrect steps (any), or a solution with one is left out (clean)."""

    def __post_init__(self) -> None:
        check_bounds("", self, max_pairs="[1, inf)")

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        counts: Counter[str] = Counter()
        problems: dict[str, list[Row]] = {}
        for row in rows:
            problems.setdefault(problem_key(row), []).append(row)
        done: list[dict[str, Any]] = []
        for name, solutions in problems.items():
            pairs = self._pairs(name, solutions, counts)
            counts["problems"] += bool(pairs)
            done += [self._row(number, *pair) for number, pair in enumerate(pairs)]
        return Converted(done, {"rows": len(done)} | dict(counts))

    def _pairs(self, name: str, solutions: Sequence[Row], counts: Counter[str]) -> list[tuple[Row, Row]]:
        """The pairs of one problem; counts why there are none, and the solutions left out."""
        graded = [row for row in solutions if outcome_of(row) is not None and solution_text(row).strip()]
        counts["ungraded_or_empty"] += len(solutions) - len(graded)
        outcomes = {outcome_of(row) for row in graded}
        if len(outcomes) < 2:
            same = "problems_all_correct" if True in outcomes else "problems_all_incorrect"
            counts[same if outcomes else "problems_ungraded"] += 1
            return []
        distinct = drop_repeated(graded)
        counts["duplicates"] += len(graded) - len(distinct)
        correct: list[Row] = []
        for row in filter(outcome_of, distinct):
            if row.get("finish") == "length":
                counts["correct_but_cut_off"] += 1
            elif self.chosen_steps == "clean" and holds_incorrect_step(row):
                counts["correct_but_an_incorrect_step"] += 1
            else:
                correct.append(row)
        draw = generator(self.seed, PURPOSE, name)
        incorrect = [row for row in distinct if not outcome_of(row)]
        correct, incorrect = ([side[i] for i in draw.permutation(len(side))] for side in (correct, incorrect))
        # An answer can be graded both ways (a grader that ran out of time); text against itself teaches nothing.
        differing = (pair for pair in even_pairs(correct, incorrect) if len({*map(solution_text, pair)}) == 2)
        pairs = list(islice(differing, self.max_pairs))
        if not pairs:
            counts["problems_identical_sides" if correct else "problems_without_a_correct_one_to_choose"] += 1
        return pairs

    def _row(self, number: int, chosen: Row, rejected: Row) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in ("seed", "max_pairs", "chosen_steps")}
        row = {"id": f"{chosen.get('problem_id') or chosen.get('id', '?')}/pair-{number}"}
        row |= passed_on(chosen, "problem_id")
        row |= {"prompt": chosen["prompt"], "chosen": solution_text(chosen), "rejected": solution_text(rejected)}
        row |= {
            f"{side}_ids": each["token_ids"]
            for side, each in (("chosen", chosen), ("rejected", rejected))
            if each.get("token_ids")
        }
        return (
            row
            | passed_on(chosen, *PROBLEM_COLUMNS)
            | {"pairing": {"builder": "outcome", **settings, **passed_on(chosen, "model", "sampling")}}
            | {"pair_facts": {"chosen": chosen.get("id", "?"), "rejected": rejected.get("id", "?")}}
        )


@dataclass(frozen=True, kw_only=True)
class Demonstrations(ConverterConfig):
    """Solutions whose answer is correct, to fine-tune a model on its own (rejection sampling: RFT, arXiv 2308.01825;
    STaR, arXiv 2203.14465 without its hints); texts without sampled ids, so that one with another tokenizer may learn.
    """

    clean: bool = False
    """Whether those that hold an incorrect step are left out."""

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        counts: Counter[str] = Counter()
        kept = []
        for row in rows:
            correct = outcome_of(row)
            refused = {
                "ungraded": correct is None,
                "incorrect_answer": not correct,
                "cut_off": row.get("finish") == "length",  # there is no end: it would teach to go on for ever
                "incorrect_step": self.clean and holds_incorrect_step(row),
            }
            if True in refused.values():
                counts[next(reason for reason, holds in refused.items() if holds)] += 1
                continue
            done = {"prompt": row["prompt"], "solution": solution_text(row)}
            kept.append(done | passed_on(row, "id", "answer", "problem_id", "task", "meta", "labelling"))
        return Converted(kept, {"rows": len(kept)} | dict(sorted(counts.items())))


# ---- two labellings ------------------------------------------------------------------------------------------------


def consensus_filter(first: Sequence[Row], second: Sequence[Row], *, names: tuple[str, str] = ("A", "B")) -> Converted:
    """Keep of one labelling the solutions whose first incorrect step another one places alike (or both find none).

    With Monte-Carlo labels and a judge it is the filter of Zhang et al. 2025 (arXiv 2501.07301), who keep about 40%.

    Args:
        first: labelled rows (completion or stepwise contract), each with an ``id``; these are kept.
        second: the other labelling; solutions are matched by id.
        names: what to call the two in messages.

    Returns:
        Rows of the first labelling, whose ``labelling`` holds both provenances; counts of solutions: ``kept``,
        ``disagree``, ``unlabelled``, ``only_in_first``, ``only_in_second``.

    Raises:
        DataError: repeated ids, no solution in common, or steps that are not the same; the message names the row.
    """
    for labelling, name in ((first, names[0]), (second, names[1])):
        check_unique_ids(labelling, path=name)
    others = {row["id"]: row for row in second}
    counts: Counter[str] = Counter({"kept": 0, "disagree": 0, "unlabelled": 0, "only_in_first": 0})
    rows = []
    for row in first:
        if row["id"] not in others:
            counts["only_in_first"] += 1
            continue
        other = others[row["id"]]
        check_same_steps(row, other, names=names)
        places = first_incorrect(row_labels(row)), first_incorrect(row_labels(other))
        found = "unlabelled" if None in places else "kept" if places[0] == places[1] else "disagree"
        counts[found] += 1
        if found == "kept":
            both = {"first": row.get("labelling"), "second": other.get("labelling")}
            rows.append(dict(row) | {"labelling": {"labeller": "consensus", "mode": "first_error", **both}})
    counts["only_in_second"] = len(set(others) - {row["id"] for row in first})
    if counts["only_in_first"] == len(first):
        raise DataError(f"no solution of {names[0]} is in {names[1]}: are they labellings of the same solutions?")
    return Converted(rows, dict(counts))
