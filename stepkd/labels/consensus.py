"""Two labellings of the same solutions: what they agree on.

Keeping a solution only where Monte-Carlo labels and a judge place the first error alike is the filter of Zhang et al.
2025 (arXiv 2501.07301), who keep about 40% of their data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stepkd.data.rows import check_unique_ids
from stepkd.errors import DataError, check_choice
from stepkd.labels.quality import LabelQuality, check_same_steps, label_column, label_quality, row_labels
from stepkd.steps.labels import Label, first_incorrect, verdicts

Row = Mapping[str, Any]
Mode = Literal["first_error", "steps"]


@dataclass(frozen=True)
class Consensus:
    """What is left of the first labelling, and what was left out."""

    rows: list[dict[str, Any]]
    """Rows of the first labelling that are kept; ``labelling`` holds both provenances."""
    counts: dict[str, int]
    """Solutions: ``kept``, ``disagree``, ``unlabelled``, ``only_in_first``, ``only_in_second``; steps (mode ``steps``):
    ``steps_kept``, ``steps_disagree``, ``steps_unlabelled``."""


def consensus_filter(
    first: Sequence[Row], second: Sequence[Row], *, mode: Mode = "first_error", names: tuple[str, str] = ("A", "B")
) -> Consensus:
    """Filter one labelling by another of the same solutions.

    Args:
        first: labelled rows (rollout or stepwise contract), each with an ``id``; these are kept.
        second: the other labelling; solutions are matched by id.
        mode: ``first_error``: keep a solution whole where both place the first wrong step alike (or both find none);
            ``steps``: keep every solution with at least one step both agree on, the other steps without a label.
        names: what to call the two in messages.

    Raises:
        DataError: repeated ids, no solution in common, or steps that are not the same; the message names the row.
    """
    check_choice("mode", mode, ("first_error", "steps"))
    for labelling, name in ((first, names[0]), (second, names[1])):
        check_unique_ids(labelling, path=name)
    others = {row["id"]: row for row in second}
    counts: Counter[str] = Counter({"kept": 0, "disagree": 0, "unlabelled": 0, "only_in_first": 0})
    rows: list[dict[str, Any]] = []
    for row in first:
        if row["id"] not in others:
            counts["only_in_first"] += 1
            continue
        other = others[row["id"]]
        check_same_steps(row, other, names=names)
        ours, theirs = row_labels(row), row_labels(other)
        if mode == "first_error":
            labels, places = ours, (first_incorrect(ours), first_incorrect(theirs))
            reason = "unlabelled" if None in places else "kept" if places[0] == places[1] else "disagree"
        else:
            pairs = list(zip(verdicts(ours), verdicts(theirs), strict=True))
            said = ["unlabelled" if None in pair else "kept" if pair[0] == pair[1] else "disagree" for pair in pairs]
            counts.update(f"steps_{each}" for each in said)
            labels = [label if each == "kept" else None for label, each in zip(ours, said, strict=True)]
            reason = next((each for each in ("kept", "disagree") if each in said), "unlabelled")
        counts[reason] += 1
        if reason == "kept":
            rows.append(_with_labels(row, labels, other, mode))
    counts["only_in_second"] = len(set(others) - {row["id"] for row in first})
    if counts["only_in_first"] == len(first):
        raise DataError(f"no solution of {names[0]} is in {names[1]}: are they labellings of the same solutions?")
    return Consensus(rows, dict(counts))


def report_on(truth: Sequence[Row], labellings: Mapping[str, Sequence[Row]]) -> dict[str, LabelQuality]:
    """Quality of several labellings against the truth, each over its own solutions that the truth has.

    Args:
        truth: rows with true labels.
        labellings: name -> labelled rows.

    Raises:
        DataError: a labelling without a solution that the truth has, or steps that are not the same.
    """
    known = {row["id"] for row in truth}
    found = {}
    for name, rows in labellings.items():
        common = [row for row in rows if row["id"] in known]
        if not common:
            raise DataError(f"{name} and the truth have no solution in common")
        found[name] = label_quality(common, truth)
    return found


def _with_labels(row: Row, labels: Sequence[Label], other: Row, mode: Mode) -> dict[str, Any]:
    return dict(row) | {
        label_column(row): list(labels),
        "labelling": {
            "labeller": "consensus",
            "mode": mode,
            "first": row.get("labelling"),
            "second": other.get("labelling"),
        },
    }
