r"""Read short answers without a computer algebra system: plain numbers with units, and words; and write every sign of
an answer in one way, before :mod:`stepkd.grading.reading` looks at its structure.

Rules for word-problem answers, chosen to agree with what a person marking the paper would accept:

* thousands separators, currency signs, trailing zeros and a full stop do not matter (``$1,234.00`` is 1234);
* unit words after a number do not matter (``1234 apples``, ``5 km/h``, ``30^\circ``); number words do (``5 thousand``,
  ``3 dozen``, ``12 thousandths``);
* a percent sign is a unit: ``50%`` and 50 match each other, ``50%`` and 0.5 (the value it stands for) too, but 0.5
  and 50 do not;
* of an answer that is an equation the right-hand side counts (``x = 5``, ``9 * 2 = 18``), unless several are listed; a
  reference equation is one value only where its left side is a name (``x = 5``, not ``3a + b = 10``);
* words are compared without case and punctuation (``\text{Evelyn}`` is ``evelyn``).

Comparison is exact: no floating point. (Two long decimals of which one may be the other rounded are left to
:mod:`stepkd.grading.verify`.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from stepkd.yaml_files import read_yaml

MAX_ANSWER_CHARS = 2000
"""A longer "answer" is compared as text only; no real final answer comes near it."""

_MAX_NUMBER_CHARS = 160
_MAX_DIGITS = 40
_MAX_UNIT_WORDS = 8

_CHARACTERS = str.maketrans(
    {"\0": None, "−": "-", "–": "-", "\u00a0": " ", "\u202f": " ", "\n": " ", "\r": " ", "\t": " "}
)
_GROUPS = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!|\\[,;:!]) ?(?=[0-9]{3}(?![0-9]))")
_BLANK_GROUPS = re.compile(r"[-+]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]*)?")
_NO_SPACE = re.compile(r"(\\\\)|\\!|\\(?:displaystyle|textstyle)(?![a-z])|\\(?:left|right)\s*(?:\.(?![0-9])|(?![a-z]))")
_SPACE = re.compile(r"(\\\\)|\\[,;: ]|~|\\(?:qquad|quad|thinspace)(?![a-z])")
_ESCAPED_SIGN = re.compile(r"\\([$%#&])|^\\(?=[0-9])")  # a model that writes \15 for \$15
_WHOLE_COMMAND = re.compile(
    r"\\(?:boxed|fbox|text|mbox|textbf|mathbf|mathrm|textrm|boldsymbol|bm|textit|mathit)\s*\{(.*)\}", re.DOTALL
)
_INLINE_TEXT = re.compile(r"\\(?:text|mbox|textbf|mathbf|mathrm|textrm)\s*\{([^{}]*)\}")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_WRAPPINGS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|°")
_POWER_OF_UNIT = re.compile(r"(?<=[A-Za-z])\s*\^\s*\{?\s*[23]\s*\}?$|(?<=[A-Za-z])[²³]$")

_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s?(?:US)?[$€£¥₹]?\s?(?P<inner>[-+]?)\s?"
    r"(?:(?P<grouped>[0-9]{1,3}(?:,[0-9]{3})+)|(?P<whole>[0-9]*))(?P<decimals>\.[0-9]*)?"
    r"(?P<tail>.*)"
)
_PERCENT = re.compile(r"\s*(?:%|percent\b|per cent\b|pct\b)", re.IGNORECASE)
_LEFT_SIDE = re.compile(r"(?:[A-Za-z0-9 _+\-*/().,$€£×÷%\\^{}=']*[^<>!\\=])?", re.ASCII)
_LISTING = re.compile(r"\b(?:and|or)\b|,\s|\\(?:neq?|leq?|geq?|approx)\b")

_WORD_LISTS = read_yaml(Path(__file__).with_name("words.yaml"), "words and signs of answers")
NUMERALS: list[str] = _WORD_LISTS["numerals"]
"""Numbers in words, by value."""
_POWERS: dict[str, int] = _WORD_LISTS["powers"]
_PARTS = _WORD_LISTS["parts"] | {f"{word}th": power for word, power in _POWERS.items() if power != 12}
_SCALES = {word: Fraction(power) for word, power in _POWERS.items()} | {w: Fraction(1, n) for w, n in _PARTS.items()}
_SHORT_UNITS, _NOT_UNITS = (frozenset(_WORD_LISTS[name]) for name in ("short_units", "not_units"))
_UNIT_WORD = re.compile(r"[A-Za-z][A-Za-z'’./-]*|[$€£¥₹]")
_WORDS = re.compile(r"(?=.*[A-Za-z]{4})[A-Za-z]+['’.]?(?:(?:['’-]|[ ]+)[A-Za-z]+['’.]?)*")
_EXPLICIT_WORDS = re.compile(r"\s*\\(?:text|mbox|textbf|mathrm|textrm)\s*\{\s*[A-Za-z](?=[^{}]*[A-Za-z]{2})[^{}]*\}\s*")
_ARTICLE = re.compile(r"(?:an?|the) (?=.{3})")
_NAMED = re.compile(r"\s*(?:[A-Za-z]|[A-Za-z][A-Za-z ]{2,}|\\[A-Za-z]+(?:\s*\{[A-Za-z ]*\})?)\s*=(?!.*=)")
_DECIMAL = re.compile(
    r"[-+]?\s*([0-9]*)\.([0-9]*)\s*(?:\\?%|\\(?:times|cdot)\s*10\s*\^\s*\{?\s*([-+]?[0-9]{1,4})\s*\}?|[eE]([-+]?[0-9]{1,4}))?"
)
_NOT_WORD_CHARACTERS = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class PlainNumber:
    """A number read from an answer, exactly."""

    value: Fraction
    """The number before any percent sign."""
    percent: bool = False
    """Whether a percent sign or word followed it."""


def tidy(text: str) -> str:
    r"""Remove what does not change an answer's meaning: spacing commands, wrapping ``$``, ``\boxed{}``, ``\text{}``.

    Args:
        text: an extracted answer, at most ``MAX_ANSWER_CHARS`` long.

    Returns:
        The answer on one line; may be empty.
    """
    if text.isascii() and text.isalnum():
        return text
    text = text.translate(_CHARACTERS)
    if "\\" in text or "{,}" in text or "~" in text:
        text = _NO_SPACE.sub(lambda m: m[1] or "", _GROUPS.sub(",", text))
        text = _SPACE.sub(lambda m: m[1] or " ", text).replace("{,}", ",")
    if " " in text and _BLANK_GROUPS.fullmatch(text.strip()):
        text = text.replace(" ", "")
    for _ in range(6):  # wrappings nest: **$\boxed{5}$**
        before = text
        text = text.strip()
        for opening, closing in _WRAPPINGS:
            inside = text[len(opening) : -len(closing)]
            wrapped = text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing)
            if wrapped and opening not in inside and not text.endswith(r"\$"):
                text = inside.strip()
                break
        whole = _WHOLE_COMMAND.fullmatch(text)
        if whole and _balanced(whole.group(1)):
            text = whole.group(1)
        text = text.rstrip(".;,:? ") if not text.endswith("..") else text
        if text == before:
            break
    return _ESCAPED_SIGN.sub(r"\1", text)


def _balanced(text: str) -> bool:
    depth = 0
    for brace in _BRACE.findall(text):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0


def unit_scale(words: str) -> Fraction | None:
    """The factor that the words after a number stand for.

    Args:
        words: what follows the number, e.g. ``"apples"``, ``"thousand dollars"``, ``"km/h"`` or nothing.

    Returns:
        1 for units or nothing, the factor of number words (1/1000 for ``"thousandths"``), ``None`` if the words are
        neither (``"pi"``, ``"and 7"``).
    """
    words = _POWER_OF_UNIT.sub("", words.strip().strip("()").strip())
    scale, only_numbers = Fraction(1), True
    pieces = words.replace("-", " ").split()
    if len(pieces) > _MAX_UNIT_WORDS:
        return None
    for index, piece in enumerate(pieces):
        low = piece.lower().rstrip(".,'’")
        only_numbers = only_numbers and low.removesuffix("s") in _SCALES
        if only_numbers:
            scale *= _SCALES[low.removesuffix("s")]
        elif not _UNIT_WORD.fullmatch(piece) or low in _NOT_UNITS or (index == 0 and not _is_unit(low)):
            return None
    return scale


def _is_unit(word: str) -> bool:
    is_product = len(word) == 3 and sorted(word) == list(word)  # "5 abc" and "2 xyz" multiply letters
    return (len(word) > 2 and not is_product) or word in _SHORT_UNITS or word in "$€£¥₹"


def _right_side(text: str) -> str:
    if "=" not in text:
        return text
    left, _, right = text.rpartition("=")
    return right.strip() if _LEFT_SIDE.fullmatch(left) and not _LISTING.search(left) else text


def read_number(text: str) -> PlainNumber | None:
    r"""Read an answer that is one plain decimal number, with or without currency, percent sign and unit words.

    Args:
        text: an answer after :func:`tidy`.

    Returns:
        The exact number, or ``None`` when the text is anything else (a fraction, an expression, two numbers, too long).
    """
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    text = _DEGREES.sub(" degrees", _INLINE_TEXT.sub(r" \1 ", _right_side(text)))
    match = _NUMBER.fullmatch(text.strip())
    if match is None or (match["sign"] and match["inner"]):
        return None
    whole = (match["grouped"] or match["whole"] or "").replace(",", "")
    decimals = (match["decimals"] or "").removeprefix(".")
    if not whole + decimals or len(whole + decimals) > _MAX_DIGITS:
        return None
    tail = match["tail"]
    percent = _PERCENT.match(tail)
    tail = tail[percent.end() :] if percent else tail
    scale = unit_scale(tail) if percent or _may_touch(tail) else None
    if scale is None:
        return None
    value = Fraction(int(whole + decimals), 10 ** len(decimals)) * scale
    return PlainNumber(-value if "-" in (match["sign"], match["inner"]) else value, percent is not None)


def _may_touch(tail: str) -> bool:
    """Whether these words may follow a number without a blank: "5cm" is a length, "5x", "5ab" and "5m" are products."""
    if not tail[:1].isalpha():
        return True
    word = tail.split()[0].lower().rstrip(".,")
    return len(word) > 3 or (len(word) > 1 and word in _SHORT_UNITS)


def _same_number(candidate: PlainNumber, gold: PlainNumber) -> bool:
    """Whether two plain numbers are the same answer (percent rule in the module docstring)."""
    if candidate.value == gold.value:
        return True
    stands_for = candidate.value / (100 if candidate.percent else 1)
    return stands_for == gold.value / (100 if gold.percent else 1)


def decimal_places(text: str) -> tuple[int, int] | None:
    """Significant digits of a number written with a decimal point, and the exponent of its last digit; else None."""
    match = _DECIMAL.fullmatch(text.strip())
    if match is None or not match[1] + match[2]:
        return None
    return len((match[1] + match[2]).lstrip("0")), int(match[3] or match[4] or 0) - len(match[2])


def is_words(text: str) -> bool:
    r"""Whether an untidied answer is words rather than mathematics: ``\text{...}``, or a word of four letters."""
    plain = tidy(text)
    words = _EXPLICIT_WORDS.fullmatch(text) or _WORDS.fullmatch(plain)
    return bool(words) and not _NOT_UNITS.intersection(plain.lower().split())


def words_key(text: str) -> str:
    """The form in which word answers are compared: no case, no punctuation, no article, single spaces."""
    key = _NOT_WORD_CHARACTERS.sub(" ", _INLINE_TEXT.sub(r" \1 ", tidy(text))).strip().casefold()
    return _ARTICLE.sub("", key, count=1) if _ARTICLE.match(key) else key


def canonical_answer(text: str) -> str:
    """One string per plainly equal answer, for majority votes and for recognising repeated answers.

    Args:
        text: an extracted answer.

    Returns:
        The reduced number (``"1234"``, ``"5/2"``, with ``%`` kept), the words' key, or the tidied text.
    """
    if len(text) > MAX_ANSWER_CHARS:
        return text
    plain = tidy(text)
    number = None if "=" in plain and not _NAMED.match(plain) else read_number(plain)
    if number is not None:
        return f"{number.value}{'%' if number.percent else ''}"
    return words_key(text) if is_words(text) else plain.replace(" ", "")


def quick_verdict(candidate: str, gold: str) -> bool | None:
    r"""Decide the easy cases in bounded time, in any process.

    Args:
        candidate: the extracted answer; any text.
        gold: the reference answer.

    Returns:
        ``True`` or ``False`` when identical text, two plain numbers, words or length settle it; ``None`` when it takes
        math-verify.
    """
    if candidate == gold:
        return True
    if max(len(candidate), len(gold)) > MAX_ANSWER_CHARS:
        return False
    plain_candidate, plain_gold = tidy(candidate), tidy(gold)
    if not plain_candidate:
        return False
    if plain_candidate == plain_gold:
        return True
    if "=" in plain_gold:
        same_left = plain_candidate.partition("=")[0].strip() == plain_gold.partition("=")[0].strip()
        if not _NAMED.match(plain_gold) or ("=" in plain_candidate and not same_left):
            return None
    number_c, number_g = read_number(plain_candidate), read_number(plain_gold)
    if number_c is not None and number_g is not None:
        equal = _same_number(number_c, number_g)
        return None if not equal and _may_be_rounded(plain_candidate, plain_gold) else equal
    if is_words(gold) and (words_key(candidate) == words_key(gold) or is_words(candidate)):
        return words_key(candidate) == words_key(gold)
    return None


def _may_be_rounded(candidate: str, gold: str) -> bool:
    return all((places := decimal_places(text)) is not None and places[0] >= 6 for text in (candidate, gold))


# --- one spelling for each sign ---------------------------------------------------------------------------------------

_SPELLINGS = {sign: spelled + " " * spelled[-1].isalpha() for sign, spelled in _WORD_LISTS["signs"].items()}
_SPELLED = re.compile("|".join(re.escape(sign) for sign in sorted(_SPELLINGS, key=len, reverse=True)))
_RENAMED = {rf"\{name}": f" {to} " if to.isalpha() else to for name, to in _WORD_LISTS["names"].items()}
_COMMAND = re.compile(r"\\[A-Za-z]+")
_REWRITTEN = [(re.compile(pattern), by) for pattern, by in _WORD_LISTS["rewritten"].items()]
_LINES = re.compile(r"\\(?:begin|end)\s*\{(?:align|aligned|cases|gather|gathered|equation|split)\*?\}|&")
_FONT = re.compile(r"\\(?:math(?:rm|bf|it|sf)|boldsymbol|bm|pmb)\s*(?=\{)")
_TOKEN = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+|\\.|\s(?:and|or)\s|.", re.DOTALL)
_OPEN = frozenset({"(", "[", "{", r"\{", r"\langle"})
_CLOSE = frozenset({")", "]", "}", r"\}", r"\rangle"})
_TAKES_ARGUMENTS = re.compile(r"\\(?:frac|binom|sqrt(?:\s*\[[^\]]*\])?)(?![A-Za-z])")
_ARGUMENT = re.compile(r"\\[A-Za-z]+(?:\{[^{}]*\})*|\((?=[^()]*\))[^()]*\)|.", re.DOTALL)


def clean(text: str) -> str:
    """The answer with one spelling for each sign."""
    text = _SPELLED.sub(lambda m: _SPELLINGS[m[0]], tidy(text))
    if "matrix" not in text and "array" not in text and r"\begin" in text:
        text = re.sub(r"\\\\\s*(?=.)", ", ", _LINES.sub("", text))
    text = _COMMAND.sub(lambda m: _RENAMED.get(m[0], m[0]), text)
    while font := _FONT.search(text):  # \mathrm{cm} is words, \mathbf{v} a letter
        inside, end = braced(text, font.end())
        if re.fullmatch(r"\s*[A-Za-z]{2,}[.\s]*", inside):
            inside = f"\\text{{{inside}}}"
        elif text[: font.start()].rstrip()[-1:] in ("^", "_"):
            inside = f"{{{inside}}}"
        text = text[: font.start()] + inside + text[end:]
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    return text.strip()


def tokens(text: str) -> Iterator[tuple[str, int, int, int]]:
    """(token, start, end, number of brackets around it) of a LaTeX text."""
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match[0].strip() or " "
        depth -= token in _CLOSE or token.startswith(r"\end")
        yield token, match.start(), match.end(), depth
        depth += token in _OPEN or token.startswith(r"\begin")


def split(text: str, marks: frozenset[str]) -> tuple[list[str], list[str]]:
    """The parts of a text between marks outside all brackets, and the marks."""
    parts, found, begin = [], [], 0
    for token, start, end, depth in tokens(text):
        if depth == 0 and token in marks:
            parts.append(text[begin:start].strip())
            found.append(token)
            begin = end
    return [*parts, text[begin:].strip()], found


def brackets(text: str) -> tuple[str, str, str] | None:
    """Opening bracket, content and closing bracket of a text that stands in one pair as a whole; else None."""
    found = list(tokens(text))
    if len(found) < 2 or found[0][0] not in _OPEN or found[-1][0] not in _CLOSE:
        return None
    if any(depth == 0 for _, _, _, depth in found[1:-1]):
        return None
    return found[0][0], text[found[0][2] : found[-1][1]].strip(), found[-1][0]


def braced(text: str, at: int) -> tuple[str, int]:
    """The content of the braces that open at a position, and the position behind them."""
    depth = 0
    for token, start, end, _ in tokens(text[at:]):
        depth += (token == "{") - (token == "}")
        if depth == 0:
            return text[at + 1 : at + start], at + end
    return text[at + 1 :], len(text)


def with_braces(text: str) -> str:
    r"""``\frac34i`` as ``\frac{3}{4}i``, ``\sqrt2`` as ``\sqrt{2}``, ``x^12`` as ``x^{12}``."""
    for command in reversed(list(_TAKES_ARGUMENTS.finditer(text))):  # from the right: arguments are done already
        at, arguments = command.end(), ""
        for _ in range(1 if "sqrt" in command[0] else 2):
            at += len(text[at:]) - len(text[at:].lstrip())
            if text[at : at + 1] == "{":
                inside, at = braced(text, at)
            elif argument := _ARGUMENT.match(text, at):
                inside, at = argument[0], argument.end()
            else:
                inside = ""
            arguments += f"{{{inside}}}"
        text = text[: command.end()] + arguments + text[at:]
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    return re.sub(r"\^\s*([0-9]+)|_\s*([0-9])", lambda m: f"^{{{m[1]}}}" if m[1] else f"_{{{m[2]}}}", text)
