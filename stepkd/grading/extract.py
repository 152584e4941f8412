r"""Find the final answer in a completion.

Every extractor is linear in the length of the text (single scans; no nested repetition), so it is safe to run on
hostile text in the training process.

The extractors of a list are tried in order; the first that finds something wins. A *strict* reading (only the format
that the benchmark prescribes counts, anything else is unparsed) is a list of one: ``("hash",)`` or ``("boxed",)``.
What stands before the last ``</think>`` is a draft and is not read. An answer that was begun and not finished (an open
last box, an open formula at the end) ends the search: nothing before it is the answer.

Which occurrence counts is each extractor's own convention:

* ``hash`` takes the *first* ``####`` answer. The mark ends a solution, and a model without a stop string goes on to
  write another question and answer after it. Markdown headings (``#### Step 2: ...``) are not answers.
* ``boxed``, ``answer_phrase``, ``latex`` and ``last_number`` take the *last*: a solution may box or name intermediate
  results, and a correction comes after what it corrects. Boxes or formulas joined by "and", "or" or a
  comma are one answer, a list. ``last_number`` is for word problems: it does not read numbers inside an expression.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence

from stepkd.errors import ConfigError, check_choice

EXTRACTOR_VERSION = "3"
"""Written to the settings of evaluations; raised whenever an extraction rule changes, because rules move scores."""

DEFAULT_EXTRACTORS: tuple[str, ...] = ("hash", "boxed", "answer_phrase", "latex", "last_number")

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])(\s{0,8}\{)?|\\[\s\S]|[{}]")
_BARE_BOX = re.compile(r"[^\S\n]{0,8}([^\s{}$]{1,64})")

_HASH = re.compile(r"(?<!#)####(?!#)[^\S\n]*\n?(?!####)([^\n]*)")
_HEADING = re.compile(
    r"(?:(?:step|part|section|problem|question|solution|case|explanation|conclusion|verification|note|example)\b"
    r"(?![^\n]{0,20}answer)|[1-9][.)]\s+[A-Za-z])",
    re.IGNORECASE,
)
_ANSWER_LEAD = re.compile(r"(?:the\s+)?(?:final\s+)?answer\s*(?:is)?\s*[:=]?\s*", re.IGNORECASE)
_LOOKS_NUMERIC = re.compile(r"(?:[A-Za-z]\s?=\s?)?[-+−(\[]?\s?(?:[0-9.$€£¥₹]|\\)")

_PHRASE = re.compile(
    r"\banswer\b[^.\n:=]{0,60}?(?:\bis\b|[:=])[\s*_:]{0,8}(?=([^\n]{1,400}))",
    re.IGNORECASE,
)
_PHRASE_END = re.compile(r",\s+(?=[a-z]{2,})|\s(?:because|since|as we)\b|;\s")
_THINK_START = re.compile(r"<(?:think|thinking|thought|reasoning)>")
_THINK_END = re.compile(r"</(?:think|thinking|thought|reasoning)>")
_JOINT = re.compile(
    r"[\s$.:\\()\[\]}]{0,16}(?:,|(?:,?\s?\\text\s?\{)?\s?(and|or)\b)[\s$\\()\[\]}]{0,16}(?:(and|or)\b)?"
    r"[\s$\\()\[\]]{0,16}(?:[A-Za-z]\w{0,2}\s?=\s?)?"
)
_DELIMITER = re.compile(r"\$\$?|\\[()\[\]]|\\[\s\S]")
_CLOSES = {"$": "$", "$$": "$$", r"\(": r"\)", r"\[": r"\]"}
_BARE = re.compile(
    r"(?:\\(?:text|mbox|textbf)\s?\{[^{}]{0,80}\}|\\(?!f?box)[A-Za-z]+|\$(?=[0-9])|[ -#%-@\[-`{-~½¼¾²³°×÷·±√π∞∪∩∈≤≥≠≈−]"
    r"|(?<![A-Za-z])(?:and|or|pi|sqrt|[A-Za-z])(?![A-Za-z]{2})){1,300}"
)
_ONE_WORD = re.compile(r"[A-Za-z]{1,30}[.!]?")
_INLINE_MATH = re.compile(r"\$(?!\s)([^$\n]{1,300}?)(?<!\s)\$(?![0-9])|\\\((.{1,300}?)\\\)")

_MOST_JOINED = 16
_BEFORE_TERM = re.compile(
    r"(?:[0-9A-Za-z)\]}%]\s*[-−–+]|[+^_{([/×÷√|≤≥≠]|(?<!\*)\*|(?<![<>])[<>]|(?:\\[A-Za-z]+))\s*$(?<!\\\()(?<!\\\[)"
)
_AFTER_TERM = re.compile(
    r"\s*(?:[+*^_×÷}√|<≤≥≠]|[-−–]\s*[0-9$]|=\s*\S|\\(?:[dt]?frac|sqrt|pi|times|cdot|pm|le|ge|[lg]eq|ne|in|cup)\b)"
    r"|[(\[]|[abcdefijknopqrtuvwxyz](?![A-Za-z])"
)
_SENTENCE_END = re.compile(r"[.?](?=\s|$)|<\||</|####")

_INT = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+"
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_^])(?<!\^\{)(?<!_\{)(?<![0-9]\.)"
    # A minus after a digit or a closing bracket subtracts; one apart from its number is a sign after "=", ":", "is".
    r"(?:(?<![)\]}.])[-−+]|(?:(?<=[=:]\s)|(?<=[=:])|(?<=is\s))[-−]\s)?"
    r"(?:\\?[$€£¥₹]\s?[-−]?)?"
    r"(?:"
    rf"(?:[0-9]{{1,9}}\s?)?\\[dt]?frac\s?\{{\s?-?[0-9]{{1,40}}\s?\}}\s?\{{\s?[0-9]{{1,40}}\s?\}}"
    rf"|[0-9]{{1,9}}\s[0-9]{{1,9}}/[0-9]{{1,9}}(?![0-9/])"
    rf"|(?:(?:{_INT})(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,9}(?![A-Za-z0-9])|\s?(?:\\times|\\cdot|[×x*])\s?10\s?\^\s?(?:\{-?[0-9]{1,9}\}|-?[0-9]{1,9}))?"
    r"(?:\^(?:\{-?[0-9]{1,9}\}|-?[0-9]{1,9}))?"
    r"(?:\s?/\s?[0-9]{1,40}(?![0-9]))?"
    r")"
    r"(?:\s?\\?%)?"
)


def _tidy_ends(text: str) -> str:
    """Strip blanks, Markdown emphasis, quotes and closing punctuation around an extracted answer.

    Args:
        text: the answer as cut from the completion.

    Returns:
        The answer without its wrapping; may be empty.
    """
    text = text.lstrip("*`\"'_ \t\r\n\f\v")
    stripped = text.rstrip(".,;:?*`\"'_ \t\r\n\f\v")  # no "!": 5! is not 5
    if stripped.endswith(("\\", r"\right", r"\left")):  # "\," and "\right." are LaTeX
        return text[: len(stripped) + 1]
    return stripped


def _first_sentence(text: str) -> str:
    end = _SENTENCE_END.search(text)
    return text[: end.start()] if end and end.start() > 0 else text


def _hash_line(line: str) -> str:
    line = line[:2000].strip("* \t\r")
    if _HEADING.match(line) or line.endswith((":", ":**")):
        return ""
    lead = _ANSWER_LEAD.search(line)
    return _tidy_ends(_first_sentence(line[lead.end() :] if lead and lead.end() < len(line) else line))


def _extract_hash(text: str) -> str | None:
    """The answer on the first ``####`` line (GSM8K's mark).

    A line counts if it starts like a number or a formula. Words count on the last line only: elsewhere ``####`` before
    words is a Markdown heading.
    """
    end = len(text.rstrip())
    lines = ((_hash_line(match.group(1)), match.end() >= end) for match in _HASH.finditer(text))
    return next((answer for answer, is_last in lines if answer and (is_last or _LOOKS_NUMERIC.match(answer))), None)


def _boxes(text: str) -> tuple[list[tuple[int, int, str]], bool]:
    """(start, end, content) of all balanced boxes in order of their start, and whether a box stays open."""
    boxes: list[tuple[int, int, int, int]] = []
    stack: list[tuple[int, int]] = []  # (start of the box or -1, position after the brace)
    begin = min((at for at in (text.find(r"\boxed"), text.find(r"\fbox")) if at >= 0), default=len(text))
    end_of_text = len(text.rstrip())
    is_open = False
    for token in _BOX.finditer(text, begin):
        kind = token.group()
        if kind == "{" or token[1]:
            stack.append((token.start() if token[1] else -1, token.end()))
        elif kind == "}":
            if stack:
                start, after = stack.pop()
                if start >= 0:
                    boxes.append((start, after, token.start(), token.end()))
        elif len(kind) > 2:
            bare = _BARE_BOX.match(text, token.end())
            is_open = not bare and token.end() >= end_of_text
            if bare:
                boxes.append((token.start(), bare.start(1), bare.end(1), bare.end(1)))
    # Only a box that holds no other box is cut out: nested boxes would make the total length quadratic.
    boxes.sort()
    next_starts = [start for start, *_ in boxes[1:]] + [len(text)]
    pairs = zip(boxes, next_starts, strict=False)
    inner = [(start, end, text[a:b]) for (start, a, b, end), after in pairs if after >= b]
    return inner, is_open or any(start >= 0 for start, _ in stack)


def _extract_boxed(text: str) -> str | None:
    r"""The content of the last balanced ``\boxed{...}`` or ``\fbox{...}`` (innermost when nested), or of ``\boxed 5``.

    Empty where the last box stays open. Boxes joined by "and", "or" or a comma are one list.
    """
    boxes, is_open = _boxes(text)
    return "" if is_open else _joined(text, boxes)


def _joined(text: str, spans: Sequence[tuple[int, int, str]]) -> str | None:
    """The last span that holds something, with those joined to it."""
    joined, begin, parts = "", 0, 0
    for start, end, content in reversed(spans):
        joint = _JOINT.fullmatch(text[end:begin]) if joined and begin - end < 60 else None
        answer = _tidy_ends(content)
        if (joined and joint is None) or parts == _MOST_JOINED:
            break
        if answer:
            between = "" if joint is None else " or " if "or" in joint.groups() else ", "
            joined, begin, parts = answer + between + joined, start, parts + 1
    return joined or None


def _extract_latex(text: str) -> str | None:
    r"""The last formula (``$...$``, ``\(...\)``, ``\[...\]``), or a text that is nothing but one answer.

    Empty where the text ends inside a formula.
    """
    spans: list[tuple[int, int, str]] = []
    begun: tuple[str, int, int] | None = None
    for match in _DELIMITER.finditer(text):
        token, at, end = match[0], match.start(), match.end()
        if begun and token == _CLOSES[begun[0]] and _may_close(text, token, begun[2], at):
            spans.append((begun[1], end, text[begun[2] : at]))
            begun = None
        elif token in _CLOSES and (token not in "$$" or begun is None or begun[0] == "$"):
            begun = (token, at, end)
    if begun and (begun[0] != "$" or "\\" in text[begun[2] :]):
        return ""
    whole = text.strip()
    if not spans and len(whole) <= 300 and (_ONE_WORD.fullmatch(whole) or _BARE.fullmatch(whole)):
        return _tidy_ends(whole) or None
    return _joined(text, spans)


def _may_close(text: str, token: str, begin: int, end: int) -> bool:
    """Whether a mark ends a formula: one that holds something, and a dollar sign is not money."""
    if end == begin or token != "$":
        return end > begin
    blank = text[begin].isspace() or text[end - 1].isspace()
    return not blank and not text[end + 1 : end + 2].isdigit() and "\n" not in text[begin:end]


def _extract_answer_phrase(text: str) -> str | None:
    """What follows the last "the (final) answer is ..." or "Answer: ...", up to the end of the sentence."""
    newest_first = reversed(deque(_PHRASE.finditer(text), maxlen=256))
    payloads = (_phrase_payload(match.group(1)) for match in newest_first)  # only those looked at are cut out
    return next(filter(None, payloads), None)


def _phrase_payload(payload: str) -> str:
    boxed = _extract_boxed(payload)
    if boxed:
        return boxed
    payload = payload.lstrip("*_ \t")
    math = _INLINE_MATH.match(payload)
    if math:
        return _tidy_ends(math.group(1) or math.group(2))
    payload = _first_sentence(payload)
    end = _PHRASE_END.search(payload)
    return _tidy_ends(payload[: end.start()] if end else payload)


def _extract_last_number(text: str) -> str | None:
    """The last number, with its sign, currency, thousands separators, decimals, fraction and percent sign.

    Exponents of units (``m^2``), subscripts and digits inside words (``H2O``) are not numbers of their own. Empty where
    the number is part of an expression (``3y + 5``, ``\\sqrt{5}``).
    """
    chosen = next(iter(deque(_NUMBER.finditer(text), maxlen=1)), None)
    if chosen is None:
        return None
    return "" if _in_expression(text, *chosen.span()) else chosen.group().strip()


def numbers_in(text: str) -> list[str]:
    """All numbers of a short text, as :func:`_extract_last_number` reads them."""
    return [match.group().strip() for match in _NUMBER.finditer(text)]


def _in_expression(text: str, start: int, end: int) -> bool:
    before = text[max(0, start - 40) : start].rpartition("\n")[2]
    after = text[end : end + 40].partition("\n")[0]
    while before and after and before[-1] in "*_`'\"" and after[0] == before[-1]:  # emphasis
        before, after = before[:-1], after[1:]
    if before[-1:] in ("(", "[") and after[:1] in (")", "]"):
        before, after = before[:-1], after[1:]
    return _BEFORE_TERM.search(before) is not None or _AFTER_TERM.match(after) is not None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "hash": _extract_hash,
    "boxed": _extract_boxed,
    "answer_phrase": _extract_answer_phrase,
    "latex": _extract_latex,
    "last_number": _extract_last_number,
}
"""Built-in extractors by name."""


def check_extractors(extractors: Sequence[str]) -> tuple[str, ...]:
    """Validate a list of extractor names.

    Args:
        extractors: names from ``EXTRACTORS``, at least one.

    Returns:
        The same names as a tuple.

    Raises:
        ConfigError: the list is empty or a bare string, or a name is unknown.
    """
    if isinstance(extractors, str) or not extractors:
        raise ConfigError(f"extractors is {extractors!r}; give a list with at least one of {sorted(EXTRACTORS)}")
    for name in extractors:
        check_choice("extractor", name, EXTRACTORS)
    return tuple(extractors)


def extract_answer(text: str, extractors: Sequence[str] = DEFAULT_EXTRACTORS, *, cut_off: bool = False) -> str | None:
    r"""Find the final answer in a completion.

    Args:
        text: the completion; any length, any characters (NUL and lone surrogates included).
        extractors: names tried in order: ``hash``, ``boxed``, ``answer_phrase``, ``latex`` or ``last_number``. One name
            alone is a strict reading.
        cut_off: whether the completion was cut off at its longest length: then only a closed box and a finished
            ``####`` line are answers.

    Returns:
        The answer as written, without its marks (``####``, ``\boxed``), or ``None`` when nothing was found.

    Raises:
        ConfigError: an unknown extractor.
    """
    names = check_extractors(extractors)
    text = _without_drafts(text)
    if cut_off:
        names = tuple(name for name in names if name in ("hash", "boxed"))
    for name in names:
        found = EXTRACTORS[name](text[: text.rfind("\n") + 1] if cut_off and name == "hash" else text)
        if found is not None:
            return found or None
    return None


def _without_drafts(text: str) -> str:
    """The text behind the last thought; a thought that never ended is left out too."""
    if "<" not in text:
        return text
    return _THINK_START.split(_THINK_END.split(text)[-1], maxsplit=1)[0]
