"""``rows``: files and hub datasets that are in contract form already, or become so through ``columns``.

Ids and answers written as numbers become texts (42 -> "42", 7.0 -> "7"); nothing else is touched. Other columns are
kept; one spelt nearly like a missing contract column is an error unless ``extra_columns: keep``.
"""

from __future__ import annotations

from stepkd.data.sources.registry import Option, Options, RawRow, Row, Source, as_text, register


def _map(raw: RawRow, options: Options) -> Row:
    texts = {name: as_text(raw[name]) for name in ("id", "problem_id", "answer") if name in raw}
    return dict(raw) | texts


ROWS = register(
    Source(
        name="rows",
        help="JSON Lines, JSON, Parquet, a saved dataset or a hub id, in contract form",
        contract=None,
        map_row=_map,
        options={
            "contract": Option("auto", "problem, demonstration, stepwise, preference, step_preference or rollout"),
            "extra_columns": Option("check", "check (refuse near misses), keep (all) or error (refuse all)"),
        },
    )
)
"""The source for rows in contract form."""
