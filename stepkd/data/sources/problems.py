r"""Problems with answers, the benchmarks among them: word problems and competition mathematics.

A source or benchmark is one entry of the table at the end: where its rows are, which columns it reads, how it is asked.

``gsm8k`` (Cobbe et al. 2021, arXiv 2110.14168): hub ``openai/gsm8k``, configuration ``main``, splits ``train`` (7,473)
and ``test`` (1,319). Columns ``question`` and ``answer``; the latter is the solution with ``<<48/2=24>>`` calculator
marks, which are left out, and a last line ``#### 72``.
``svamp`` (Patel et al. 2021, arXiv 2103.07191): hub ``ChilleD/SVAMP``, splits ``train`` (700) and ``test`` (300),
columns ``Body``, ``Question``, ``Answer``, ``Equation``, ``Type``, ``question_concat``. Other copies give one
``question``; a copy of all 1,000 problems counts as the test split.
``multiarith`` (Roy and Roth 2015): hub ``ChilleD/MultiArith``, splits ``train`` (420) and ``test`` (180), columns
``question`` and ``final_ans``. Column names are confirmed by public loaders, split sizes are as commonly cited.

``math500`` (Lightman et al. 2023, arXiv 2305.20050): hub ``HuggingFaceH4/MATH-500``, split ``test`` (500 problems).
``math`` (Hendrycks et al. 2021, arXiv 2103.03874): the same layout for other files; hub ``EleutherAI/hendrycks_math``,
seven subject configurations with splits ``train`` and ``test`` (named by several public loaders; not loaded from the
hub here). Where the file has no ``answer``, it is the content of the solution's last ``\boxed{}``. MATH-500 is part of
MATH's test split.
``aime``: hub ``HuggingFaceH4/aime_2024``, hub split ``train`` (30 problems), columns ``id``, ``problem``, ``solution``,
``answer``, ``url``, ``year`` (its dataset card). ``AI-MO/aimo-validation-aime`` (90, the same columns),
``Maxwell-Jia/AIME_2024`` (``ID``, ``Problem``, ``Solution``, ``Answer``), ``math-ai/aime25`` and the MathArena files
(``problem_idx``, ``problem``, ``answer``) read as well: give their id as ``hub`` and the split by the hub's name.
``amc``: hub ``math-ai/amc23``, split ``test`` (40), columns ``id``, ``question``, ``answer`` (confirmed by public
loaders). ``AI-MO/aimo-validation-amc`` (83, hub split ``train``, answers as floats) reads as well.
"""

from __future__ import annotations

import re
from typing import Any

from stepkd.data.rows import Row, passed_on
from stepkd.data.sources.registry import Benchmark, Options, RawRow, Source, as_text, register

_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")


def final_answer(solution: str) -> str | None:
    """Return the text after the last ``####`` with thousands commas removed, or None when there is none.

    Args:
        solution: a GSM8K-style solution text.
    """
    _, mark, tail = solution.rpartition("####")
    answer = tail.strip().replace(",", "")
    return answer if mark and answer else None


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


_WHOLE = re.compile(r"([+-]?)0*(\d+)(?:\.0*)?")
_DECIMAL = re.compile(r"-?\d+\.\d+")


def whole_answer(value: object) -> object:
    """Normalise an answer: "073" -> "73", 142.0 -> "142", "1,234.5" -> "1234.5"; what is no number is only stripped.

    Args:
        value: the file's cell.
    """
    if not isinstance(value := as_text(value), str):
        return value
    text = value.strip().strip("$").strip()
    found = _WHOLE.fullmatch(plain := text.replace(",", ""))
    if found is None:
        return plain if _DECIMAL.fullmatch(plain) else text
    return f"{'-' if found[1] == '-' else ''}{found[2]}"


_OPTIONAL = ("solution", "level", "subject", "url", "year", "equation", "id")


def _map(raw: RawRow, options: Options) -> Row:
    solution = raw.get("solution")
    if isinstance(solution, str) and not solution.strip():  # some copies hold empty solutions
        del raw["solution"]
    answer = raw.get("answer")
    if answer is None and isinstance(solution, str):
        answer = last_boxed(solution)
    if answer is None:
        raise raw.error("no 'answer' column and no \\boxed{...} in the solution; add one of them", column="answer")
    return {"prompt": raw["prompt"], "answer": answer} | passed_on(raw, *_OPTIONAL)


def _map_number(raw: RawRow, options: Options) -> Row:
    row = _map(raw, options)
    return row | {"answer": whole_answer(row["answer"])}


def _map_svamp(raw: RawRow, options: Options) -> Row:
    if "prompt" not in raw:
        body, ask = raw.get("Body"), raw.get("Question")
        if not isinstance(body, str) or not isinstance(ask, str):
            raise raw.error("needs 'question', or 'Body' and 'Question' as texts", column="prompt")
        raw["prompt"] = f"{body.strip()} {ask.strip()}"
    return _map_number(raw, options)


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
    raw |= {"answer": answer, "solution": _CALCULATOR_MARK.sub("", solution)}
    return _map(raw, options)


# --- the table -------------------------------------------------------------------------------------------------------

_ID = {"id": ("id", "ID", "problem_idx", "unique_id")}
_WORDS: dict[str, Any] = {
    "extractors": ("hash", "boxed", "answer_phrase", "last_number"),
    "template": "gsm8k",
    "max_new_tokens": 1024,
    "evaluation_only": frozenset({"test"}),
}
_LATEX: dict[str, Any] = {"extractors": ("boxed", "hash", "answer_phrase", "latex"), "template": "math"}
_MATH: dict[str, Any] = {
    "map_row": _map,
    "reads": {
        "prompt": ("problem", "question"),
        "answer": ("answer",),
        "solution": ("solution",),
        "level": ("level",),
        "subject": ("subject", "type"),  # the original files call it `type`
        "id": ("unique_id", "id"),
    },
    "requires": frozenset({"prompt"}),
}
_CONTEST: dict[str, Any] = {
    "map_row": _map_number,
    "reads": {
        "prompt": ("problem", "Problem", "question", "Question"),
        "answer": ("answer", "Answer"),
        "solution": ("solution", "Solution"),
        **_ID,
    },
    "keeps": ("url", "year"),
}
_TEST_ONLY: dict[str, Any] = {"default_split": "test", "evaluation_only": frozenset({"*"})}

for _source in (
    Benchmark(
        name="gsm8k",
        help="GSM8K test, 1,319 word problems (arXiv 2110.14168)",
        map_row=_map_gsm8k,
        reads={"prompt": ("question",), "solution": ("answer",), **_ID},
        requires=frozenset({"prompt", "solution"}),
        hub="openai/gsm8k",
        hub_configs=("main",),
        **_WORDS,
    ),
    Benchmark(
        name="math500",
        help="MATH-500 (arXiv 2305.20050, appendix)",
        hub="HuggingFaceH4/MATH-500",
        splits={"test": "test"},
        max_new_tokens=2048,
        **_MATH,
        **_LATEX,
        **_TEST_ONLY,
    ),
    Benchmark(
        name="svamp",
        help="SVAMP, one- and two-step word problems (arXiv 2103.07191)",
        map_row=_map_svamp,
        reads={
            "prompt": ("question",),
            "answer": ("answer", "Answer"),
            "equation": ("equation", "Equation"),
            **_ID,
        },
        requires=frozenset({"answer"}),
        keeps=("Body", "Question"),
        hub="ChilleD/SVAMP",
        default_split="test",
        **_WORDS,
    ),
    Benchmark(
        name="multiarith",
        help="MultiArith, two-step word problems",
        map_row=_map_number,
        reads={"prompt": ("question",), "answer": ("final_ans", "answer"), **_ID},
        hub="ChilleD/MultiArith",
        default_split="test",
        **_WORDS,
    ),
    Benchmark(
        name="amc",
        help="AMC problems from a file or hub id",
        hub="math-ai/amc23",
        splits={"test": "test"},
        max_new_tokens=2048,
        **_CONTEST,
        **_LATEX,
        **_TEST_ONLY,
    ),
    Benchmark(
        name="aime",
        help="AIME problems from a file or hub id, integer answers",
        hub="HuggingFaceH4/aime_2024",
        splits={"test": "train"},
        max_new_tokens=4096,
        **_CONTEST,
        **_LATEX,
        **_TEST_ONLY,
    ),
    Source(
        name="math",
        help="competition problems in the MATH layout (problem, solution, perhaps answer)",
        hub="EleutherAI/hendrycks_math",
        hub_configs=(
            *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
            *("number_theory", "prealgebra", "precalculus"),
        ),
        evaluation_only=frozenset({"test"}),
        **_MATH,
    ),
):
    register(_source)
