r"""Read a short answer as a typed value: words, a number or expression, an equation, a set of reals, a list, a matrix.

The structure (lists, brackets, relations, unions, rows) is read here; what is left of it, one expression, goes to the
LaTeX grammar that math-verify uses. Decimals become exact fractions. :mod:`stepkd.grading.verify` compares the values.
Reading may run for ever on hostile input: call it in a grading worker.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from sympy.core.function import AppliedUndef

from stepkd.grading.normalise import (
    MAX_ANSWER_CHARS,
    NUMERALS,
    brackets,
    clean,
    decimal_places,
    is_words,
    split,
    tokens,
    unit_scale,
    with_braces,
    words_key,
)


@dataclass(frozen=True)
class Words:
    """A name, a word, or anything that could not be read as mathematics."""

    key: str
    """The words without case, marks and articles; the bare text where it is no words."""


@dataclass(frozen=True)
class Number:
    """One expression, with or without letters."""

    expr: Any
    """A sympy expression without floats."""
    places: tuple[int, int] | None = None
    """For a decimal: its significant digits, and the exponent of its last digit."""
    percent: bool = False
    """Whether a percent sign followed it."""
    degrees: bool = False
    """Whether it was an angle in degrees."""


@dataclass(frozen=True)
class Based:
    """A numeral with its base, ``52_8``."""

    digits: str
    base: str


@dataclass(frozen=True)
class Clock:
    """Numbers between colons: a time of day or a ratio."""

    parts: tuple[int, ...]
    half: str
    """``a``, ``p`` or nothing."""

    @property
    def ratio(self) -> Any:
        """The number that two parts without a half of the day stand for; else None."""
        is_ratio = len(self.parts) == 2 and self.parts[1] and not self.half
        return sympy.Rational(*self.parts) if is_ratio else None


@dataclass(frozen=True)
class Items:
    """Several values: ``kind`` is ``list`` (also a plus-minus), ``or``, ``set``, or the brackets of a tuple.

    ``either`` holds a value and what it is about; ``grid`` the rows of a matrix, each a tuple.
    """

    kind: str
    items: tuple[Any, ...]


LOOSE = ("list", "set", "or")
"""Kinds of items without an order."""


@dataclass(frozen=True)
class Region:
    """A set of real numbers, as an interval, a union or an inequality in one letter gives it."""

    reals: Any
    """A sympy set."""
    name: str = ""
    """The letter, where one was written."""


@dataclass(frozen=True)
class Relation:
    """An equation, or an inequality in several letters."""

    signs: tuple[str, ...]
    sides: tuple[Any, ...]
    """Sympy expressions; None for a side that is none."""
    name: str
    """What the value is called (``x``, ``f(x)``, ``\\text{Area}``); empty for an equation that names nothing."""
    value: Any
    """The right-hand side, read."""


_LABEL = re.compile(
    r"(?:\\[A-Za-z]+\s*)?\\?[A-Za-z]*['′]*(?:_(?:\{[^{}]*\}|\w))?\s*(?:\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\))?['′]*"
    r"|\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\)|\|[A-Za-z]{1,3}\||\|?\\?(?:angle|overline|triangle)?\s*\{?[A-Z]{1,4}\}?\|?"
    r"|(?:\\text\s*\{[^{}]*\}|[A-Za-z][A-Za-z']{2,}(?:\s[A-Za-z']+)*)(?:_\w)?"
)
_CHOICE = re.compile(
    r"(?:option|choice)?\s*\(?\s*([A-J])\s*(?:\)|[.:](?=\s))\s*([^\s+\-*/=^_(,\\].*|\\(?:frac|sqrt|text).*)?", re.S
)
_BASED = re.compile(r"([0-9A-Za-z]{1,40})_\s*\{?\s*(?:\\text\s*\{\s*)?([0-9]{1,3}|[a-z]{3,7})\s*\}?\s*\}?")
_BASES = {name: str(i) for i, name in enumerate(NUMERALS[2:17], 2)}
_CLOCK = re.compile(r"(\d{1,4}(?:\s*:\s*\d{1,4}){1,2})\s*(?:([ap])\.?\s*m\.?)?", re.IGNORECASE)
_MATRIX = re.compile(
    r"[\[(|]?\s*\\begin\{([pbvVB]?(?:small)?matrix|array)\}(?:\s*\{[lcr|\s]*\})?(.*)\\end\{\1\}\s*[\])|]?", re.DOTALL
)
_SIGNS = {"=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\approx": "=", r"\equiv": "="}
_RELATIONS = frozenset({*_SIGNS, r"\in"})
_COMMAS = frozenset(",;")
_LISTING = frozenset({",", ";", "and", "or"})
_UNIONS = {r"\cup": operator.or_, r"\cap": operator.and_, r"\setminus": operator.sub, r"\backslash": operator.sub}
_MAX_DEPTH = 40
_GROUPED = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_NOTHING = re.compile(r"(?:there (?:are|is) )?no (?:real )?(?:solutions?|roots?)|(?:the )?empty set")
_BUILDER = re.compile(r"\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\||\\mid|:)\s*(.*)", re.DOTALL)
_HEAD = re.compile(r"\\text\s*\{(?![^{}]*\b(?:not|minus|negative)\b)[^{}]*\}\s*(\S.*)", re.DOTALL)
_REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?|\\R|\\text\s*\{\s*all real(?: number)?s\s*\}|all real(?: number)?s")


@lru_cache(maxsize=256)
def read(text: str, grouped: bool = True) -> Any:
    """Read an answer.

    Args:
        text: an extracted answer.
        grouped: whether ``1,234`` is one number; else a list of two.

    Returns:
        One of this module's values; :class:`Words` with the bare text for what cannot be read.
    """
    if len(text) > MAX_ANSWER_CHARS or max((depth for *_, depth in tokens(text)), default=0) > _MAX_DEPTH:
        return Words(text)
    if is_words(text):
        return _read_words(words_key(text))
    text = clean(text)
    choice = _CHOICE.fullmatch(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text))
    if choice:
        text = choice[1]
    if grouped and (", " in text or not re.search(r"[(\[{]", text)):
        text = _GROUPED.sub(lambda m: m[0].replace(",", ""), text)
    return _read_list(text)


def _read_words(key: str) -> Any:
    if key in NUMERALS:
        return Number(sympy.Integer(NUMERALS.index(key)))
    return Items("set", ()) if _NOTHING.fullmatch(key) else Words(key)


def _read_list(text: str) -> Any:
    parts, marks = split(text, _LISTING)
    if len(parts) == 1:
        return _read_one(text)
    values: list[Any] = []
    for part in parts:
        value = _read_one(part) if part else Words("")
        values.extend(value.items if isinstance(value, Items) and value.kind == "list" else [value])
    regions = [value for value in values if isinstance(value, Region)]
    if len(regions) == len(values) and len({region.name for region in regions}) == 1 and regions[0].name:
        union = both = regions[0].reals
        for region in regions[1:]:
            union, both = union.union(region.reals), both.intersect(region.reals)
        return Region(union if "or" in marks or both.is_empty else both, regions[0].name)
    return Items("or" if set(marks) == {"or"} else "list", tuple(values))


def _read_one(text: str) -> Any:
    text = text.strip()
    value = _read_structure(text)
    return Words(text.replace(" ", "")) if value is None else value


def _read_structure(text: str) -> Any:
    """What a part of an answer says, None where it cannot be read."""
    if (r"\pm" in text or r"\mp" in text) and not text.startswith(r"\{"):
        upper = text.replace(r"\pm", "+").replace(r"\mp", "-")
        lower = text.replace(r"\pm", "-").replace(r"\mp", "+")
        return Items("list", (_read_one(upper), _read_one(lower)))
    parts, marks = split(text, _RELATIONS)
    if marks:
        return _read_relation(parts, marks) if all(parts) else None
    if _REALS.fullmatch(text):
        return Region(sympy.Reals)
    if text == r"\emptyset":
        return Items("set", ())
    parts, marks = split(text, frozenset(_UNIONS))
    if marks or (len(parts := split(text, frozenset("U"))[0]) > 1 and text[0] in "(["):
        return _read_union(parts, marks or ["\\cup"] * (len(parts) - 1))
    matrix = _MATRIX.fullmatch(text)
    if matrix and r"\begin" not in matrix[2]:
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", matrix[2]) if row.strip()]
        return _grid([[_read_one(cell) for cell in row.split("&")] for row in rows])
    return _read_brackets(text) or _read_leaf(text)


def _grid(rows: Sequence[Sequence[Any]]) -> Items:
    return Items("grid", tuple(Items("()", tuple(row)) for row in rows))


def _read_brackets(text: str) -> Any:
    found = brackets(text)
    if found is None:
        return None
    left, inside, right = found
    parts, _ = split(inside, _COMMAS)
    if left + right == r"\{\}" or (left + right == "{}" and len(parts) > 1):
        builder = _BUILDER.fullmatch(inside)
        content = _read_list(builder[2] if builder else inside) if inside else Items("list", ())
        if builder and isinstance(content, Region):
            return content
        return Items("set", content.items if isinstance(content, Items) and content.kind in LOOSE else (content,))
    if len(parts) == 1:
        return _read_list(inside) if inside and left + right in ("()", "{}", "[]") else None
    kind = left.replace(r"\langle", "(") + right.replace(r"\rangle", ")")
    return Items(kind, tuple(_read_one(part) for part in parts))


def _read_union(parts: list[str], marks: list[str]) -> Any:
    values = [region for part in parts if (region := as_region(_read_one(part))) is not None]
    if len(values) < len(parts):
        return None
    total = values[0].reals
    for mark, value in zip(marks, values[1:], strict=True):
        total = _UNIONS[mark](total, value.reals)
    return Region(total)


def as_region(value: Any) -> Region | None:
    """The set of reals that a value stands for: a region itself, ``(1,2]``, ``\\{1, 2\\}``; else None."""
    if isinstance(value, Region):
        return value
    if isinstance(value, Items) and all(
        isinstance(item, Number) and item.expr.is_extended_real is not False for item in value.items
    ):
        ends = [item.expr for item in value.items]
        if value.kind == "set":
            return Region(sympy.FiniteSet(*ends))
        if len(ends) == 2 and value.kind in ("()", "(]", "[)", "[]") and not any(end.free_symbols for end in ends):
            return Region(sympy.Interval(*ends, value.kind[0] == "(", value.kind[1] == ")"))
    return None


def _read_relation(parts: list[str], marks: list[str]) -> Any:
    if marks == [r"\in"]:
        value = _read_list(parts[1])
        region = as_region(value)
        is_set = isinstance(value, Items) and value.kind == "set"
        return Region(region.reals, parts[0]) if region and not is_set else value
    if r"\in" in marks:
        return None
    if marks[-1] == r"\approx" and not (len(parts) == 2 and _LABEL.fullmatch(parts[0])):
        exact = _read_relation(parts[:-1], marks[:-1]) if len(parts) > 2 else _read_one(parts[0])
        return Items("either", (exact, _read_one(parts[-1])))
    signs = tuple(_SIGNS[mark] for mark in marks)
    if signs[-1] == "=" and len(set(signs)) == 1:
        if _LABEL.fullmatch(parts[-1]) and not _LABEL.fullmatch(parts[0]) and re.search(r"\d", parts[0]):
            parts = parts[::-1]
        name = parts[0].replace(" ", "") if _LABEL.fullmatch(parts[0]) else ""
        value = _read_list(parts[-1])
        sides = tuple(v.expr if isinstance(v, Number) else None for v in (_read_one(parts[0]), value))
        if not name and not any(side is None or side.free_symbols for side in sides):
            return value  # 2 + 3 = 5
        return Relation(("=",), sides, name, value)
    exprs = [value.expr for value in map(_read_one, parts) if isinstance(value, Number)]
    if len(exprs) < len(parts):
        return None
    letters = set().union(*(expr.free_symbols for expr in exprs))
    if len(letters) != 1:
        return Relation(signs, tuple(exprs), "", None)
    letter = letters.pop()
    return Region(_solution(exprs, signs, letter), str(letter))


def _solution(exprs: list[Any], signs: tuple[str, ...], letter: Any) -> Any:
    real = sympy.Symbol(str(letter), real=True)
    exprs = [expr.subs(letter, real) for expr in exprs]
    total = sympy.Reals
    for sign, left, right in zip(signs, exprs, exprs[1:], strict=False):
        total = total.intersect(sympy.Rel(left, right, "==" if sign == "=" else sign).as_set())
    return total


_TEXT_TAIL = re.compile(
    r"(.*\S)\s*\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{?\s*-?[0-9]\s*\}?)?(?:/\s*\\text\s*\{[^{}]*\}\s*(?:\^\s*\{?[0-9]\}?)?)?",
    re.DOTALL,
)
_WORD_TAIL = re.compile(r"(.*(?:[0-9})\]!%]|\\[a-z]+))\s+([A-Za-z][A-Za-z' /.-]*(?:\^\{?[23]\}?)?)", re.DOTALL)
_LONG_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{4,}")
_CURRENCY = re.compile(r"\\?[$€£¥₹]|\b(?:USD|EUR|Rs\.?)\s")
_PERCENT = re.compile(r"(.*?)\s*(?:%|\\text\s*\{\s*(?:percent|%)\s*\}|percent)", re.DOTALL)
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?")
_MIXED = re.compile(r"(?<![\d.}A-Za-z)^_\\])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}")
_MIXED_SLASH = re.compile(r"(?<![0-9.])([0-9]+)\s+([0-9]+)/([0-9]+)(?![0-9.])")
_SCIENTIFIC = re.compile(r"(?<![A-Za-z0-9])([0-9]+(?:\.[0-9]+)?)[eE]([-+]?[0-9]+)(?![A-Za-z0-9])")
_SCRAMBLED = re.compile(r"\d\s+\d|\d\.\d*\.|--|\+\+|[*/+^-]\s*[*/]|[+*/^-]\s*$|\?|\\ldots|[,:#&@]|\\\\")


def _read_leaf(text: str) -> Any:
    based = _BASED.fullmatch(text)
    if based and based[1][0].isdigit():
        return Based(based[1].upper(), _BASES.get(based[2], based[2]))
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).strip()
    clock = _CLOCK.fullmatch(plain)
    if clock:
        return Clock(tuple(int(part) for part in clock[1].split(":")), (clock[2] or "").lower())
    text = whole = _CURRENCY.sub("", text).strip()
    head = _HEAD.fullmatch(text)
    if head and re.search(r"[0-9]|\\[a-z]", head[1]):
        return _read_leaf(head[1])
    scale = Fraction(1)
    for pattern in (_TEXT_TAIL, _WORD_TAIL):
        tail = pattern.fullmatch(text)
        if tail and "percent" not in tail[2]:
            unit = unit_scale(tail[2])
            if unit is None and pattern is _TEXT_TAIL:
                return Words(words_key(plain))
            if unit is not None:
                scale, text = unit, tail[1].strip()
            break
    percent = _PERCENT.fullmatch(text)
    text = percent[1] if percent else text
    expr = None if _LONG_WORD.search(text) else _expression(text)
    if expr is None:
        return Words(
            words_key(plain) if re.search(r"[A-Za-z]{3}", plain) and "\\" not in plain else plain.replace(" ", "")
        )
    if isinstance(expr, sympy.MatrixBase):
        return _grid([[Number(cell) for cell in row] for row in expr.tolist()])
    places = decimal_places(text)
    degrees = r"^{\circ}" in text or "degree" in whole
    return Number(expr * sympy.Rational(scale.numerator, scale.denominator), places, percent is not None, degrees)


def _expression(text: str) -> Any:
    """A sympy expression (or matrix) without floats, or None where the grammar does not read it."""
    text = with_braces(text.strip())
    if r"\circ" in text:
        turn = r"\\cdot\\frac{\\pi}{180}" if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text) else ""
        text = re.sub(r"([0-9.]+|\{[^{}]*\})?\s*\^\{\\circ\}", rf"{{(\g<1>{turn})}}" if turn else r"\1", text)
    text = re.sub(r"\\text\s*\{\s*([A-Za-z])\s*\}", r"\1", text)
    text = _MIXED_SLASH.sub(r"(\1+\\frac{\2}{\3})", text)
    text = _MIXED.sub(r"(\1+\\frac{\2}{\3})", text)
    text = _SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)
    text = _REPEATING.sub(_repeating, text).replace("*", r"\cdot ")
    if not text or len(text) > MAX_ANSWER_CHARS or _SCRAMBLED.search(text):
        return None
    try:
        expr = latex2sympy(
            text,
            is_real=None,
            normalization_config=None,
            conversion_config=ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False),
        )
        if isinstance(expr, sympy.MatrixBase | sympy.MatrixExpr):
            return sympy.ImmutableMatrix(expr.doit())
        if not isinstance(expr, sympy.Expr):
            return None
        known = {number: sympy.Rational(str(number)) for number in expr.atoms(sympy.Float)}
        known |= {each: sympy.Symbol(str(each)) for each in expr.atoms(*_WITH_VARIABLES) if _is_unknown(each)}
        known |= {call: sympy.Symbol(str(call)) for call in expr.atoms(AppliedUndef)}  # what x(t) is, nobody says
        return expr.subs(sympy.Symbol("i"), sympy.I).xreplace(known).doit()
    except MemoryError:
        raise
    except Exception:  # the grammar raises its own kinds, sympy others: either way, no expression
        return None


_WITH_VARIABLES = (sympy.Derivative, sympy.Integral, sympy.Sum, sympy.Limit)


def _is_unknown(operation: sympy.Expr) -> bool:
    """Whether it is of a quantity that depends on the variable in a way nobody says: x(t), or x in dx/dt, which sympy
    would take for a constant."""
    of = operation.args[0]
    is_plain = isinstance(operation, sympy.Derivative) and not set(operation.variables) <= of.free_symbols
    return is_plain or bool(of.atoms(AppliedUndef))


def _repeating(match: re.Match[str]) -> str:
    whole, head, tail = match[1] or "0", match[2], match[3]
    top = int(whole + head + tail) - int(whole + head)
    return rf"\frac{{{top}}}{{{(10 ** len(tail) - 1) * 10 ** len(head)}}}"
