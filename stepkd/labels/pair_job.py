"""The jobs that make preference pairs and sample for it; jobs of :mod:`stepkd.runs.job`.

One phase. A builder names its items in groups and turns a group into one record per item; when no group is missing,
the records' rows go to ``pairs.jsonl`` in the order of the items, with a summary of what was left out and what it cost.
Whatever a builder draws is keyed by the item's number and its groups have a fixed composition, so the pairs do not
depend on the number of ranks or on interruptions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stepkd.data.rows import STEP_PREFERENCE, validate
from stepkd.data.spec import PAIRS_NAME
from stepkd.labels.settings import PairJobConfig, StepPairConfig, TreePairConfig
from stepkd.labels.step_labels import Row
from stepkd.labels.step_pairs import step_pair_builder
from stepkd.labels.tree_pairs import tree_pair_builder
from stepkd.labels.workbench import PairBuilder, finish_job
from stepkd.runs.job import ALONE, SUMMARY_NAME, Job, JobOptions, numbered

KIND, PAIRS = "pair job", "pairs"


_BUILDERS: dict[type[PairJobConfig], Callable[[Any], PairBuilder]] = {
    StepPairConfig: step_pair_builder,
    TreePairConfig: tree_pair_builder,
}


def run_pair_job(
    config: PairJobConfig, *, options: JobOptions = ALONE, builder: PairBuilder | None = None
) -> dict[str, Any] | None:
    """Run a pair job, resume it, or do one rank's share of it.

    Args:
        config: its settings.
        options: how this process takes part.
        builder: what makes the pairs, in place of the one that ``config`` describes.

    Returns:
        The summary, written to ``summary.json`` beside ``pairs.jsonl``; None while units of other ranks are missing
        (the last rank to finish writes them).

    Raises:
        ConfigError: the folder holds another job (its settings are named), or something else.
        DataError: rows that cannot be used; or no pair could be made, and the summary says why.
        ModelError: a model that cannot be used.
        MachineError: the folder cannot be written.
        StepkdError: rank 0 does not come.
    """
    job = Job(Path(config.out), KIND, (PAIRS_NAME, SUMMARY_NAME), options)
    job.check()
    made: PairBuilder = builder or _BUILDERS[type(config)](config)

    def work(items: Sequence[int]) -> list[dict[str, Any]]:
        records = made.work(items)
        for record in records:
            for row in record["rows"]:
                validate(row, STEP_PREFERENCE, path=record["id"], extra="keep")
        return records

    with made.bench.grader:
        job.begin(made.bench.settings() | {"pairing": made.pairing})
        units = numbered(made.groups())
        job.work(PAIRS, units, work, _pairs_per_item)
        found = job.rows(PAIRS, units)
    if found is None:
        return None
    records = drop_repeated_pairs(found)
    summary = summarise_pairs(records) | made.summary(records)
    rows = [row for record in records for row in record["rows"]]
    return finish_job(job, PAIRS_NAME, rows, summary, nothing=f"no pair could be made from {summary['items']} items")


def drop_repeated_pairs(records: Sequence[Row]) -> list[dict[str, Any]]:
    """Keep the first of equal pairs of one problem, and count the others as ``repeated_pair``.

    Several solutions of a problem may make the same mistake at the same place; its pair should not count twice.
    """
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for record in records:
        rows = []
        for row in record["rows"]:
            problem = str(row.get("problem_id", row["prompt"]))
            key = (problem, tuple(row.get("prefix", ())), row["chosen"], row["rejected"])
            if key not in seen:
                seen.add(key)
                rows.append(row)
        repeated = len(record["rows"]) - len(rows)
        dropped = dict(record["dropped"]) | ({"repeated_pair": repeated} if repeated else {})
        kept.append(dict(record) | {"rows": rows, "dropped": dropped})
    return kept


def summarise_pairs(records: Sequence[Row]) -> dict[str, Any]:
    """Summary of a finished pair job; depends on nothing but the records.

    Returns:
        ``items``, ``items_with_pairs``, ``pairs``, ``problems`` (those with a pair), ``dropped`` by reason,
        ``by_position`` (pairs and their share by the number of steps in the prefix) and the sums of the ``facts``.
    """
    rows = [row for record in records for row in record["rows"]]
    dropped: Counter[str] = Counter()
    facts: Counter[str] = Counter()
    for record in records:
        dropped.update(record["dropped"])
        facts.update(record["facts"])
    positions = Counter(len(row.get("prefix", ())) for row in rows)
    return {
        "items": len(records),
        "items_with_pairs": sum(bool(record["rows"]) for record in records),
        "pairs": len(rows),
        "problems": len({str(row.get("problem_id", row.get("id"))) for row in rows}),
        "dropped": {reason: dropped[reason] for reason in sorted(dropped)},
        "by_position": [
            {"position": position, "pairs": positions[position], "share": positions[position] / len(rows)}
            for position in sorted(positions)
        ],
        "facts": {name: facts[name] for name in sorted(facts)},
    }


def _pairs_per_item(records: Sequence[Row]) -> dict[str, tuple[float, float]]:
    # An item without facts was left out before anything was drawn for it.
    return {"items with a pair": (sum(bool(r["rows"]) for r in records), sum(bool(r["facts"]) for r in records))}
