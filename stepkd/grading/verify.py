"""Whether two short answers are the same mathematics: the check that runs inside a grading worker.

Easy cases are decided by :mod:`stepkd.grading.normalise`; the rest goes to math-verify (latex2sympy and sympy). Its own
alarm-based timeouts are off: they work in main threads only and cannot interrupt C code. The worker running this is
killed from outside instead, so call :func:`equivalent` directly only on answers you trust.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from stepkd.grading.normalise import quick_verdict, tidy, unit_scale

_TAIL_WORDS = re.compile(r"(.*[0-9})])\s+([A-Za-z][A-Za-z' -]*)", re.DOTALL)
_MIXED_NUMBER = re.compile(r"(?<![0-9.])([0-9]+)\s+([0-9]+)/([0-9]+)(?![0-9.])")
_SCIENTIFIC = re.compile(r"(?<![A-Za-z0-9])([0-9]+(?:\.[0-9]+)?)[eE]([-+]?[0-9]+)(?![A-Za-z0-9])")


def as_latex(text: str) -> str:
    """The form of an answer that math-verify reads best.

    Args:
        text: an extracted answer.

    Returns:
        The tidied answer without currency signs and unit words, mixed numbers and ``1e6`` written as LaTeX, inside
        ``$...$``.
    """
    text = tidy(text).replace("$", "").replace("%", r"\%").strip()
    tail = _TAIL_WORDS.fullmatch(text)
    if tail and unit_scale(tail.group(2)) == 1:
        text = tail.group(1)
    text = _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", text)
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
    return f"${text}$"


@functools.lru_cache(maxsize=64)
def _parse(latex: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # None switches the alarm off (the annotation says int, the code allows None).
    parsed: list[Any] = parse(
        latex, extraction_config=[LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None
    )
    return parsed


def equivalent(candidate: str, gold: str) -> bool:
    """Whether a candidate answer equals the reference answer.

    Args:
        candidate: the extracted answer.
        gold: the reference answer. The comparison is not symmetric: ``x = 5`` answers a gold of ``5``.

    Returns:
        ``True`` if they are equal as plain numbers, words or mathematics; ``False`` otherwise, also when math-verify
        cannot read one of them. May run for ever or exhaust memory on hostile input (module docstring).
    """
    quick = quick_verdict(candidate, gold)
    if quick is not None:
        return quick
    from math_verify import verify

    return bool(verify(_parse(as_latex(gold)), _parse(as_latex(candidate)), timeout_seconds=None))
