"""GSM8K, grade-school word problems with worked solutions (Cobbe et al. 2021, arXiv 2110.14168).

Hub: ``openai/gsm8k``, configuration ``main``, splits ``train`` (7,473) and ``test`` (1,319). Columns ``question`` and
``answer``; the latter is the solution with ``<<48/2=24>>`` calculator marks and a last line ``#### 72``.
"""

from __future__ import annotations

import re

from stepkd.data.rows import PROBLEM
from stepkd.data.sources.registry import Option, Options, RawRow, Row, Source, passed_on, register

_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")


def final_answer(solution: str) -> str | None:
    """Return the text after the last ``####`` with thousands commas removed, or None when there is none.

    Args:
        solution: a GSM8K-style solution text.
    """
    _, mark, tail = solution.rpartition("####")
    answer = tail.strip().replace(",", "")
    return answer if mark and answer else None


def _map(raw: RawRow, options: Options) -> Row:
    solution = raw["solution"]
    if not isinstance(solution, str):
        raise raw.error(f"must be text, found {type(solution).__name__}", column="solution")
    answer = final_answer(solution)
    if answer is None:
        raise raw.error(
            "the solution has no '#### <answer>' line; for other layouts set source: rows, columns: {prompt: question}",
            column="answer",
        )
    if not options["calculator_marks"]:
        solution = _CALCULATOR_MARK.sub("", solution)
    return {"prompt": raw["prompt"], "answer": answer, "solution": solution, **passed_on(raw, "id")}


GSM8K = register(
    Source(
        name="gsm8k",
        help="GSM8K: grade-school word problems with worked solutions",
        contract=PROBLEM,
        map_row=_map,
        reads={"prompt": ("question",), "solution": ("answer",), "id": ("id",)},
        optional=frozenset({"id"}),
        hub="openai/gsm8k",
        hub_configs=("main",),
        evaluation_only=frozenset({"test"}),
        options={"calculator_marks": Option(False, "keep the <<48/2=24>> marks in the solution text")},
    )
)
"""The GSM8K source."""
