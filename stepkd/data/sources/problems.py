"""Rows of public data sets as problems with an answer, or as solutions whose first incorrect step humans marked.

Which data set is read by which function, and under which columns, says ``stepkd/data/sources.yaml``.
"""

from __future__ import annotations

import re
from pathlib import Path

from stepkd.data.rows import Row, passed_on, shown
from stepkd.data.sources.source import Options, RawRow, as_text

SUBSETS = ("gsm8k", "math", "olympiadbench", "omnimath")
"""The parts of ProcessBench, in its order."""
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


def problem_row(raw: RawRow, options: Options) -> Row:
    """A problem; where there is no answer, it is that in the solution's last box."""
    solution = raw.get("solution")
    if isinstance(solution, str) and not solution.strip():  # some copies hold empty solutions
        del raw["solution"]
    answer = raw.get("answer")
    if answer is None and isinstance(solution, str):
        answer = last_boxed(solution)
    if answer is None:
        raise raw.error("no 'answer' column and no \\boxed{...} in the solution; add one of them", column="answer")
    return {"prompt": raw["prompt"], "answer": answer} | passed_on(raw, *_OPTIONAL)


def number_row(raw: RawRow, options: Options) -> Row:
    """A problem whose answer is a number."""
    row = problem_row(raw, options)
    return row | {"answer": whole_answer(row["answer"])}


def gsm_plus_row(raw: RawRow, options: Options) -> Row | list[Row]:
    """A problem whose answer is a number; none where it has no answer."""
    return [] if raw.get("answer") == "None" else number_row(raw, options)


def olympiad_row(raw: RawRow, options: Options) -> Row:
    """A problem with a list of answers, which are joined, and a list of solutions, of which the first is kept."""
    answers = [raw["answer"]] if isinstance(raw["answer"], str) else raw["answer"]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise raw.error(f"must be a list of texts, found {shown(raw['answer'])}", column="final_answer")
    raw["answer"] = ", ".join(answers).replace("$", "").strip(". ")
    if isinstance(solutions := raw.get("solution"), list):
        raw["solution"] = solutions[0] if solutions else ""
    return problem_row(raw, options)


def svamp_row(raw: RawRow, options: Options) -> Row:
    """A problem that may come as a body and a question."""
    if "prompt" not in raw:
        body, ask = raw.get("Body"), raw.get("Question")
        if not isinstance(body, str) or not isinstance(ask, str):
            raise raw.error("needs 'question', or 'Body' and 'Question' as texts", column="prompt")
        raw["prompt"] = f"{body.strip()} {ask.strip()}"
    return number_row(raw, options)


def gsm8k_row(raw: RawRow, options: Options) -> Row:
    """A problem whose answer is the last line of its solution."""
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
    return problem_row(raw, options)


def first_error_row(raw: RawRow, options: Options) -> Row:
    """A solution with the 0-based index of its first incorrect step (-1: none), as step labels.

    They are true before that step, false at it, and null behind it, where nobody judged.

    Raises:
        DataError: steps that are no list, or an index that is no whole number or not of a step.
    """
    steps, first = raw["completions"], raw["first_error"]
    if not isinstance(steps, list):
        raise raw.error(f"must be a list of step texts, found {shown(steps)}", column="steps")
    if type(first) is not int or not -1 <= first < len(steps):
        raise raw.error(
            f"must be the number of the first incorrect step (0 to {len(steps) - 1}; -1: none), found {shown(first)}",
            column="label",
        )
    labels = [True if first < 0 or i < first else False if i == first else None for i in range(len(steps))]
    row: Row = {"prompt": raw["prompt"], "completions": steps, "labels": labels, "first_error": first}
    more = ("outcome", "id", "answer", "final_answer", "generator", "question_type", "error_reason")
    return row | passed_on(raw, *more)


def prmbench_row(raw: RawRow, options: Options) -> Row:
    """A solution with the 1-based numbers of its incorrect steps, as step labels, and with its class of error.

    Raises:
        DataError: steps that are no list, or a number that is no whole number from 1.
    """
    steps, errors = raw["completions"], raw["error_steps"]
    if not isinstance(steps, list):
        raise raw.error(f"must be a list of step texts, found {shown(steps)}", column="modified_process")
    if not isinstance(errors, list) or not all(type(each) is int and each > 0 for each in errors):
        raise raw.error(f"must be a list of step numbers from 1, found {shown(errors)}", column="error_steps")
    if not isinstance(kind := raw["error_type"], str):
        raise raw.error(f"must be the name of a class, found {shown(kind)}", column="classification")
    labels = [number not in errors for number in range(1, len(steps) + 1)]
    row: Row = {"prompt": raw["prompt"], "completions": steps, "labels": labels, "error_type": kind}
    row["ignored_errors"] = sum(each > len(steps) for each in errors)  # some numbers lie behind the last step
    if (item := raw.get("id")) is not None:  # in every class there is one such item, of the same problem
        row |= {"id": f"{kind}/{item}", "problem_id": item}
    return row | passed_on(raw, "error_reason")


def bigbench_row(raw: RawRow, options: Options) -> Row:
    """The same, where null says that no step is incorrect."""
    if raw["first_error"] is None:
        raw["first_error"] = -1
    return first_error_row(raw, options)


def processbench_row(raw: RawRow, options: Options) -> Row:
    """With the part of the benchmark: the ids begin with it (``gsm8k-0``), and files and hub splits are named so."""
    names = (str(raw.get("id")).rpartition("-")[0], Path(raw.path).name.partition(".")[0], raw.path.rpartition(":")[2])
    subset = next((name for name in names if name in SUBSETS), None)
    return first_error_row(raw, options) | ({} if subset is None else {"subset": subset})
