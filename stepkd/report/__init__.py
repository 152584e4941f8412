"""Report: one self-contained HTML page of whatever runs left, and the same on a terminal."""

from __future__ import annotations

from typing import Any

from stepkd.lazy import lazily

_HOMES = {"page": "write_report", "folders": "find_folders", "solutions": "Solution"}


def __getattr__(name: str) -> Any:
    return lazily(__name__, _HOMES, name)
