"""From labelled rows to other kinds of rows, for ``stepkd convert``.

A converter is a class of settings with a method from rows to rows and counts of what was left out. Feedback and pairs
from outcomes are in :mod:`stepkd.labels.feedback`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stepkd.data.rows import DEMONSTRATION
from stepkd.data.step_labels import to_stepwise, trl_row, write_math_shepherd
from stepkd.errors import DataError
from stepkd.labels.feedback import Cast, Converted, ConverterConfig, completion_of, outcome_of, write_checked
from stepkd.labels.quality import label_column, row_labels
from stepkd.labels.step_labels import Row
from stepkd.randomness import generator
from stepkd.runs.files import write_jsonl
from stepkd.steps.labels import Label, verdicts

KEPT = ("labelling", "label_facts", "step_values", "task", "meta", "problem_id")
"""Columns of a labelled rollout that its stepwise row keeps."""


def convert_rows(rows: Sequence[Row], to: ConverterConfig) -> Converted:
    """Convert labelled rows.

    Args:
        rows: rows with step labels.
        to: a converter.

    Raises:
        DataError: rows it cannot convert, or none left.
    """
    converted = to.convert(rows)
    if not converted.rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in converted.counts.items() if count)
        raise DataError(f"none of {len(rows)} rows is left ({reasons or 'no reason given'})")
    return converted


@dataclass(frozen=True, kw_only=True)
class Stepwise(ConverterConfig):
    """Prompt, completions, labels, with what else the rows carry."""

    soft: bool = False
    """Whether the estimated values are taken as labels."""

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        done = [to_stepwise(row, soft=self.soft, keep=KEPT) for row in rows]
        return Converted(done, {"rows": len(done)})


@dataclass(frozen=True, kw_only=True)
class MathShepherd(Cast):
    """Math-Shepherd's texts with step tags and + or -."""

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        counts: Counter[str] = Counter()
        stepwise = [to_stepwise(row, soft=self.soft, keep=KEPT) for row in rows]
        cast = [trl_row(row, neutral=self.neutral, threshold=self.threshold, counts=counts) for row in stepwise]
        kept = [row for row in cast if row is not None]
        return Converted(kept, {"rows": len(kept)} | dict(counts))

    def write(self, rows: Iterable[Row], path: str | Path) -> int:
        """See :class:`ConverterConfig`."""
        return write_math_shepherd(rows, path)


@dataclass(frozen=True, kw_only=True)
class TRLStepwise(MathShepherd):
    """TRL's stepwise-supervision type: one true or false per step."""

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        done = super().convert(rows)
        columns = ("prompt", "completions", "labels")
        return Converted([{name: row[name] for name in columns} for row in done.rows], done.counts)

    def write(self, rows: Iterable[Row], path: str | Path) -> int:
        """See :class:`ConverterConfig`."""
        return ConverterConfig.write(self, rows, path)


@dataclass(frozen=True, kw_only=True)
class Balanced(ConverterConfig):
    """The same rows with as many correct as incorrect labels at every step number."""

    seed: int = 0
    """Keys which labels in surplus go."""

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        before = [row_labels(row) for row in rows]
        for row, labels in zip(rows, before, strict=True):
            if odd := [label for label in labels if isinstance(label, float) or label not in (None, -1, 0, 1)]:
                raise DataError(
                    f"{odd[0]!r} is no hard label (true, false, -1, 0, 1): soft labels cannot be balanced",
                    path=str(row.get("id", "?")),
                    column=label_column(row),
                )
        after = balance_by_prefix_length(before, self.seed)
        kept = [
            dict(row) | {label_column(row): labels}
            for row, labels in zip(rows, after, strict=True)
            if any(label is not None for label in labels)
        ]
        signed = [sum(_sign(label) != 0 for labels in each for label in labels) for each in (before, after)]
        counts = {"rows": len(kept), "rows_without_labels_now": len(rows) - len(kept)}
        return Converted(kept, counts | {"labels_before": signed[0], "labels_kept": signed[1]})

    def write(self, rows: Iterable[Row], path: str | Path) -> int:
        """See :class:`ConverterConfig`."""
        return write_jsonl(path, map(dict, rows))


def balance_by_prefix_length(labels: Sequence[Sequence[Label]], seed: int) -> list[list[Label]]:
    """Make positive and negative labels equal in number at every prefix length, by dropping labels in surplus.

    Without it a model learns "early is good", because an early prefix can nearly always still be solved. Which labels
    go is drawn by the stream of ``(seed, "balance", step)``. Where all labels of a prefix length have one sign, all go.

    Args:
        labels: per solution true or false, or -1/0/1 of which 0 counts as neither and stays; None: no label.
        seed: seed of the run.

    Returns:
        The labels, None in the place of those in surplus.

    Source: GLoRe (arXiv 2402.10963).
    """
    kept = [list(each) for each in labels]
    for step in range(max(map(len, kept), default=0)):
        signs = [_sign(each[step]) if step < len(each) else 0 for each in kept]
        positives, negatives = ([i for i, each in enumerate(signs) if each == sign] for sign in (1, -1))
        surplus = max(positives, negatives, key=len)
        for i in generator(seed, "balance", step).permutation(len(surplus))[min(len(positives), len(negatives)) :]:
            kept[surplus[i]][step] = None
    return kept


def _sign(label: Label) -> int:
    """1, -1, or 0 for a neutral rating and for no label."""
    return -1 if label is False else 0 if label is None else int(label)


@dataclass(frozen=True, kw_only=True)
class Demonstrations(ConverterConfig):
    """Solutions whose answer is correct, to fine-tune a model on its own (rejection sampling: RFT, arXiv 2308.01825;
    STaR, arXiv 2203.14465 without its hints); texts without sampled ids, so that one with another tokenizer may learn.
    """

    clean: bool = False
    """Whether those that hold an incorrect step are left out."""

    def convert(self, rows: Sequence[Row]) -> Converted:
        """See :class:`ConverterConfig`."""
        counts: Counter[str] = Counter()
        kept = []
        for row in rows:
            if (reason := self._refused(row)) is not None:
                counts[reason] += 1
                continue
            done = {"prompt": row["prompt"], "solution": completion_of(row).text}
            names = ("id", "answer", "problem_id", "task", "meta", "labelling")
            kept.append(done | {name: row[name] for name in names if row.get(name) is not None})
        return Converted(kept, {"rows": len(kept)} | dict(sorted(counts.items())))

    def write(self, rows: Iterable[Row], path: str | Path) -> int:
        """See :class:`ConverterConfig`."""
        return write_checked(rows, path, DEMONSTRATION)

    def _refused(self, row: Row) -> str | None:
        """Why a solution is no demonstration; None if it is one."""
        correct = outcome_of(row)
        if correct is None:
            return "ungraded"
        if not correct:
            return "wrong_answer"
        if row.get("finish") == "length":  # the answer is there, and no end: it would teach to go on for ever
            return "cut_off"
        if self.clean and row.get(label_column(row)) is not None and False in verdicts(row_labels(row)):
            return "wrong_step"
        return None
