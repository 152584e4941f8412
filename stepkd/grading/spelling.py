r"""One spelling for each sign of an answer, before :mod:`stepkd.grading.reading` looks at its structure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from stepkd.grading.normalise import tidy

_SIGNS = (
    r"½=\frac{1}{2} ⅓=\frac{1}{3} ⅔=\frac{2}{3} ¼=\frac{1}{4} ¾=\frac{3}{4} ⅕=\frac{1}{5} ⅖=\frac{2}{5} ⅗=\frac{3}{5} "
    r"⅘=\frac{4}{5} ⅙=\frac{1}{6} ⅚=\frac{5}{6} ⅛=\frac{1}{8} ⅜=\frac{3}{8} ⅝=\frac{5}{8} ⅞=\frac{7}{8} ²=^{2} ³=^{3} "
    r"π=\pi ∞=\infty ≤=\le ≥=\ge ≠=\ne √=\sqrt ∪=\cup ∩=\cap ∈=\in ×=\times ·=\cdot ÷=/ °=^{\circ} ±=\pm ∓=\mp ′=' "
    r"∅=\emptyset ℝ=\mathbb{R} ≈=\approx ⟨=\langle ⟩=\rangle θ=\theta α=\alpha β=\beta λ=\lambda φ=\phi +/-=\pm **=^ "
    r"⁄=/ <:=\le >:=\ge !:=\ne \%=%"
)
_SPELLINGS = {k.replace(":", "="): v + " " * v[-1].isalpha() for k, v in re.findall(r"(\S+?)=(\S+)", _SIGNS)}
_SPELLED = re.compile("|".join(re.escape(key) for key in sorted(_SPELLINGS, key=len, reverse=True)))
_NAMES = (
    r"dfrac=\frac tfrac=\frac cfrac=\frac dbinom=\binom tbinom=\binom leq=\le leqslant=\le leqq=\le geq=\ge "
    r"geqslant=\ge geqq=\ge neq=\ne varnothing=\emptyset lbrace=\{ rbrace=\} dots=\ldots cdots=\ldots mbox=\text "
    r"textbf=\text textrm=\text textit=\text textnormal=\text emph=\text operatorname=\text vert=| lvert=| "
    r"rvert=| lt=< gt=> lor=or vee=or land=and wedge=and colon=: degree=\circ infin=\infty or=or and=and"
)
_RENAMED = {rf"\{k}": f" {v} " if v.isalpha() else v for k, v in re.findall(r"(\w+)=(\S+)", _NAMES)}
_COMMAND = re.compile(r"\\[A-Za-z]+")
_REWRITTEN = (
    (r"\\[bB]igg?[lrm]?(?![A-Za-z])", ""),
    (r"\\not\s*=", r"\\ne "),
    (r"(?<![A-Za-z\\])inf(?:inity|ty)?(?![A-Za-z])", r"\\infty "),
    (r"(?<![A-Za-z\\])(pi|sqrt)(?![A-Za-z])", r"\\\1 "),
    (r"\\(?:mathrm|mathbf|boldsymbol|bm|mathit)\s+([A-Za-z0-9])(?![A-Za-z])", r"\1"),
    (r",?\s*\\text\s*\{\s*,?\s*(and|or)\s*\}|,\s*(and|or)(?![A-Za-z])", r" \1\2 "),
    (r"\^\s*\{?\s*\\circ\s*\}?|(?<!\^\{)\\circ(?![A-Za-z])", r"^{\\circ}"),
    (r"\{([^{}]*?)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"^\s*(?:\\approx|\\text\s*\{\s*(?:approximately|about)\s*\}|(?:approximately|about)\s|=)", ""),
    (r"(?<=[0-9])\s*\^\s*\{?o\}?$", r"^{\\circ}"),
    (r"(?<=[0-9])\s*\^?\s*\{?\s*(?:\\text\s*\{\s*)?(?:st|nd|rd|th)(?![A-Za-z])\s*\}{0,2}", ""),
    (r"\\pmod\s*(?:\{[^{}]*\}|[0-9]+)|\(\s*(?:\\text\s*\{\s*mod\s*\}|\\b?mod|mod)[^()]*\)", ""),
    (r"\s+", " "),
)
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
        text = re.sub(pattern, replacement, text)
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
