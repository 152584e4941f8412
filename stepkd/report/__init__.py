"""Report: one self-contained HTML page of whatever runs left, and the same on a terminal."""

from __future__ import annotations

from stepkd.lazy import lazily

_HOMES = {"page": "write_report", "folders": "find_folders", "solutions": "Solution"}

__getattr__ = lazily(__name__, _HOMES)
