"""What a finished labelling job says of itself: counts, label balance, and what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from stepkd.labels.matching import row_labels
from stepkd.steps.labels import tally, verdicts

Row = Mapping[str, Any]


def summarise_labels(
    records: Sequence[Row], candidates: int, duplicates: int, drawn: Sequence[Row], *, too_long: int = 0
) -> dict[str, Any]:
    """Summary of a finished job.

    Args:
        records: one per solution that went to the labeller: ``row``, or ``dropped`` with the reason.
        candidates: solutions there were at first.
        duplicates: those dropped because another one of their problem has the same text.
        drawn: records of the first phase.
        too_long: rows dropped because they do not fit into the model's context.

    Returns:
        Plain values for JSON; depends on nothing but its arguments.
    """
    rows = [record["row"] for record in records if "row" in record]
    dropped = Counter(record["dropped"] for record in records if "dropped" in record)
    dropped += Counter({"duplicate": duplicates, "longer_than_context": too_long})
    known = [row.get("correct", row.get("outcome")) for row in rows]
    graded = [bool(outcome) for outcome in known if outcome is not None]
    marks = [verdicts(row_labels(row)) for row in rows]
    samples = [sample for record in drawn for sample in record.get("samples", ())]
    return {
        "solutions": candidates,
        "labelled": len(rows),
        "dropped": {reason: dropped[reason] for reason in sorted(dropped)},
        "problems": len({str(row.get("problem_id", row["id"])) for row in rows}),
        "right_answers": sum(graded),
        "wrong_answers": len(graded) - sum(graded),
        "cut_off": sum(row.get("finish") == "length" for row in rows),
        "right_answers_with_a_wrong_step": tally(known, marks).flawed,
        "steps": sum(map(len, marks)),
        "balance": _balance(marks),
        "by_position": [
            {"position": i} | _balance([steps[i : i + 1] for steps in marks if len(steps) > i])
            for i in range(max(map(len, marks), default=0))
        ],
        "sampling": {
            "solutions": len(samples),
            "tokens_generated": sum(len(sample["token_ids"]) for sample in samples),
            "tokens_prefilled": sum(record["prefilled"] for record in drawn if "samples" in record),
        },
        "labelling": _totals(records),
    }


def _balance(marks: Sequence[Sequence[bool | None]]) -> dict[str, Any]:
    counts = Counter(mark for steps in marks for mark in steps)
    labelled = counts[True] + counts[False]
    return {
        "right": counts[True],
        "wrong": counts[False],
        "unlabelled": counts[None],
        "right_share": counts[True] / labelled if labelled else None,
    }


def _totals(records: Sequence[Row]) -> dict[str, int]:
    """Sums of the labeller's whole-number facts (tokens generated, tokens read) and of its trials (rollouts made)."""
    totals: Counter[str] = Counter()
    for record in records:
        facts = record["row"].get("label_facts", {}) if "row" in record else record.get("facts", {})
        if "trials" in facts:
            totals["rollouts"] += sum(facts["trials"])
        totals.update(
            {name: value for name, value in facts.items() if isinstance(value, int) and not isinstance(value, bool)}
        )
    return dict(sorted(totals.items()))
