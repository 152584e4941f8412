"""Preference pairs from outcomes: a right solution over a wrong one of the same problem (DPO).

Source: the outcome pairs of DPO (arXiv 2305.18290) on self-generated solutions, as in iterative reasoning preference
optimisation (arXiv 2404.19733).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from stepkd.data.rows import PREFERENCE
from stepkd.labels.convert import Converted, Converter, ConvertOptions, register
from stepkd.labels.feedback import Answered, Row, answered, drop_repeated, label_values, writer
from stepkd.labels.solutions import PROBLEM_COLUMNS
from stepkd.randomness import generator
from stepkd.steps.labels import verdicts

PURPOSE = "preference_pairs"

_COUNTS = (
    *("problems", "problems_all_right", "problems_all_wrong", "problems_with_a_single_sample", "problems_ungraded"),
    *("problems_without_a_right_one_to_choose", "problems_identical_sides", "ungraded", "empty_completions"),
    *("duplicates", "right_but_cut_off", "right_but_a_wrong_step"),
)
"""What is counted: problems with pairs, problems without by reason, then solutions left out by reason."""

T = TypeVar("T")


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


def _preference(rows: Sequence[Row], options: ConvertOptions) -> Converted:
    counts: Counter[str] = Counter()
    problems: dict[str, list[Answered]] = {}
    for row in rows:
        each = answered(row)
        problems.setdefault(each.problem, []).append(each)
    done: list[dict[str, Any]] = []
    for name, solutions in problems.items():
        pairs = _pairs(name, solutions, options, counts)
        counts["problems"] += bool(pairs)
        done += [_row(number, *pair, options) for number, pair in enumerate(pairs)]
    return Converted(done, {"rows": len(done)} | {name: counts[name] for name in _COUNTS})


def _pairs(
    name: str, solutions: Sequence[Answered], options: ConvertOptions, counts: Counter[str]
) -> list[tuple[Answered, Answered]]:
    """The pairs of one problem; counts why there are none, and the solutions left out."""
    counts["ungraded"] += sum(each.outcome is None for each in solutions)
    counts["empty_completions"] += sum(each.outcome is not None and not each.text.strip() for each in solutions)
    graded = [each for each in solutions if each.outcome is not None and each.text.strip()]
    reason = _without_sides(graded)
    if reason is not None:
        counts[reason] += 1
        return []
    distinct, repeated, _ = drop_repeated(graded, by_outcome=True)
    counts["duplicates"] += repeated
    right = [each for each in distinct if each.outcome]
    cut_off = [each for each in right if each.cut_off]
    slips = [each for each in right if not each.cut_off and options.chosen_steps == "clean" and _slips(each, options)]
    counts["right_but_cut_off"] += len(cut_off)
    counts["right_but_a_wrong_step"] += len(slips)
    left_out = {id(each) for each in (*cut_off, *slips)}
    right = [each for each in right if id(each) not in left_out]
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


def _without_sides(graded: Sequence[Answered]) -> str | None:
    """Why a problem has no right and wrong side, or None."""
    if not graded:
        return "problems_ungraded"
    if len(graded) == 1:
        return "problems_with_a_single_sample"
    outcomes = {each.outcome for each in graded}
    if len(outcomes) == 2:
        return None
    return "problems_all_right" if True in outcomes else "problems_all_wrong"


def _slips(each: Answered, options: ConvertOptions) -> bool:
    labels = label_values(each.row, soft=options.soft)
    if labels is None:
        return False
    return False in verdicts(labels, neutral=options.neutral, threshold=options.threshold)


def _row(number: int, chosen: Answered, rejected: Answered, options: ConvertOptions) -> dict[str, Any]:
    problem = str(chosen.row["problem_id"]) if chosen.row.get("problem_id") is not None else None
    row: dict[str, Any] = {"id": f"{problem or chosen.id}/pair-{number}"}
    row |= {} if problem is None else {"problem_id": problem}
    row |= {"prompt": chosen.row["prompt"], "chosen": chosen.text, "rejected": rejected.text}
    for side, each in (("chosen", chosen), ("rejected", rejected)):
        if each.token_ids is not None:
            row[f"{side}_ids"] = each.token_ids
    row |= {column: chosen.row[column] for column in PROBLEM_COLUMNS if chosen.row.get(column) is not None}
    row["pairing"] = {
        "builder": "outcome",
        "seed": options.seed,
        "max_pairs": options.max_pairs,
        "chosen_steps": options.chosen_steps,
        **{column: chosen.row[column] for column in ("model", "sampling") if chosen.row.get(column) is not None},
    }
    row["pair_facts"] = {"chosen": chosen.id, "rejected": rejected.id}
    return row


register(
    Converter("preference", "pairs of a right and a wrong solution of each problem", _preference, writer(PREFERENCE))
)
