"""Math-Shepherd: step labels from Monte-Carlo continuations (Wang et al. 2024, arXiv 2312.08935).

Hub: ``peiyi9979/Math-Shepherd``, split ``train`` (444,655 rows; GSM8K and MATH problems), columns ``input``, ``label``,
``task``. ``input`` is the question and the steps, each ended by the tag ``ки``; ``label`` is the same text with ``+``
or ``-`` in place of every tag. The texts hold plus and minus signs of their own, so a label is read only where the
input has its tag, and the rest must agree to the letter. ``trl-lib/math_shepherd`` is TRL's form of it; read that with
source ``rows``.

The question ends where ``Step 1:`` begins. TRL's converter knows rows that are written otherwise, and they are read as
it reads them: a tag at the end of the question (its label is dropped), and no ``Step 1:`` but exactly one question
mark, which then ends the question. Text after the last tag is a step without a label.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from os.path import commonprefix
from pathlib import Path
from typing import Any

from stepkd.data.rows import STEPWISE, Row, passed_on, shown, validate
from stepkd.data.sources.source import Options, RawRow
from stepkd.errors import DataError
from stepkd.runs.files import write_jsonl

TAG = "ки"
"""Marks the end of a step in ``input``."""
FIRST_STEP = re.compile(r"[Ss]tep 1:")
"""Where the steps begin."""
_ANSWER_MARK = "The answer is:"


def tagged_row(raw: RawRow, options: Options) -> Row | list[Row]:
    """A row; none for one that cannot be read where these are to be dropped."""
    try:
        return _parsed(raw)
    except DataError:
        if options["malformed"] == "error":
            raise
        return []


def _parsed(raw: RawRow) -> Row:
    for name in ("input", "label"):
        if not isinstance(raw[name], str):
            raise raw.error(f"must be text, found {shown(raw[name])}", column=name)
    pieces, labels = _tagged(raw)
    prompt, first = _question(raw, pieces)
    if first is None:  # the tag stands at the end of the question
        steps, labels = pieces[1:], labels[1:]
    else:
        steps = [first, *pieces[1:]]
    steps = [step.strip() for step in steps]
    if steps and not steps[-1]:  # nothing but white space behind the last tag
        steps.pop()
    if "" in steps:
        raise raw.error(
            f"step {steps.index('') + 1} of {len(steps)} is empty: two tags without text between them", column="input"
        )
    if not labels:
        raise raw.error("no step has a tag; drop the row", column="input")
    if not prompt.strip():
        raise raw.error("no question stands before 'Step 1:'", column="input")
    marks = [*labels, *[None] * (len(steps) - len(labels))]
    row: Row = {"prompt": prompt.strip(), "completions": steps, "labels": marks}
    _, mark, stated = steps[-1].rpartition(_ANSWER_MARK)
    if mark and stated.strip():
        row["final_answer"] = stated.strip()
    return row | passed_on(raw, "id", "subset")


def _tagged(raw: RawRow) -> tuple[list[str], list[bool]]:
    """The input's texts between its tags (the last one is what follows the last tag), and the label of every tag."""
    pieces, label = raw["input"].rstrip().split(TAG), raw["label"].rstrip()
    if len(pieces) == 1:
        raise raw.error(f"the input has no step tag {TAG!r}; plain solutions have no step labels", column="input")
    at, signs = 0, ""
    for number, piece in enumerate(pieces, start=1):
        tag = TAG if number < len(pieces) else ""
        at += (same := len(commonprefix([piece, label[at:]])))  # noqa: RUF071
        sign = label[at : at + 1]
        if same < len(piece) or (sign not in ("+", "-") if tag else sign):
            raise raw.error(
                f"the label must be the input with '+' or '-' in place of each of its {len(pieces) - 1} tags; at "
                f"character {at + 1} it has {label[at : at + 30]!r}, and the input {(piece[same:] + tag)[:30]!r}",
                column="label",
            )
        signs += sign
        at += 1
    return pieces, [sign == "+" for sign in signs]


def _question(raw: RawRow, pieces: list[str]) -> tuple[str, str | None]:
    """The question and the first step; None for the step when the first tag ends the question."""
    head = pieces[0]
    starts = [found.start() for found in FIRST_STEP.finditer(head)]
    if len(starts) == 1:
        return head[: starts[0]], head[starts[0] :]
    if len(starts) > 1:
        what = "'Step 1:' stands twice before the first tag; where the question ends is not clear"
        raise raw.error(what, column="input")
    if FIRST_STEP.match(pieces[1].lstrip()):
        return head, None
    question, mark, first = head.partition("?")
    if mark and "?" not in first and first.strip():
        return question + mark, first
    raise raw.error(
        "cannot tell the question from the first step: no 'Step 1:' and not exactly one question mark before the first "
        "tag. Mend the row, or leave such rows out with malformed: drop",
        column="input",
    )


def write_math_shepherd(rows: Iterable[Mapping[str, Any]], path: str | Path) -> int:
    """Write rows in this form; unless the first step begins with ``Step 1:``, every step is numbered.

    Args:
        rows: STEPWISE rows with true or false at every step and a text prompt; ``subset`` is written as ``task``.
        path: the file.

    Returns:
        The number of rows written.

    Raises:
        DataError: chat messages as prompt, labels that are no booleans, or texts that a reader would cut elsewhere.
    """
    return write_jsonl(path, (_written(row, Path(path), line) for line, row in enumerate(rows, start=1)))


def _written(row: Mapping[str, Any], path: Path, line: int) -> Row:
    validate(dict(row), STEPWISE, path=path, line=line, extra="keep")
    if not all(isinstance(label, bool) for label in row["labels"]):
        what = f"must be true or false at every step, found {row['labels']}: this form has + and - only"
        raise DataError(what, path=path, line=line, column="labels")
    prompt, steps = row["prompt"], [step.strip() for step in row["completions"]]
    if not isinstance(prompt, str):
        raise DataError("is a list of messages; this form has a text question", path=path, line=line, column="prompt")
    if not FIRST_STEP.match(steps[0]):
        steps = [f"Step {number}: {step}" for number, step in enumerate(steps, start=1)]
    broken = [column for column, text in (("prompt", prompt), ("completions", " ".join(steps))) if TAG in text]
    broken += ["prompt"] * len(FIRST_STEP.findall(prompt)) + ["completions"] * (len(FIRST_STEP.findall(steps[0])) - 1)
    if broken:
        what = f"holds the step tag {TAG!r}, or 'Step 1:' where no solution begins: a reader would cut it there; reword"
        raise DataError(f"{what} it, or convert the row to Stepwise", path=path, line=line, column=broken[0])
    texts: Row = {
        name: f"{prompt.strip()} " + "\n".join(f"{step} {mark}" for step, mark in zip(steps, marks, strict=True))
        for name, marks in (("input", [TAG] * len(steps)), ("label", ["-+"[label] for label in row["labels"]]))
    }
    return texts | passed_on({"task": row.get("subset"), "id": row.get("id")}, "task", "id")
