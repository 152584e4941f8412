"""What of a reference solution each step adds, and what it only says again: a dense reward without a model.

After StepSearch (arXiv 2505.15107, section 3), where a round of searching is worth the gain in similarity to the gold
documents, less the share of documents that were there before. Here the gold units are the lines of the row's own
``solution``, and a step takes the place of a round: a transfer, not the paper's setting. It is a heuristic: a right
step that goes another way than the solution earns nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from stepkd.errors import DataError
from stepkd.scorers.scorer import Meaning, Solutions

NGRAM = 4
"""Words that are looked for in earlier steps; a shorter step counts as one."""

_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[^\w\s]")


class GainScorer:
    """Scores ``(1 + gain - repetition) / 2`` of every step; 0.5 for one that adds nothing and repeats nothing.

    With ``c`` the TF-IDF cosine of a step to each of the n lines of the solution, and ``m`` the best of it so far,

    - gain: ``1/n sum max(c - m, 0)``, in [0, 1]; those of all steps of a solution sum to at most 1;
    - repetition: share of the step's runs of four words that an earlier step has, in [0, 1].
    """

    meaning: Meaning = "correctness"

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`.

        Raises:
            DataError: a row without a solution.
        """
        return [[self._of_solution(problem.row, steps) for steps in problem.solutions] for problem in problems]

    def provenance(self) -> dict[str, Any]:
        """See :class:`~stepkd.scorers.scorer.StepScorer`."""
        return {"scorer": "gain", "ngram": NGRAM, "meaning": self.meaning}

    def _of_solution(self, row: Mapping[str, Any], steps: Sequence[str]) -> list[float]:
        solution = row.get("solution")
        units = [Counter(words) for line in str(solution or "").splitlines() if (words := _words(line))]
        if not units:
            raise DataError(f"row {row.get('id')!r} has no 'solution': the scorer 'gain' compares steps with its lines")
        frequency = Counter(word for unit in units for word in unit)
        best = [0.0] * len(units)
        seen: set[tuple[str, ...]] = set()
        scores = []
        for step in steps:
            words = _words(step)
            vector = Counter(words)
            found = [_cosine(vector, unit, frequency, len(units)) for unit in units]
            gain = math.fsum(max(c - m, 0.0) for c, m in zip(found, best, strict=True)) / len(units)
            best = [max(pair) for pair in zip(found, best, strict=True)]
            runs = {tuple(words[i : i + NGRAM]) for i in range(max(len(words) - NGRAM + 1, 1))} if words else set()
            repetition = len(runs & seen) / len(runs) if runs else 0.0
            seen |= runs
            scores.append((1 + gain - repetition) / 2)
        return scores


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _cosine(a: Counter[str], b: Counter[str], frequency: Counter[str], units: int) -> float:
    """Of counts weighed by ``log(1 + units / frequency)``; a word that no unit has weighs as one that one unit has."""

    def weight(word: str) -> float:
        return math.log(1 + units / max(frequency[word], 1))

    def length(vector: Counter[str]) -> float:
        return math.sqrt(math.fsum((count * weight(word)) ** 2 for word, count in vector.items()))

    product = math.fsum(a[word] * b[word] * weight(word) ** 2 for word in a.keys() & b.keys())
    return min(product / (length(a) * length(b)), 1.0) if product else 0.0
