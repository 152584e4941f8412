"""What a prompted judge is shown beside problem and solution: labelled steps of other problems, those nearest to the
step in question; or other samples of the same problem, as brainstormed ideas (Kadavath et al. 2022, arXiv 2207.05221).

The steps are after descriptions of KG-RAR (Wu et al. 2025, arXiv 2503.01642; its method section was not read), which
retrieves, for a problem and then for its step, from a graph of labelled solutions, has the model rewrite what it found,
and asks the same model about the step. Here the graph is a flat index, both retrievals are one sum, and nothing is
rewritten. That as many correct as incorrect steps are shown, so that they lean to no answer, is ours, and so is the
measure: the TF-IDF cosine of the problems plus that of the steps, with the weights of
:class:`~stepkd.scorers.rules.Gain`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stepkd.data.io import fingerprint
from stepkd.data.sources.contract_rows import to_stepwise
from stepkd.errors import ConfigError, DataError
from stepkd.scorers.rules import Vectors, words_of
from stepkd.scorers.scorer import Row
from stepkd.statistics import FloatArray
from stepkd.steps.format import written_steps
from stepkd.steps.labels import verdicts

_DIGITS = 12
"""Of a similarity, so that rounding on another machine leaves the order as it is."""


class LabelledStep(NamedTuple):
    """A step of the index."""

    problem: str
    """Text of its problem."""
    step: str
    """Its text, without separators."""
    correct: bool
    """What its label says."""


class StepExamples:
    """Index of labelled steps.

    A step that occurs several times in solutions of one problem, with one verdict, counts once.

    Args:
        rows: step-labelled rows (``prompt``, ``completions``, ``labels``, perhaps ``problem_id``), or labelled
            completions. A soft label is correct from 0.5 on, a neutral one is, and a step without a label is left out.
        shots: correct steps, and as many incorrect ones, that are found for a step, at least 1.

    Raises:
        ConfigError: no shots.
        DataError: rows without labels, or no correct or no incorrect step among them.
    """

    def __init__(self, rows: Sequence[Row], *, shots: int = 1) -> None:
        if shots < 1:
            raise ConfigError(f"shots={shots}: must be at least 1")
        self.shots = shots
        self._places: dict[str, set[int]] = defaultdict(set)  # of problems, by what names them
        problems: dict[str, int] = {}
        steps: dict[tuple[int, str, bool], LabelledStep] = {}
        for row in (to_stepwise(row, keep=("problem_id",)) for row in rows):
            text = problem_text(row)
            place = problems.setdefault(text, len(problems))
            for key in _keys(row):
                self._places[key].add(place)
            for step, correct in zip(row["completions"], verdicts(row["labels"]), strict=True):
                if correct is not None and step.strip():
                    steps.setdefault((place, step.strip(), correct), LabelledStep(text, step.strip(), correct))
        self.steps = list(steps.values())
        self._owners = np.array([place for place, _, _ in steps], dtype=np.int64)
        self._by_verdict = [
            np.flatnonzero([each.correct is verdict for each in self.steps]) for verdict in (True, False)
        ]
        if not all(map(len, self._by_verdict)):
            raise DataError(
                f"{len(self.steps)} labelled steps, none of them {'in' * bool(len(self._by_verdict[0]))}correct: a "
                "judge is shown steps of both kinds, give rows that have them",
                path="examples",
                column="labels",
            )
        self._problems, self._texts = Vectors(list(problems)), Vectors([each.step for each in self.steps])

    def nearest(self, row: Row, steps: Sequence[str]) -> list[list[LabelledStep]]:
        """The examples for steps of one problem.

        Args:
            row: the problem's row, whose own steps are never among them: rows with its prompt, up to case and spaces,
                or its ``problem_id`` (or ``id``) are of the same problem.
            steps: texts.

        Returns:
            For each step :attr:`shots` correct and as many incorrect ones, or all that there are, the nearest last;
            equally near ones are taken, and stand, in the order of the rows.
        """
        own = set().union(*(self._places.get(key, set()) for key in _keys(row)))
        of_problems = self._problems.cosines([problem_text(row)])[0]
        of_problems[list(own)] = -math.inf
        near_SN = np.round(self._texts.cosines(steps) + of_problems[self._owners], _DIGITS)
        return [[self.steps[i] for i in self._chosen(near_N)] for near_N in near_SN]

    def provenance(self) -> dict[str, Any]:
        """What a job notes of the index, as JSON values."""
        found = {"steps": len(self.steps), "shots": self.shots}
        return found | {"fingerprint": fingerprint([each._asdict() for each in self.steps])}

    def _chosen(self, near_N: FloatArray) -> list[int]:
        chosen: list[int] = []
        for numbers in self._by_verdict:
            values = near_N[numbers]
            least = np.partition(values, -self.shots)[-self.shots] if len(values) > self.shots else -math.inf
            able = numbers[(values >= least) & (values > -math.inf)]  # few of many: sorting all takes ten times longer
            chosen += able[np.argsort(-near_N[able], kind="stable")][: self.shots].tolist()
        return sorted(chosen, key=lambda i: (near_N[i], i))


IDEAS = 5
"""Samples of a problem that are shown, as many as in the paper."""


class Ideas:
    """Index of sampled solutions by problem.

    A text that was sampled twice is shown twice, as the paper does: how often it came is part of what is known.

    Args:
        rows: completions, or rows with step texts; those of one problem share its text, up to case and spaces. Ids do
            not count: those of two files may be counted from 0 both.

    Raises:
        DataError: a row without a solution's text.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._texts = [row.get("completion") or "".join(written_steps(row.get("completions") or ())) for row in rows]
        self._numbers: dict[str, list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            if not self._texts[number].strip():
                raise DataError(
                    "no text of a solution (completion, or completions): drop the row",
                    path=str(row.get("id", "?")),
                    column="completion",
                )
            for text in _problem_texts(row):
                self._numbers[text].append(number)

    def of(self, row: Row) -> list[str]:
        """The first :data:`IDEAS` samples of a row's problem, in the order of their rows.

        Raises:
            DataError: there are none.
        """
        numbers = sorted({number for text in _problem_texts(row) for number in self._numbers.get(text, ())})
        if not numbers:
            raise DataError(
                "the judge's ideas hold no sample of this problem (by its text): sample it too, or drop the row",
                path=str(row.get("id", "?")),
                column="prompt",
            )
        return [self._texts[number].strip() for number in numbers[:IDEAS]]

    def provenance(self) -> dict[str, Any]:
        """What a job notes of the index, as JSON values."""
        return {
            "samples": len(self._texts),
            "shown": IDEAS,
            "fingerprint": fingerprint([{"text": text} for text in self._texts]),
        }


def problem_text(row: Row) -> str:
    """A row's problem as text; of chat messages all that they say."""
    prompt = row.get("prompt") or ""
    return (prompt if isinstance(prompt, str) else "\n\n".join(str(each["content"]) for each in prompt)).strip()


def _problem_texts(row: Row) -> set[str]:
    """The problem's text, of chat messages also the last one alone."""
    prompt = row.get("prompt")
    last = [prompt[-1]["content"]] if isinstance(prompt, list) and prompt else []
    return {f"text {' '.join(words_of(text))}" for text in (problem_text(row), *last)}


def _keys(row: Row) -> set[str]:
    """What names a row's problem: its texts and its ids."""
    name = row.get("id") if row.get("problem_id") is None else row["problem_id"]
    return _problem_texts(row) | (set() if name is None else {f"id {name}"})
