r"""MATH-500 and the MATH format (Hendrycks et al. 2021, arXiv 2103.03874; Lightman et al. 2023, arXiv 2305.20050).

``math500``: hub ``HuggingFaceH4/MATH-500``, split ``test`` (500 problems), evaluation only.
``math``: the same layout for other files; hub ``EleutherAI/hendrycks_math``, seven subject configurations with
splits ``train`` and ``test`` (named by several public loaders; not loaded from the hub here). Where the file has no
``answer``, it is the content of the solution's last ``\boxed{}``. MATH-500 is part of MATH's test split.
"""

from __future__ import annotations

from stepkd.data.rows import PROBLEM
from stepkd.data.sources.registry import Options, RawRow, Row, Source, as_text, passed_on, register

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
    answer = as_text(raw.get("answer"))
    solution = raw.get("solution")
    if answer is None and isinstance(solution, str):
        answer = last_boxed(solution)
    if answer is None:
        raise raw.error("no 'answer' column and no \\boxed{...} in the solution; add one of them", column="answer")
    row = {"prompt": raw["prompt"], "answer": answer, **passed_on(raw, "solution", "level", "subject")}
    if "subject" not in row and "type" in raw:  # the original files call it `type`
        row["subject"] = raw["type"]
    return row | {name: as_text(value) for name, value in passed_on(raw, "id").items()}


MATH500 = register(
    Source(
        name="math500",
        help="MATH-500: 500 held-out competition problems, for evaluation only",
        contract=PROBLEM,
        map_row=_map,
        reads=_READS,
        optional=frozenset({"id", "answer", "solution"}),
        keeps=("level", "subject", "type"),
        hub="HuggingFaceH4/MATH-500",
        splits={"test": "test"},
        default_split="test",
        evaluation_only=frozenset({"*"}),
    )
)
"""The MATH-500 source."""

MATH = register(
    Source(
        name="math",
        help="competition problems in the MATH layout (problem, solution, perhaps answer)",
        contract=PROBLEM,
        map_row=_map,
        reads=_READS,
        optional=frozenset({"id", "answer", "solution"}),
        keeps=("level", "subject", "type"),
        hub="EleutherAI/hendrycks_math",
        hub_configs=_SUBJECTS,
        evaluation_only=frozenset({"test"}),
    )
)
"""Files in the MATH layout."""
