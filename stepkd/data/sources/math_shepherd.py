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
from os.path import commonprefix

from stepkd.data.rows import STEPWISE, Row, passed_on, shown
from stepkd.data.sources.registry import Options, RawRow, Source, SourceOption, register
from stepkd.errors import DataError

TAG = "ки"
"""Marks the end of a step in ``input``."""
FIRST_STEP = re.compile(r"[Ss]tep 1:")
"""Where the steps begin."""
_ANSWER_MARK = "The answer is:"


def _map(raw: RawRow, options: Options) -> Row | list[Row]:
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


register(
    Source(
        name="math_shepherd",
        help="Math-Shepherd: Monte-Carlo step labels, GSM8K and MATH problems",
        contract=STEPWISE,
        map_row=_map,
        reads={"input": ("input",), "label": ("label",), "subset": ("task",), "id": ("id",)},
        requires=frozenset({"input", "label"}),
        hub="peiyi9979/Math-Shepherd",
        splits={"train": "train"},
        options={"malformed": SourceOption("error", "rows that cannot be read: error or drop", ("error", "drop"))},
    )
)
