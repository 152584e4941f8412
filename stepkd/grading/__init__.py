"""Answer extraction and equivalence, in worker processes that can be killed.

``Grader`` gives one of four verdicts per completion (correct, wrong, unparsed, timeout), whatever the text holds.
``accuracy_reward`` is the same as a reward function. Importing this package loads neither torch nor math-verify.
"""

from __future__ import annotations

from stepkd.grading.extract import DEFAULT_EXTRACTORS, EXTRACTOR_VERSION, EXTRACTORS, extract_answer
from stepkd.grading.normalise import canonical_answer
from stepkd.grading.pool import Grade, Grader, Verdict, accuracy_reward, verdict_counts

__all__ = [
    "DEFAULT_EXTRACTORS",
    "EXTRACTORS",
    "EXTRACTOR_VERSION",
    "Grade",
    "Grader",
    "Verdict",
    "accuracy_reward",
    "canonical_answer",
    "extract_answer",
    "verdict_counts",
]
