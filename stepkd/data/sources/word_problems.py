"""GSM8K, SVAMP and MultiArith: word problems with a number as answer.

``gsm8k`` (Cobbe et al. 2021, arXiv 2110.14168): hub ``openai/gsm8k``, configuration ``main``, splits ``train`` (7,473)
and ``test`` (1,319). Columns ``question`` and ``answer``; the latter is the solution with ``<<48/2=24>>`` calculator
marks and a last line ``#### 72``.
``svamp`` (Patel et al. 2021, arXiv 2103.07191): hub ``ChilleD/SVAMP``, splits ``train`` (700) and ``test`` (300),
columns ``Body``, ``Question``, ``Answer``, ``Equation``, ``Type``, ``question_concat``. Other copies give one
``question``; a copy of all 1,000 problems counts as the test split.
``multiarith`` (Roy and Roth 2015): hub ``ChilleD/MultiArith``, splits ``train`` (420) and ``test`` (180), columns
``question`` and ``final_ans``. Column names are confirmed by public loaders, split sizes are as commonly cited.
"""

from __future__ import annotations

import re

from stepkd.data.rows import PROBLEM, Row
from stepkd.data.sources.registry import Options, RawRow, Source, SourceOption, as_text, passed_on, register


def _map(raw: RawRow, options: Options) -> Row:
    row = {"prompt": _prompt(raw), "answer": _number(raw["answer"])}
    return row | passed_on(raw, "id", "equation")


def _prompt(raw: RawRow) -> object:
    if "prompt" in raw:
        return raw["prompt"]
    body, ask = raw.get("Body"), raw.get("Question")
    if not isinstance(body, str) or not isinstance(ask, str):
        raise raw.error("needs 'question', or 'Body' and 'Question' as texts", column="prompt")
    return f"{body.strip()} {ask.strip()}"


def _number(value: object) -> object:
    """ "145.0" and 145.0 both become "145"; SVAMP copies differ in this."""
    text = as_text(value)
    if isinstance(text, str):
        text = text.strip().replace(",", "")
        whole, dot, rest = text.partition(".")
        return whole if dot and whole and not rest.strip("0") else text
    return text


SVAMP = register(
    Source(
        name="svamp",
        help="SVAMP: varied one- and two-step word problems",
        contract=PROBLEM,
        map_row=_map,
        reads={
            "prompt": ("question",),
            "answer": ("answer", "Answer"),
            "id": ("id", "ID"),
            "equation": ("equation", "Equation"),
        },
        optional=frozenset({"prompt", "id", "equation"}),
        keeps=("Body", "Question"),
        hub="ChilleD/SVAMP",
        default_split="test",
        evaluation_only=frozenset({"test"}),
    )
)
"""The SVAMP source."""

MULTIARITH = register(
    Source(
        name="multiarith",
        help="MultiArith: two-step word problems",
        contract=PROBLEM,
        map_row=_map,
        reads={"prompt": ("question",), "answer": ("final_ans", "answer"), "id": ("id",)},
        optional=frozenset({"id"}),
        hub="ChilleD/MultiArith",
        default_split="test",
        evaluation_only=frozenset({"test"}),
    )
)
"""The MultiArith source."""


_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")


def final_answer(solution: str) -> str | None:
    """Return the text after the last ``####`` with thousands commas removed, or None when there is none.

    Args:
        solution: a GSM8K-style solution text.
    """
    _, mark, tail = solution.rpartition("####")
    answer = tail.strip().replace(",", "")
    return answer if mark and answer else None


def _map_gsm8k(raw: RawRow, options: Options) -> Row:
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
        map_row=_map_gsm8k,
        reads={"prompt": ("question",), "solution": ("answer",), "id": ("id",)},
        optional=frozenset({"id"}),
        hub="openai/gsm8k",
        hub_configs=("main",),
        evaluation_only=frozenset({"test"}),
        options={"calculator_marks": SourceOption(False, "keep the <<48/2=24>> marks in the solution text")},
    )
)
"""The GSM8K source."""
