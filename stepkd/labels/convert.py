"""From labelled rows to other kinds of rows: the registry behind ``stepkd label --to``.

A converter is a function from rows and options to rows and counts of what was left out. To add one, write the function
and put it into :data:`CONVERTERS`. Feedback and pairs from outcomes are in :mod:`stepkd.labels.feedback`.

``demonstrations`` keeps the solutions whose answer is correct, to fine-tune a model on its own (rejection sampling:
RFT, arXiv 2308.01825; STaR, arXiv 2203.14465 without its hints); ``clean_demonstrations`` drops those among them with
an incorrect step. The rows hold texts and no sampled ids, so that a model with another tokenizer may learn from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stepkd.data.rows import DEMONSTRATION, PREFERENCE, ROLLOUT, STEPWISE, UNPAIRED, validate
from stepkd.data.step_labels import to_stepwise, trl_row, write_math_shepherd, write_stepwise
from stepkd.errors import DataError, check_choice
from stepkd.labels.feedback import Converted, ConvertOptions, Row, binary, preference, unpaired, writer
from stepkd.labels.quality import label_column, row_labels
from stepkd.randomness import generator
from stepkd.runs.files import write_jsonl
from stepkd.steps.format import written_steps
from stepkd.steps.labels import Label, verdicts

KEPT = ("labelling", "label_facts", "step_values", "task", "meta", "problem_id")
"""Columns of a labelled rollout that its stepwise row keeps."""


@dataclass(frozen=True)
class Converter:
    """One kind of rows to convert to."""

    name: str
    """Word behind ``--to``."""
    help: str
    """One line for listings."""
    convert: Callable[[Sequence[Row], ConvertOptions], Converted]
    """Labelled rows (rollout or stepwise contract) and options to new rows."""
    write: Callable[[Iterable[Row], str | Path], int] = write_stepwise
    """Writes the new rows; returns their number."""


def convert_rows(rows: Sequence[Row], to: str, options: ConvertOptions | None = None) -> Converted:
    """Convert labelled rows.

    Args:
        rows: rows with step labels.
        to: name of a converter.
        options: its settings.

    Raises:
        ConfigError: no converter of that name.
        DataError: rows it cannot convert, or none left.
    """
    check_choice("--to", to, CONVERTERS)
    converted = CONVERTERS[to].convert(rows, options or ConvertOptions())
    if not converted.rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in converted.counts.items() if count)
        raise DataError(f"none of {len(rows)} rows is left ({reasons or 'no reason given'})")
    return converted


def _to_stepwise(rows: Sequence[Row], options: ConvertOptions) -> Converted:
    done = [to_stepwise(row, soft=options.soft, keep=KEPT) for row in rows]
    return Converted(done, {"rows": len(done)})


def _to_trl(rows: Sequence[Row], options: ConvertOptions) -> Converted:
    done = _to_math_shepherd(rows, options)
    columns = ("prompt", "completions", "labels")
    return Converted([{name: row[name] for name in columns} for row in done.rows], done.counts)


def _to_math_shepherd(rows: Sequence[Row], options: ConvertOptions) -> Converted:
    counts: Counter[str] = Counter()
    cast = [
        trl_row(row, neutral=options.neutral, threshold=options.threshold, counts=counts)
        for row in _to_stepwise(rows, options).rows
    ]
    kept = [row for row in cast if row is not None]
    return Converted(kept, {"rows": len(kept)} | dict(counts))


def _balanced(rows: Sequence[Row], options: ConvertOptions) -> Converted:
    before = [row_labels(row) for row in rows]
    for row, labels in zip(rows, before, strict=True):
        if odd := [label for label in labels if isinstance(label, float) or label not in (None, -1, 0, 1)]:
            raise DataError(
                f"{odd[0]!r} is no hard label (true, false, -1, 0, 1): soft labels cannot be balanced",
                path=str(row.get("id", "?")),
                column=label_column(row),
            )
    after = balance_by_prefix_length(before, options.seed)
    kept = [
        dict(row) | {label_column(row): labels}
        for row, labels in zip(rows, after, strict=True)
        if any(label is not None for label in labels)
    ]
    signed = [sum(_sign(label) != 0 for labels in each for label in labels) for each in (before, after)]
    left_out = len(rows) - len(kept)
    return Converted(
        kept,
        {"rows": len(kept), "rows_without_labels_now": left_out, "labels_before": signed[0], "labels_kept": signed[1]},
    )


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


def _to_demonstrations(rows: Sequence[Row], options: ConvertOptions, *, clean: bool = False) -> Converted:
    counts: Counter[str] = Counter()
    kept = []
    for row in rows:
        if (reason := _no_demonstration(row, clean)) is not None:
            counts[reason] += 1
            continue
        text = row["completion"] if "completion" in row else "".join(written_steps(row["completions"]))
        done = {"prompt": row["prompt"], "solution": text}
        for name in ("id", "answer", "problem_id", "task", "meta", "labelling"):
            if row.get(name) is not None:
                done[name] = row[name]
        kept.append(validate(done, DEMONSTRATION, path=str(row.get("id", "?")), extra="keep"))
    return Converted(kept, {"rows": len(kept)} | dict(sorted(counts.items())))


def _no_demonstration(row: Row, clean: bool) -> str | None:
    """Why a solution is no demonstration; None if it is one."""
    correct = row.get("correct", row.get("outcome"))
    if correct is None:
        return "ungraded"
    if not correct:
        return "wrong_answer"
    if row.get("finish") == "length":  # the answer is there, and no end: it would teach to go on for ever
        return "cut_off"
    if clean and row.get(label_column(row)) is not None and False in verdicts(row_labels(row)):
        return "wrong_step"
    return None


def _write_lines(rows: Iterable[Row], path: str | Path) -> int:
    return write_jsonl(path, (dict(row) for row in rows))


CONVERTERS: dict[str, Converter] = {
    each.name: each
    for each in (
        Converter("stepwise", "prompt, completions, labels, with what else the rows carry", _to_stepwise),
        Converter("trl", "TRL's stepwise-supervision type: one true or false per step", _to_trl),
        Converter(
            "math_shepherd", "Math-Shepherd's texts with step tags and +/-", _to_math_shepherd, write_math_shepherd
        ),
        Converter(
            "balanced", "the same rows with as many right as wrong labels at every step number", _balanced, _write_lines
        ),
        Converter(
            "demonstrations", "solutions whose answer is right, to fine-tune on", _to_demonstrations, _write_lines
        ),
        Converter(
            "clean_demonstrations",
            "the same without those that have a wrong step",
            partial(_to_demonstrations, clean=True),
            _write_lines,
        ),
        Converter("binary", "the same rows with right or wrong for every step", binary, writer(ROLLOUT, STEPWISE)),
        Converter("unpaired", "TRL's KTO rows: prompt, completion, label = the outcome", unpaired, writer(UNPAIRED)),
        Converter(
            "preference", "pairs of a right and a wrong solution of each problem", preference, writer(PREFERENCE)
        ),
    )
}
"""Converters by name."""
