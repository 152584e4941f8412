"""AMC and AIME problem files in their usual public layouts; evaluation only.

``aime``: hub ``HuggingFaceH4/aime_2024``, hub split ``train`` (30 problems), columns ``id``, ``problem``,
``solution``, ``answer``, ``url``, ``year`` (its dataset card). ``AI-MO/aimo-validation-aime`` (90, the same columns),
``Maxwell-Jia/AIME_2024`` (``ID``, ``Problem``, ``Solution``, ``Answer``), ``math-ai/aime25`` and the MathArena files
(``problem_idx``, ``problem``, ``answer``) read as well: give their id as ``hub`` and the split by the hub's name.
``amc``: hub ``math-ai/amc23``, split ``test`` (40), columns ``id``, ``question``, ``answer`` (confirmed by public
loaders). ``AI-MO/aimo-validation-amc`` (83, hub split ``train``, answers as floats) reads as well.
"""

from __future__ import annotations

import re

from stepkd.data.rows import PROBLEM
from stepkd.data.sources.registry import Options, RawRow, Row, Source, as_text, passed_on, register

_READS = {
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
    text = as_text(value)
    if not isinstance(text, str):
        return text
    text = text.strip().strip("$").strip()
    found = _WHOLE.fullmatch(text.replace(",", ""))
    return f"{'-' if found[1] == '-' else ''}{found[2]}" if found else text


def _map(raw: RawRow, options: Options) -> Row:
    row: Row = {"prompt": raw["prompt"], "answer": whole_answer(raw["answer"])}
    solution = raw.get("solution")
    if isinstance(solution, str) and solution.strip():  # some copies hold empty solutions
        row["solution"] = solution
    row |= {name: as_text(value) for name, value in passed_on(raw, "id").items()}
    return row | passed_on(raw, "url", "year")


def _contest(name: str, text: str, hub: str, hub_split: str) -> Source:
    return register(
        Source(
            name=name,
            help=text,
            contract=PROBLEM,
            map_row=_map,
            reads=_READS,
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
