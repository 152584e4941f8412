r"""Competition problems: MATH, MATH-500, AMC and AIME.

``math500`` (Lightman et al. 2023, arXiv 2305.20050): hub ``HuggingFaceH4/MATH-500``, split ``test`` (500 problems),
evaluation only. ``math`` (Hendrycks et al. 2021, arXiv 2103.03874): the same layout for other files; hub
``EleutherAI/hendrycks_math``, seven subject configurations with splits ``train`` and ``test`` (named by several public
loaders; not loaded from the hub here). Where the file has no ``answer``, it is the content of the solution's last
``\boxed{}``. MATH-500 is part of MATH's test split.

``aime``, evaluation only: hub ``HuggingFaceH4/aime_2024``, hub split ``train`` (30 problems), columns ``id``,
``problem``, ``solution``, ``answer``, ``url``, ``year`` (its dataset card). ``AI-MO/aimo-validation-aime`` (90, the
same columns), ``Maxwell-Jia/AIME_2024`` (``ID``, ``Problem``, ``Solution``, ``Answer``), ``math-ai/aime25`` and the
MathArena files (``problem_idx``, ``problem``, ``answer``) read as well: give their id as ``hub`` and the split by the
hub's name. ``amc``, evaluation only: hub ``math-ai/amc23``, split ``test`` (40), columns ``id``, ``question``,
``answer`` (confirmed by public loaders). ``AI-MO/aimo-validation-amc`` (83, hub split ``train``, answers as floats)
reads as well.
"""

from __future__ import annotations

import re
from typing import Any

from stepkd.data.rows import PROBLEM, Row
from stepkd.data.sources.registry import Options, RawRow, Source, as_text, passed_on, register

_READS = {
    "prompt": ("problem", "question"),
    "solution": ("solution",),
    "answer": ("answer",),
    "id": ("unique_id", "id"),
}
_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` with balanced braces, or None.

    Args:
        text: a LaTeX solution.
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = position = start + len("\\boxed{")
    depth = 1
    while position < len(text) and depth:
        character = text[position]
        if character == "\\":
            position += 1  # an escaped brace does not nest
        elif character in "{}":
            depth += 1 if character == "{" else -1
        position += 1
    content = text[begin : position - 1].strip()
    return content if depth == 0 and content else None


def _map(raw: RawRow, options: Options) -> Row:
    answer = raw.get("answer")
    solution = raw.get("solution")
    if answer is None and isinstance(solution, str):
        answer = last_boxed(solution)
    if answer is None:
        raise raw.error("no 'answer' column and no \\boxed{...} in the solution; add one of them", column="answer")
    row = {"prompt": raw["prompt"], "answer": answer, **passed_on(raw, "solution", "level", "subject")}
    if "subject" not in row and "type" in raw:  # the original files call it `type`
        row["subject"] = raw["type"]
    return row | passed_on(raw, "id")


def _math(name: str, text: str, hub: str, **more: Any) -> Source:
    return register(
        Source(
            name=name,
            help=text,
            contract=PROBLEM,
            map_row=_map,
            reads=_READS,
            optional=frozenset({"id", "answer", "solution"}),
            keeps=("level", "subject", "type"),
            hub=hub,
            **more,
        )
    )


MATH500 = _math(
    "math500",
    "MATH-500: 500 held-out competition problems, for evaluation only",
    "HuggingFaceH4/MATH-500",
    splits={"test": "test"},
    default_split="test",
    evaluation_only=frozenset({"*"}),
)
"""The MATH-500 source."""
MATH = _math(
    "math",
    "competition problems in the MATH layout (problem, solution, perhaps answer)",
    "EleutherAI/hendrycks_math",
    hub_configs=_SUBJECTS,
    evaluation_only=frozenset({"test"}),
)
"""Files in the MATH layout."""


_CONTEST_READS = {
    "prompt": ("problem", "Problem", "question", "Question"),
    "answer": ("answer", "Answer"),
    "solution": ("solution", "Solution"),
    "id": ("id", "ID", "problem_idx", "unique_id"),
}
_WHOLE = re.compile(r"([+-]?)0*(\d+)(?:\.0*)?")


def whole_answer(value: object) -> object:
    """Normalise a whole-number answer: "073" -> "73", 142.0 -> "142"; anything else is only stripped.

    Args:
        value: the file's cell.
    """
    if not isinstance(value := as_text(value), str):
        return value
    text = value.strip().strip("$").strip()
    found = _WHOLE.fullmatch(text.replace(",", ""))
    return f"{'-' if found[1] == '-' else ''}{found[2]}" if found else text


def _map_contest(raw: RawRow, options: Options) -> Row:
    row: Row = {"prompt": raw["prompt"], "answer": whole_answer(raw["answer"])}
    solution = raw.get("solution")
    if isinstance(solution, str) and solution.strip():  # some copies hold empty solutions
        row["solution"] = solution
    return row | passed_on(raw, "id", "url", "year")


def _contest(name: str, text: str, hub: str, hub_split: str) -> Source:
    return register(
        Source(
            name=name,
            help=text,
            contract=PROBLEM,
            map_row=_map_contest,
            reads=_CONTEST_READS,
            optional=frozenset({"id", "solution"}),
            keeps=("url", "year"),
            hub=hub,
            splits={"test": hub_split},
            default_split="test",
            evaluation_only=frozenset({"*"}),
        )
    )


AMC = _contest("amc", "AMC 12 problems, for evaluation only", "math-ai/amc23", "test")
"""The AMC source."""
AIME = _contest("aime", "AIME problems, for evaluation only", "HuggingFaceH4/aime_2024", "train")
"""The AIME source."""
