"""Two labellings of the same solutions: what they agree on.

Keeping a solution only where Monte-Carlo labels and a judge place the first error alike is the filter of Zhang et al.
2025 (arXiv 2501.07301), who keep about 40% of their data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stepkd.data.rows import check_unique_ids
from stepkd.errors import DataError
from stepkd.labels.convert import Converted
from stepkd.labels.quality import check_same_steps, row_labels
from stepkd.labels.step_labels import Row
from stepkd.steps.labels import first_incorrect


def consensus_filter(first: Sequence[Row], second: Sequence[Row], *, names: tuple[str, str] = ("A", "B")) -> Converted:
    """Keep of one labelling the solutions whose first incorrect step another one places alike (or both find none).

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
