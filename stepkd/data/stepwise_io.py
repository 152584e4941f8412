"""Step-labelled rows to files: the STEPWISE contract, TRL's stepwise-supervision type, and Math-Shepherd's texts.

TRL's type is the contract's ``prompt``, ``completions`` and ``labels``, with one boolean per step: it knows neither
ratings nor chances nor unlabelled steps. :func:`trl_row` casts on purpose and counts what it did. TRL had a trainer
for it (``PRMTrainer``) until it was removed in 2026 (huggingface/trl pull request 7133); the type lives on in its
published data sets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepkd.data.rows import ROLLOUT, STEPWISE, validate
from stepkd.data.sources.math_shepherd import FIRST_STEP, TAG
from stepkd.errors import DataError, check_choice
from stepkd.runs.files import write_file, write_jsonl
from stepkd.steps.labels import Neutral, label_kind, verdicts

Row = dict[str, Any]


def to_stepwise(row: Mapping[str, Any], steps: Sequence[str], *, soft: bool = False, keep: Sequence[str] = ()) -> Row:
    """Turn a labelled rollout into a STEPWISE row.

    Args:
        row: a ROLLOUT row with ``step_labels`` (or ``step_values``).
        steps: text of every step; ``step_ends`` counts tokens, so only the tokenizer's owner can cut the completion.
        soft: take ``step_values``, chances in [0, 1], as the labels in place of ``step_labels``.
        keep: further columns to copy where the row has them, for example where the labels came from.

    Returns:
        ``prompt``, ``completions``, ``labels`` and ``id``; ``outcome`` where the answer was graded, ``answer`` where
        the rollout carries the gold answer.

    Raises:
        DataError: no labels, or another number of steps than labels.
    """
    validate(dict(row), ROLLOUT, extra="keep")
    identity = row.get("id") or row["problem_id"]
    column = "step_values" if soft else "step_labels"
    labels = row.get(column)
    if labels is None:
        raise DataError("the rollout has no step labels: label it first (stepkd label)", path=identity, column=column)
    if len(steps) != len(labels):
        raise DataError(f"has {len(labels)} labels for {len(steps)} steps", path=identity, column=column)
    if soft:  # a chance written as 0 or 1 would read as a rating
        labels = [None if value is None else float(value) for value in labels]
    out: Row = {"id": identity, "prompt": row["prompt"], "completions": list(steps), "labels": list(labels)}
    if row.get("correct") is not None:
        out["outcome"] = row["correct"]
    out |= {name: row[name] for name in ("answer", *keep) if row.get(name) is not None}
    return validate(out, STEPWISE, path=identity, extra="keep")


def trl_row(
    row: Mapping[str, Any],
    *,
    neutral: Neutral = "right",
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
        threshold: a chance is right from here on, in (0, 1).
        separator: text between joined steps.
        counts: updated with the number of steps that became ``right`` and ``wrong``, among them ``neutral`` ones, that
            were ``joined`` or ``cut``, and of rows left ``empty``.

    Returns:
        The row with boolean labels and its other columns as they were; None when no label is left.

    Raises:
        ConfigError: an unknown ``neutral`` or a threshold outside (0, 1).
        DataError: the row breaks its contract.
    """
    check_choice("neutral", neutral, ("right", "wrong", "mask"))
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
        found["right" if label else "wrong"] += 1
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
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError("writing Parquet needs pyarrow; run `pip install pyarrow`", path=path) from error

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
