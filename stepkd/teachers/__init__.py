"""Teachers: models that say what they would have written at every position of a student's text."""

from __future__ import annotations

from stepkd.lazy import lazily

_HOMES = {
    "cache": "CachedTeacher write_cache",
    "config": "Cached Local Routed SelfAverage SelfBase SelfSnapshot Served TeacherConfig TopK",
    "local": "LocalTeacher",
    "routed": "RoutedTeacher",
    "server": "ServerTeacher",
    "signals": "HiddenSignals Signals Teacher",
}

__getattr__ = lazily(__name__, _HOMES)
