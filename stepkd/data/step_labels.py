"""Step-labelled rows to training targets (one probability vector per step, or none), and to files.

Nothing is guessed: a kind that was not declared, a neutral rating without a rule, or a soft label for three classes is
an error that names the row.

Files follow the STEPWISE contract, TRL's stepwise-supervision type, or Math-Shepherd's texts. TRL's type is the
contract's ``prompt``, ``completions`` and ``labels``, with one boolean per step: it knows neither ratings nor chances
nor unlabelled steps. :func:`trl_row` casts on purpose and counts what it did. TRL had a trainer for it (``PRMTrainer``)
until it was removed in 2026 (huggingface/trl pull request 7133); the type lives on in its published data sets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stepkd.data.rows import COMPLETION, STEPWISE, Row, validate
from stepkd.data.sources.math_shepherd import FIRST_STEP, TAG
from stepkd.errors import DataError, check_bounds, check_choice
from stepkd.runs.files import write_file, write_jsonl
from stepkd.steps.labels import ANY_SUCCESS, Label, LabelKind, Neutral, check_threshold, label_kind, verdicts

Target = tuple[float, ...]


@dataclass(frozen=True)
class LabelRule:
    """How step labels become targets."""

    kind: Literal["auto"] | LabelKind = "auto"
    """What the labels must be: correct/incorrect, -1/0/1, or chances in [0, 1]; ``auto`` takes what each row has."""
    after_error: Literal["keep", "truncate", "mask"] = "truncate"
    """Steps after the first incorrect one: keep their labels, cut the solution off there, or leave it whole without
    these labels. A soft label is an incorrect step below ``harden``, and without it only where it is 0. A causal model
    gives the same gradient for ``truncate`` and ``mask``."""
    neutral: Neutral = "correct"
    """What a rating of 0 means to a head of two classes."""
    harden: float | None = None
    """Threshold, in (0, 1), from which on a soft label becomes correct, and below it incorrect; None keeps labels soft.
    One below the smallest share of continuations, such as 0.001, means "any continuation succeeded"."""
    scope: Literal["steps", "outcome"] = "steps"
    """``steps``: a process reward model; ``outcome``: one label at the last step, whether the answer is correct (an
    outcome reward model)."""

    def __post_init__(self) -> None:
        check_bounds("labels.", self)
        if self.harden is not None:
            check_threshold(self.harden, "labels.harden")


def step_targets(row: Mapping[str, Any], num_steps: int, num_classes: int, rule: LabelRule) -> list[Target | None]:
    """Target of every step of a row.

    Args:
        row: has ``labels`` (step-labelled rows), or ``step_labels`` / ``step_values`` (completions), or, for
            ``scope="outcome"``, ``outcome`` / ``correct``.
        num_steps: how many steps the row has.
        num_classes: 2 or 3, worst to best.
        rule: see :class:`LabelRule`.

    Returns:
        One target per step; None: not trained on.

    Raises:
        DataError: no labels, another number than steps, another kind than declared, or soft labels for three classes.
    """
    name = str(row.get("id", "?"))
    if rule.scope == "outcome":
        return [None] * (num_steps - 1) + [_outcome(row, name, num_classes)]
    column, labels = _labels(row, rule)

    def refused(message: str) -> DataError:
        return DataError(message, path=name, column=column)

    if labels is None:
        raise refused("no step labels: label the row first (stepkd label)")
    if len(labels) != num_steps:
        raise refused(f"{len(labels)} labels for {num_steps} steps")
    if all(label is None for label in labels):
        return [None] * num_steps
    try:
        kind = label_kind(labels)
    except DataError as error:
        raise refused(str(error)) from error
    if rule.kind not in ("auto", kind):
        raise refused(f"labels are of kind {kind!r} and labels.kind asks for {rule.kind!r}: nothing is cast silently")
    if kind == "soft" and rule.harden is None and num_classes != 2:
        raise refused(f"soft labels for {num_classes} classes: they need two classes, or set labels.harden")
    neutral = rule.neutral if num_classes == 2 else "correct"
    marks = verdicts(labels, neutral=neutral, threshold=ANY_SUCCESS if rule.harden is None else rule.harden)
    targets = [
        _target(label, mark, kind, num_classes, rule.harden is None) for label, mark in zip(labels, marks, strict=True)
    ]
    if rule.after_error != "keep" and False in marks:
        incorrect = marks.index(False)
        targets[incorrect + 1 :] = [None] * (num_steps - incorrect - 1)
    return targets


def _labels(row: Mapping[str, Any], rule: LabelRule) -> tuple[str, Sequence[Any] | None]:
    rest = ("step_values", "step_labels") if rule.kind == "soft" else ("step_labels", "step_values")
    column = next((each for each in ("labels", *rest) if row.get(each) is not None), "labels")
    return column, row.get(column)


def _outcome(row: Mapping[str, Any], name: str, num_classes: int) -> Target:
    value = row.get("outcome", row.get("correct"))
    if not isinstance(value, bool):
        raise DataError(
            f"an outcome reward model needs whether the answer is correct, found {value!r}: give rows with a boolean "
            "'outcome' (or completions with 'correct')",
            path=name,
            column="outcome",
        )
    return _one_hot(num_classes - 1 if value else 0, num_classes)


def _target(label: Label, mark: bool | None, kind: str, num_classes: int, keep_soft: bool) -> Target | None:
    if label is not None and kind == "soft" and keep_soft:
        return (1.0 - float(label), float(label))
    if label is not None and kind == "rating" and num_classes == 3:
        return _one_hot(int(label) + 1, 3)
    return None if mark is None else _one_hot(num_classes - 1 if mark else 0, num_classes)


def _one_hot(index: int, num_classes: int) -> Target:
    return tuple(float(c == index) for c in range(num_classes))


def to_stepwise(row: Mapping[str, Any], *, keep: Sequence[str] = ()) -> Row:
    """Turn a labelled completion into a STEPWISE row; a row that is one already stays as it is.

    Args:
        row: a COMPLETION row with ``steps``, the text of every step (``step_ends`` counts tokens, so only the
            tokenizer's owner can cut the completion), and ``step_labels``.
        keep: further columns to copy where the row has them, for example where the labels came from.

    Returns:
        ``prompt``, ``completions``, ``labels`` and ``id``; ``outcome`` where the answer was graded, ``answer`` where
        the completion carries the gold answer.

    Raises:
        DataError: no labels or step texts, or another number of steps than labels.
    """
    if "completions" in row:
        return dict(row)
    name, column = row.get("id") or row.get("problem_id", "?"), "step_labels"
    if row.get(column) is None:
        raise DataError("the completion has no step labels: label it first (stepkd label)", path=name, column=column)
    labels = list(row[column])
    if row.get("steps") is None:
        raise DataError(
            "no step texts: these completions were not labelled by `stepkd label`; label them as Existing "
            "solutions first",
            path=name,
            column="steps",
        )
    validate(dict(row), COMPLETION, extra="keep")
    if len(row["steps"]) != len(labels):
        raise DataError(f"has {len(labels)} labels for {len(row['steps'])} steps", path=name, column=column)
    out: Row = {"id": name, "prompt": row["prompt"], "completions": list(row["steps"]), "labels": labels}
    if row.get("correct") is not None:
        out["outcome"] = row["correct"]
    out |= {each: row[each] for each in ("answer", *keep) if row.get(each) is not None}
    return validate(out, STEPWISE, path=name, extra="keep")


def trl_row(
    row: Mapping[str, Any],
    *,
    neutral: Neutral = "correct",
    threshold: float = 0.5,
    separator: str = "\n",
    counts: Counter[str] | None = None,
) -> Row | None:
    """Cast a STEPWISE row of any label kind to TRL's booleans.

    TRL needs a label at every step. A step without one is therefore joined to the next labelled step, whose label then
    stands behind both; unlabelled steps at the end are cut off. No text before a label is lost, no label is made up.

    Args:
        row: a STEPWISE row.
        neutral: what a rating of 0 becomes; ``mask``: such a step counts as unlabelled.
        threshold: a chance is correct from here on, in (0, 1).
        separator: text between joined steps.
        counts: updated with the number of steps that became ``correct`` and ``incorrect``, among them ``neutral`` ones,
            that were ``joined`` or ``cut``, and of rows left ``empty``.

    Returns:
        The row with boolean labels and its other columns as they were; None when no label is left.

    Raises:
        ConfigError: an unknown ``neutral`` or a threshold outside (0, 1).
        DataError: the row breaks its contract.
    """
    check_choice("neutral", neutral, ("correct", "incorrect", "mask"))
    validate(dict(row), STEPWISE, extra="keep")
    found: Counter[str] = Counter()
    if label_kind(row["labels"]) == "rating":
        found["neutral"] += row["labels"].count(0)
    marks = verdicts(row["labels"], neutral=neutral, threshold=threshold)
    steps: list[str] = []
    labels: list[bool] = []
    waiting: list[str] = []
    for step, label in zip(row["completions"], marks, strict=True):
        if label is None:
            waiting.append(step)
            continue
        found["correct" if label else "incorrect"] += 1
        found["joined"] += len(waiting)
        steps.append(separator.join([*waiting, step]))
        labels.append(label)
        waiting = []
    found["cut"] += len(waiting)
    found["empty"] += not labels
    if counts is not None:
        counts.update(found)
    return {**row, "completions": steps, "labels": labels} if labels else None


def write_stepwise(rows: Iterable[Mapping[str, Any]], path: str | Path) -> int:
    """Check STEPWISE rows and write them, so that a reader sees the old file or the whole new one.

    A Parquet column has one type. Rows of different label kinds therefore need a JSON Lines file, and a column that
    only some rows have is null in the others.

    Args:
        rows: STEPWISE rows; other columns are written too.
        path: target ending in ``.jsonl`` or ``.parquet``.

    Returns:
        The number of rows written.

    Raises:
        DataError: another ending, a row that breaks its contract, or label kinds mixed in Parquet.
        MachineError: a failed write.
    """
    path = Path(path)
    checked = (
        validate(dict(row), STEPWISE, path=path, line=line, extra="keep") for line, row in enumerate(rows, start=1)
    )
    if path.suffix == ".jsonl":
        return write_jsonl(path, checked)
    if path.suffix != ".parquet":
        raise DataError(f"rows are written as .jsonl or .parquet, not {path.suffix!r}; rename the target", path=path)
    return _write_parquet(list(checked), path)


def _write_parquet(rows: list[Row], path: Path) -> int:
    import pyarrow
    from pyarrow import parquet

    if not rows:
        raise DataError("there are no rows to write", path=path)
    kinds = {label_kind(row["labels"]) for row in rows}
    if len(kinds) > 1:
        raise DataError(
            f"the rows' labels are of several kinds ({', '.join(sorted(kinds))}) and a Parquet column has one type; "
            "write a .jsonl file, or cast them first (trl_row)",
            path=path,
            column="labels",
        )
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        table = pyarrow.table({name: pyarrow.array([row.get(name) for row in rows]) for name in names})
        write_file(path, lambda temporary: parquet.write_table(table, temporary))
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"the rows do not fit a Parquet table: {reason}; write a .jsonl file", path=path) from error
    return len(rows)


def write_math_shepherd(rows: Iterable[Mapping[str, Any]], path: str | Path) -> int:
    """Write rows in Math-Shepherd's text form: ``input`` with ``ки`` tags and ``label`` with ``+`` and ``-``.

    Readers tell the question from the steps by ``Step 1:``. Unless the first step begins so, every step is numbered.

    Args:
        rows: STEPWISE rows with boolean labels at every step (see :func:`trl_row`) and a text prompt; ``subset`` is
            written as ``task``.
        path: target ending in ``.jsonl``.

    Returns:
        The number of rows written.

    Raises:
        DataError: labels of another kind, chat messages as prompt, or texts that a reader would cut elsewhere.
    """
    return write_jsonl(path, (_shepherd_row(row, Path(path), line) for line, row in enumerate(rows, start=1)))


def _shepherd_row(row: Mapping[str, Any], path: Path, line: int) -> Row:
    validate(dict(row), STEPWISE, path=path, line=line, extra="keep")
    prompt, labels = row["prompt"], row["labels"]
    if not isinstance(prompt, str):
        raise DataError("is a list of messages; this form has a text question", path=path, line=line, column="prompt")
    if not all(isinstance(label, bool) for label in labels):
        raise DataError(
            "must be true or false at every step; cast them (trl_row)", path=path, line=line, column="labels"
        )
    steps = [step.strip() for step in row["completions"]]
    if not FIRST_STEP.match(steps[0]):
        steps = [f"Step {number}: {step}" for number, step in enumerate(steps, start=1)]
    for column, text in (("prompt", prompt), ("completions", " ".join(steps))):
        if TAG in text:
            raise DataError(f"holds the step tag {TAG!r}; take it out", path=path, line=line, column=column)
    if FIRST_STEP.search(prompt) or len(FIRST_STEP.findall(steps[0])) > 1:
        raise DataError(
            "'Step 1:' stands in the question, or twice in the first step; a reader could not tell where the steps "
            "begin. Reword it, or write the row with write_stepwise",
            path=path,
            line=line,
            column="prompt" if FIRST_STEP.search(prompt) else "completions",
        )
    written = {
        name: f"{prompt.strip()} " + "\n".join(f"{step} {mark}" for step, mark in zip(steps, marks, strict=True))
        for name, marks in (("input", [TAG] * len(steps)), ("label", ["+" if label else "-" for label in labels]))
    }
    return written | {out: row[name] for out, name in (("task", "subset"), ("id", "id")) if row.get(name) is not None}
