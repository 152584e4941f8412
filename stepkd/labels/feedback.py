"""Feedback and pairs from labelled rows, for Step-KTO, KTO and DPO; and the settings that every conversion reads.

``binary`` keeps the rows (and their sampled ids) and casts their step labels; ``unpaired`` makes TRL's unpaired
preference type, a completion with one label; ``preference`` puts a correct solution over an incorrect one of the same
problem. What a row says is read in one place, :func:`answered`.

Sources: Step-KTO (arXiv 2501.10799) takes a binary label per step and per answer; KTO (arXiv 2402.01306); the outcome
pairs of DPO (arXiv 2305.18290) on self-generated solutions, as in iterative reasoning preference optimisation
(arXiv 2404.19733).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from stepkd.data.rows import Contract, validate
from stepkd.errors import ConfigError, DataError, check_choice
from stepkd.labels.quality import label_column
from stepkd.labels.solutions import PROBLEM_COLUMNS
from stepkd.randomness import generator
from stepkd.runs.files import write_jsonl
from stepkd.scorers.scorer import problem_key
from stepkd.steps.format import written_steps
from stepkd.steps.labels import Neutral, check_threshold, label_kind, tally, verdicts

Row = Mapping[str, Any]
T = TypeVar("T")
PURPOSE = "preference_pairs"


@dataclass(frozen=True)
class ConvertOptions:
    """Settings of converters; each reads what it needs."""

    soft: bool = False
    """Take the estimated values as labels, not right or wrong (``stepwise``, ``trl``, ``binary``, ``preference``)."""
    neutral: Neutral = "right"
    """What a rating of 0 becomes where only right and wrong exist (``trl``, ``math_shepherd``, ``binary``)."""
    threshold: float = 0.5
    """A soft label is right there from this chance on, in (0, 1)."""
    seed: int = 0
    """Keys what is drawn (``balanced``, ``preference``)."""
    max_pairs: int = 1
    """Most pairs per problem, >= 1 (``preference``)."""
    chosen_steps: Literal["any", "clean"] = "any"
    """``clean``: a solution with a wrong step is never the better one (``preference``)."""

    def __post_init__(self) -> None:
        check_choice("neutral", self.neutral, get_args(Neutral))
        check_choice("--chosen-steps", self.chosen_steps, ("any", "clean"))
        check_threshold(self.threshold)
        if self.max_pairs < 1:
            raise ConfigError(f"max_pairs={self.max_pairs}: must be at least 1")


@dataclass(frozen=True)
class Converted:
    """Rows of the new kind."""

    rows: list[dict[str, Any]]
    """At least one, else the caller refuses."""
    counts: dict[str, int]
    """What was kept, changed and left out, by reason."""


@dataclass(frozen=True)
class Answered:
    """What a rollout row or a stepwise row says of its solution as a whole."""

    row: Row
    """The row."""
    problem: str
    """What the rows of one problem have in common."""
    text: str
    """The solution."""
    outcome: bool | None
    """Whether its answer is correct; None: not graded."""
    token_ids: list[int] | None
    """The ids that were sampled; None: it is a text."""
    cut_off: bool
    """Whether the length limit ended it."""

    @property
    def id(self) -> str:
        """Its id, for messages and provenance."""
        return str(self.row.get("id", "?"))

    def marks(self, options: ConvertOptions) -> list[bool | None] | None:
        """What its step labels say (its estimated values in their place where ``soft``); None where it has none.

        Raises:
            DataError: another number of labels than steps, or labels that are none.
        """
        column = "step_values" if options.soft else label_column(self.row)
        labels = self.row.get(column)
        if labels is None or all(label is None for label in labels):
            return None
        steps = self.row["completions"] if self.token_ids is None else self.row["step_ends"]
        if len(labels) != len(steps):
            raise DataError(f"has {len(labels)} labels for {len(steps)} steps", path=self.id)
        if options.soft:  # a chance written as 0 or 1 would read as a rating
            labels = [None if label is None else float(label) for label in labels]
        try:
            return verdicts(labels, neutral=options.neutral, threshold=options.threshold)
        except DataError as error:
            raise DataError(str(error), path=self.id, column=column) from error


def answered(row: Row) -> Answered:
    """Read a rollout row or a stepwise row; no step labels are needed.

    Raises:
        DataError: another kind of row.
    """
    if "completions" in row:
        text = "".join(written_steps(row["completions"]))
        return Answered(row, problem_key(row), text, row.get("outcome"), None, cut_off=False)
    if "token_ids" not in row or "completion" not in row:
        raise DataError(
            "neither a rollout (completion, token_ids) nor a stepwise row (completions)", path=str(row.get("id", "?"))
        )
    ids, cut_off = list(row["token_ids"]), row.get("finish") == "length"
    return Answered(row, problem_key(row), row["completion"], row.get("correct"), ids, cut_off)


def drop_repeated(solutions: Sequence[Answered], *, by_outcome: bool = False) -> tuple[list[Answered], int, int]:
    """Keep the first of several solutions of a problem with the same text; a cut-off one is not a finished one.

    Args:
        solutions: of any number of problems.
        by_outcome: keep one of each outcome.

    Returns:
        Those kept, in order; how many were dropped; and how many problems had several solutions, all equal.
    """
    first: dict[tuple[str, str, bool, bool | None], Answered] = {}
    for each in solutions:
        first.setdefault((each.problem, each.text, each.cut_off, each.outcome if by_outcome else None), each)
    kept = list(first.values())
    before, after = (Counter(each.problem for each in group) for group in (solutions, kept))
    identical = sum(count > 1 and after[problem] == 1 for problem, count in before.items())
    return kept, len(solutions) - len(kept), identical


def writer(*contracts: Contract) -> Callable[[Iterable[Row], str | Path], int]:
    """What writes rows that follow one of the contracts (the first whose required columns a row has)."""

    def checked(row: Row, path: str | Path) -> dict[str, Any]:
        contract = next((each for each in contracts if set(each.required) <= set(row)), contracts[0])
        return validate(dict(row), contract, path=path, extra="keep")

    return lambda rows, path: write_jsonl(path, (checked(row, path) for row in rows))


# ---- feedback ------------------------------------------------------------------------------------------------------

_BINARY_COUNTS = (
    *("right_steps", "wrong_steps", "neutral_steps", "unlabelled_steps", "right_answers_with_a_wrong_step"),
    *("rows_without_labels", "rows_without_outcome", "duplicates", "problems_all_identical"),
)
_UNPAIRED_COUNTS = (
    *("right", "wrong", "cut_off", "rows_without_outcome", "empty_completions", "duplicates", "problems_all_identical"),
)


def binary(rows: Sequence[Row], options: ConvertOptions) -> Converted:
    """The same rows, with correct or incorrect for every step."""
    counts: Counter[str] = Counter()
    kept, counts["duplicates"], counts["problems_all_identical"] = drop_repeated([answered(row) for row in rows])
    done = []
    for each in kept:
        marks = each.marks(options)
        if marks is None or all(mark is None for mark in marks):
            counts["rows_without_labels"] += 1
            continue
        labels = each.row["step_values" if options.soft else label_column(each.row)]
        counts["right_steps"] += marks.count(True)
        counts["wrong_steps"] += marks.count(False)
        counts["unlabelled_steps"] += list(labels).count(None)
        counts["neutral_steps"] += list(labels).count(0) if not options.soft and label_kind(labels) == "rating" else 0
        counts["rows_without_outcome"] += each.outcome is None
        counts["right_answers_with_a_wrong_step"] += tally([each.outcome], [marks]).flawed
        done.append(dict(each.row) | {"step_labels" if each.token_ids is not None else "labels": marks})
    return Converted(done, {"rows": len(done)} | {name: counts[name] for name in _BINARY_COUNTS})


def unpaired(rows: Sequence[Row], options: ConvertOptions) -> Converted:
    """TRL's KTO rows: prompt, completion, and the outcome as label."""
    counts: Counter[str] = Counter()
    kept, counts["duplicates"], counts["problems_all_identical"] = drop_repeated([answered(row) for row in rows])
    done = []
    for each in kept:
        if each.outcome is None:
            counts["rows_without_outcome"] += 1
        elif not each.text.strip():
            counts["empty_completions"] += 1
        else:
            counts["right" if each.outcome else "wrong"] += 1
            counts["cut_off"] += each.cut_off
            done.append(
                _present(each.row, "id", "problem_id")
                | {"prompt": each.row["prompt"], "completion": each.text, "label": each.outcome}
                | _present(each.row, *PROBLEM_COLUMNS)
            )
    return Converted(done, {"rows": len(done)} | {name: counts[name] for name in _UNPAIRED_COUNTS})


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


def preference(rows: Sequence[Row], options: ConvertOptions) -> Converted:
    """Pairs of a correct and an incorrect solution of each problem."""
    counts: Counter[str] = Counter()
    problems: dict[str, list[Answered]] = {}
    for row in rows:
        each = answered(row)
        problems.setdefault(each.problem, []).append(each)
    done: list[dict[str, Any]] = []
    for name, solutions in problems.items():
        pairs = _pairs(name, solutions, options, counts)
        counts["problems"] += bool(pairs)
        done += [_pair_row(number, *pair, options) for number, pair in enumerate(pairs)]
    return Converted(done, {"rows": len(done)} | {name: counts[name] for name in _PAIR_COUNTS})


def _pairs(
    name: str, solutions: Sequence[Answered], options: ConvertOptions, counts: Counter[str]
) -> list[tuple[Answered, Answered]]:
    """The pairs of one problem; counts why there are none, and the solutions left out."""
    counts["ungraded"] += sum(each.outcome is None for each in solutions)
    counts["empty_completions"] += sum(each.outcome is not None and not each.text.strip() for each in solutions)
    graded = [each for each in solutions if each.outcome is not None and each.text.strip()]
    outcomes = {each.outcome for each in graded}
    if len(outcomes) < 2:
        few = ("problems_ungraded", "problems_with_a_single_sample")
        same = "problems_all_right" if True in outcomes else "problems_all_wrong"
        counts[few[len(graded)] if len(graded) < 2 else same] += 1
        return []
    distinct, repeated, _ = drop_repeated(graded, by_outcome=True)
    counts["duplicates"] += repeated
    right: list[Answered] = []
    for each in distinct:
        if each.outcome and each.cut_off:
            counts["right_but_cut_off"] += 1
        elif each.outcome and options.chosen_steps == "clean" and False in (each.marks(options) or ()):
            counts["right_but_a_wrong_step"] += 1
        elif each.outcome:
            right.append(each)
    if not right:
        counts["problems_without_a_right_one_to_choose"] += 1
        return []
    draw = generator(options.seed, PURPOSE, name)
    wrong = [each for each in distinct if not each.outcome]
    right, wrong = ([side[i] for i in draw.permutation(len(side))] for side in (right, wrong))
    # An answer can be graded both ways (a grader that ran out of time); text against itself teaches nothing.
    differing = (pair for pair in even_pairs(right, wrong) if pair[0].text != pair[1].text)
    pairs = list(islice(differing, options.max_pairs))
    counts["problems_identical_sides"] += not pairs
    return pairs


def _pair_row(number: int, chosen: Answered, rejected: Answered, options: ConvertOptions) -> dict[str, Any]:
    problem = str(chosen.row["problem_id"]) if chosen.row.get("problem_id") is not None else None
    row: dict[str, Any] = {"id": f"{problem or chosen.id}/pair-{number}"}
    row |= {} if problem is None else {"problem_id": problem}
    row |= {"prompt": chosen.row["prompt"], "chosen": chosen.text, "rejected": rejected.text}
    for side, each in (("chosen", chosen), ("rejected", rejected)):
        if each.token_ids is not None:
            row[f"{side}_ids"] = each.token_ids
    row |= _present(chosen.row, *PROBLEM_COLUMNS)
    settings = {"seed": options.seed, "max_pairs": options.max_pairs, "chosen_steps": options.chosen_steps}
    row["pairing"] = {"builder": "outcome", **settings, **_present(chosen.row, "model", "sampling")}
    row["pair_facts"] = {"chosen": chosen.id, "rejected": rejected.id}
    return row
