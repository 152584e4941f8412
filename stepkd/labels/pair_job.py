"""The pair job: items to preference rows, for builders that sample; sharded and resumable.

One phase. A builder names its items in groups and turns a group into one record per item; the records are appended to
the shards (:mod:`stepkd.labels.shards`), and when no group is missing their rows go to ``pairs.jsonl`` in the order of
the items, with a summary of what was left out and what it cost. Whatever a builder draws is keyed by the item's
number and its groups have a fixed composition, so the pairs do not depend on the number of ranks or on interruptions.

A record holds ``id``, ``index`` and
    rows: the item's preference rows, perhaps none;
    dropped: number of pairs (or of the whole item) left out, by reason;
    facts: whole numbers to be added up over the job (tokens generated, continuations drawn, ...); none for an item
        that was left out before anything was drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stepkd.data.rows import STEP_PREFERENCE, Contract, validate
from stepkd.data.spec import PAIRS_NAME
from stepkd.grading import Grader
from stepkd.labels.sharded_job import Report, ShardedJob

PAIRS = "pairs"
"""Name of the phase."""


class PairBuilder(Protocol):
    """What makes the pairs of an item."""

    def groups(self) -> list[list[int]]:
        """Item numbers of every group, all items once; depends on nothing but the data and the settings."""
        ...

    def work(self, items: Sequence[int]) -> list[dict[str, Any]]:
        """One record per item, see the module's text; the record of an item does not depend on the others."""
        ...


@dataclass(frozen=True)
class PairParts:
    """What a pair job works with."""

    builder: PairBuilder
    """Makes the pairs."""
    grader: Grader
    """Judges final answers; closed at the job's end."""
    manifest: Mapping[str, Any]
    """What decides the pairs; of kind :data:`~stepkd.labels.folder.PAIR_KIND`."""
    contract: Contract = STEP_PREFERENCE
    """What every row must be."""
    summarise: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]] | None = None
    """Further entries of the summary, from all records; None: none."""


def pair_record(
    identity: str,
    index: int,
    rows: Sequence[dict[str, Any]] = (),
    *,
    dropped: Mapping[str, int] | None = None,
    facts: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The record of one item; reasons with a count of 0 are left out.

    Args:
        identity: id of the item, unique over the job.
        index: its number.
        rows: its preference rows.
        dropped: what was left out, by reason.
        facts: whole numbers to be added up.
    """
    reasons = {reason: count for reason, count in (dropped or {}).items() if count}
    return {"id": identity, "index": index, "rows": list(rows), "dropped": reasons, "facts": dict(facts or {})}


def run_pair_job(
    parts: PairParts,
    out: str,
    *,
    rank: int = 0,
    world_size: int = 1,
    launch: str | None = None,
    overwrite: bool = False,
    wait_s: float = 1800.0,
    report: Report | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any] | None:
    """Run a pair job, go on with it, or do one rank's share of it.

    Args:
        parts: builder, grader and manifest.
        out: the job's folder.
        rank, world_size, launch, overwrite, wait_s, report, say: see :class:`~stepkd.labels.sharded_job.ShardedJob`.

    Returns:
        The summary, written to ``summary.json`` beside ``pairs.jsonl``; None while groups of other ranks are missing
        (the last rank to finish writes them).

    Raises:
        ConfigError: the folder holds another job (its settings are named), or something else.
        DataError: no pair could be made; the summary says why.
        StepkdError: the folder cannot be written, or rank 0 does not come.
    """
    job = ShardedJob(
        Path(out),
        rank=rank,
        world_size=world_size,
        launch=launch,
        overwrite=overwrite,
        wait_s=wait_s,
        report=report,
        say=say,
    )
    with parts.grader:
        job.begin(parts.manifest)
        groups = parts.builder.groups()

        def work(items: Sequence[int]) -> list[dict[str, Any]]:
            records = parts.builder.work(items)
            for record in records:
                for row in record["rows"]:
                    validate(row, parts.contract, path=record["id"], extra="keep")
            return records

        job.work(PAIRS, groups, work, _pairs_per_item)
        records = job.records(PAIRS, groups)
    if records is None:
        return None
    records = drop_repeated_pairs(records)
    summary = summarise_pairs(records)
    if parts.summarise is not None:
        summary |= parts.summarise(records)
    refuse = None
    if not summary["pairs"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary["dropped"].items())
        refuse = f"no pair could be made from {summary['items']} items ({reasons or 'no reason given'})"
    job.write(PAIRS_NAME, (row for record in records for row in record["rows"]), summary, refuse=refuse)
    return summary


def drop_repeated_pairs(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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


def summarise_pairs(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


def _pairs_per_item(records: Sequence[Mapping[str, Any]]) -> tuple[str, int, int]:
    # An item without facts was left out before anything was drawn for it.
    return "items with a pair", sum(bool(r["rows"]) for r in records), sum(bool(r["facts"]) for r in records)
