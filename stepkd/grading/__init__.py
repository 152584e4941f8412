"""Answer extraction and equivalence, in worker processes that can be killed.

``Grader`` gives one of four verdicts per completion (correct, incorrect, unparsed, timeout), whatever the text holds.
Importing this package loads neither torch nor math-verify.
"""

from __future__ import annotations

from stepkd.lazy import lazily

_HOMES = {
    "extract": "DEFAULT_EXTRACTORS EXTRACTORS EXTRACTOR_VERSION extract_answer",
    "normalise": "canonical_answer",
    "pool": "Grade Grader GradingConfig Verdict",
}

__getattr__ = lazily(__name__, _HOMES)
