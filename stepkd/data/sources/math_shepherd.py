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

from stepkd.data.rows import STEPWISE, Row, shown
from stepkd.data.sources.registry import Options, RawRow, Source, SourceOption, passed_on, register
from stepkd.errors import DataError

TAG = "ки"
"""Marks the end of a step in ``input``."""
FIRST_STEP = re.compile(r"[Ss]tep 1:")
"""Where the steps begin."""
STEP_PREFIX = re.compile(r"[Ss]tep \d+:\s*")
"""The number written before a step."""
_ANSWER_MARK = "The answer is:"


def _map(raw: RawRow, options: Options) -> Row | list[Row]:
    try:
        return _parsed(raw, strip=options["step_prefix"] == "strip")
    except DataError:
        if options["malformed"] == "error":
            raise
        return []


def _parsed(raw: RawRow, *, strip: bool) -> Row:
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
    if strip:
        steps = [STEP_PREFIX.sub("", step, count=1) if STEP_PREFIX.match(step) else step for step in steps]
    for number, step in enumerate(steps, start=1):
        if not step:
            raise raw.error(
                f"step {number} of {len(steps)} is empty: two tags without text between them", column="input"
            )
    if not labels:
        raise raw.error("no step has a tag; drop the row", column="input")
    row: Row = {
        "prompt": prompt.strip(),
        "completions": steps,
        "labels": [*labels, *[None] * (len(steps) - len(labels))],
    }
    if not row["prompt"]:
        raise raw.error("no question stands before 'Step 1:'", column="input")
    stated = steps[-1].rpartition(_ANSWER_MARK)
    if stated[1] and stated[2].strip():
        row["final_answer"] = stated[2].strip()
    return row | passed_on(raw, "id", "subset")


def _tagged(raw: RawRow) -> tuple[list[str], list[bool]]:
    """The input's texts between its tags (the last one is what follows the last tag), and the label of every tag."""
    text, label = raw["input"].rstrip(), raw["label"].rstrip()
    pieces = text.split(TAG)
    num_tags = len(pieces) - 1
    if not num_tags:
        raise raw.error(f"the input has no step tag {TAG!r}; plain solutions have no step labels", column="input")
    labels: list[bool] = []
    at = 0
    for number, piece in enumerate(pieces, start=1):
        if not label.startswith(piece, at):
            place = f"tag {number} of {num_tags}" if number <= num_tags else "the end"
            raise _difference(raw, piece, label[at : at + len(piece)], at=at, place=place)
        at += len(piece)
        if number > num_tags:
            break
        sign = label[at : at + 1]
        if sign not in ("+", "-"):
            raise raw.error(
                f"the label has {repr(sign) if sign else 'nothing'} where tag {number} of {num_tags} of the input "
                f"stands (character {at + 1}); a tag's label must be '+' or '-'",
                column="label",
            )
        labels.append(sign == "+")
        at += 1
    if at < len(label):
        raise raw.error(
            f"the label goes on after the input's end with {label[at : at + 30]!r}; it must be the input with '+' or "
            f"'-' for each of the {num_tags} tags",
            column="label",
        )
    return pieces, labels


def _difference(raw: RawRow, piece: str, other: str, *, at: int, place: str) -> DataError:
    pairs = zip(piece, other, strict=False)
    same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(other))
    if same == len(other):
        return raw.error(
            f"the label ends at character {at + same}, before {place} of the input; it must have '+' or '-' for every "
            "tag and all of the text",
            column="label",
        )
    return raw.error(
        f"the label's text leaves the input's at character {at + same + 1}, before {place}: "
        f"{piece[same : same + 30]!r} in the input, {other[same : same + 30]!r} in the label; both must be the same "
        "text but for the tags",
        column="label",
    )


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


MATH_SHEPHERD = register(
    Source(
        name="math_shepherd",
        help="Math-Shepherd: Monte-Carlo step labels, GSM8K and MATH problems",
        contract=STEPWISE,
        map_row=_map,
        reads={"input": ("input",), "label": ("label",), "subset": ("task",), "id": ("id",)},
        optional=frozenset({"subset", "id"}),
        hub="peiyi9979/Math-Shepherd",
        splits={"train": "train"},
        options={
            "step_prefix": SourceOption("keep", "the 'Step 1: ' before a step: keep or strip", ("keep", "strip")),
            "malformed": SourceOption("error", "rows that cannot be read: error or drop", ("error", "drop")),
        },
    )
)
"""The Math-Shepherd source."""
