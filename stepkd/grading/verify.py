r"""Whether two short answers are the same mathematics: the check that runs inside a grading worker.

Easy cases are decided by :mod:`stepkd.grading.normalise`; the rest is read by :mod:`stepkd.grading.reading` and
compared by type. Expressions are equal where their values at several points agree to 30 digits. Nothing here has a time
limit, because the worker that runs this can be ended at any moment: call :func:`equivalent` only on answers you trust.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import sympy

from stepkd.grading.extract import numbers_in
from stepkd.grading.normalise import clean, quick_verdict, read_number, tidy, unit_scale, with_braces, words_key
from stepkd.grading.reading import LOOSE, Based, Clock, Items, Number, Region, Relation, Words, as_region, read

_MIN_ROUNDED = 6
_DIGITS = 30


def equivalent(candidate: str, gold: str, convention: str = "stepkd") -> bool:
    r"""Whether a candidate answer equals the reference answer.

    Args:
        candidate: the extracted answer.
        gold: the reference answer. Not symmetric: ``3a + b = 10`` answers a gold of ``10``, not the other way round.
        convention: ``prm800k`` also refuses what PRM800K's official grader (openai/prm800k) refuses by its rules:
            another fraction of the same value (2/4 for 1/2), anything but an integer for an integer (10/2 for 5), a
            list in another order, 0.5 for 50%, and an equation, inequality or interval written otherwise. Not taken
            over is what that grader accepts or refuses because of its parser: it takes ``2^n - 1`` for ``2^{n-1}``,
            ``y = 5`` for ``x = 5`` and ``R`` for ``r``, and evaluates no powers of two digits, and no expressions of
            more than two letters.

    Returns:
        ``True`` if they are equal as plain numbers, words or mathematics; ``False`` otherwise, also when one of them
        cannot be read. May run for ever or exhaust memory on hostile input (module docstring).
    """
    quick = quick_verdict(candidate, gold)
    equal = _equivalent(candidate, gold) if quick is None else quick
    return equal and (convention == "stepkd" or _prm800k_allows(candidate, gold))


def _equivalent(candidate: str, gold: str) -> bool:
    moduli = [re.findall(r"mod\W+([0-9]+)", text) for text in (gold, candidate)]
    if all(moduli) and moduli[0] != moduli[1]:
        return False
    read_gold, read_candidate = read(gold), read(candidate)
    if same(read_gold, read_candidate):
        return True
    if isinstance(read_gold, Number) and isinstance(read_candidate, Words):
        return _in_prose(read_gold, candidate)
    if re.search(r"[0-9],[0-9]{3}", gold) or re.search(r"[0-9],[0-9]{3}", candidate):
        lists = read(gold, False), read(candidate, False)
        return all(isinstance(each, Items) for each in lists) and same(*lists)
    return False


def _in_prose(gold: Number, text: str) -> bool:
    """A sentence answers by its only number."""
    numbers = numbers_in(text)
    plain = tidy(text)
    if len(numbers) != 1 or "\\" in plain or not re.search(r"[A-Za-z]{3,}\s+\S*[A-Za-z0-9]{1,}", plain):
        return False
    if any(unit_scale(word) != 1 for word in re.findall(r"[A-Za-z]{4,}", plain)):
        return False
    return same(gold, read(numbers[0]))


def same(gold: Any, candidate: Any) -> bool:
    """Whether two values of :mod:`stepkd.grading.reading` are the same answer."""
    gold, candidate = _unwrap(gold), _unwrap(candidate)
    for one, other in ((gold, candidate), (candidate, gold)):
        if isinstance(one, Items) and one.kind == "either":
            return any(same(item, other) if one is gold else same(other, item) for item in one.items)
    if isinstance(gold, Relation) and isinstance(candidate, Relation):
        return _same_relation(gold, candidate)
    if isinstance(candidate, Relation):
        return candidate.value is not None and same(gold, candidate.value)
    if isinstance(gold, Relation):
        return bool(gold.name) and gold.value is not None and same(gold.value, candidate)
    if isinstance(gold, Region) or isinstance(candidate, Region):
        return _same_region(gold, candidate)
    if isinstance(gold, Based | Clock) or isinstance(candidate, Based | Clock):
        return _same_numeral(gold, candidate)
    if isinstance(gold, Number) and isinstance(candidate, Number):
        return _same_number(gold, candidate)
    if isinstance(gold, Words) and isinstance(candidate, Words):
        return bool(gold.key) and gold.key == candidate.key
    return isinstance(gold, Items) and isinstance(candidate, Items) and _same_items(gold, candidate)


def _unwrap(value: Any) -> Any:
    """The only item of a list; of one answer spelled twice (``1/2 or 0.5``), the first spelling."""
    while isinstance(value, Items) and value.kind != "grid" and (value.kind == "or" or len(value.items) == 1):
        if not all(same(value.items[0], other) for other in value.items[1:]):
            return Items("list", value.items)
        value = value.items[0]
    return value


def _flat(value: Items) -> Items:
    """A matrix of one column or row as the tuple of its entries; anything else as it is."""
    if value.kind == "grid" and (len(value.items) == 1 or all(len(row.items) == 1 for row in value.items)):
        return Items("()", sum((row.items for row in value.items), ()))
    return value


def _same_items(gold: Items, candidate: Items) -> bool:
    if gold.kind != candidate.kind:
        gold, candidate = _flat(gold), _flat(candidate)
    if gold.kind != candidate.kind and "grid" in (gold.kind, candidate.kind):
        return False
    if gold.kind in LOOSE and candidate.kind in LOOSE:
        items: list[Sequence[Any]] = [gold.items, candidate.items]
        if any(isinstance(item, Relation) for item in items[0]) != any(isinstance(item, Relation) for item in items[1]):
            items = [_without_names(each) for each in items]
        if gold.kind == candidate.kind == "set":
            items = [_distinct(each) for each in items]
        return _match(*items)
    tuples = {gold.kind, candidate.kind} - {"list", "or"}
    if len(tuples) > 1 or "set" in tuples:
        return False
    return _in_order(_coordinates(gold), _coordinates(candidate))


def _without_names(items: Sequence[Any]) -> list[Any]:
    """Values of ``x = 1, x = 2`` and ``x = 1, 2``: one name at most, else the items as they are."""
    names = {item.name for item in items if isinstance(item, Relation)}
    if len(names) != 1 or "" in names:
        return list(items)
    return [item.value if isinstance(item, Relation) else item for item in items]


def _coordinates(value: Items) -> list[Any]:
    """``x = 1, y = 2`` as 1, 2: by the names' order; other items as they are."""
    named = [item for item in value.items if isinstance(item, Relation) and item.name]
    if len(named) == len(value.items) and len({item.name for item in named}) == len(named):
        return [item.value for item in sorted(named, key=lambda item: item.name)]
    return list(value.items)


def _distinct(items: Sequence[Any]) -> list[Any]:
    kept: list[Any] = []
    for item in items:
        if not any(same(item, other) for other in kept):
            kept.append(item)
    return kept


def _match(gold: Sequence[Any], candidate: Sequence[Any]) -> bool:
    """As multisets."""
    if len(gold) != len(candidate):
        return False
    left = list(candidate)
    for item in gold:
        found = next((i for i, other in enumerate(left) if same(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _in_order(gold: Sequence[Any], candidate: Sequence[Any]) -> bool:
    return len(gold) == len(candidate) and all(map(same, gold, candidate))


def _same_numeral(gold: Any, candidate: Any) -> bool:
    if isinstance(gold, Based):
        return gold == candidate or (isinstance(candidate, Number) and str(candidate.expr) == gold.digits)
    if isinstance(gold, Clock) and isinstance(candidate, Clock):
        return gold.parts == candidate.parts and len({gold.half, candidate.half} - {""}) < 2
    clock, other = (gold, candidate) if isinstance(gold, Clock) else (candidate, gold)
    return isinstance(clock, Clock) and isinstance(other, Number) and bool(other.expr == clock.ratio)


def _same_region(gold: Any, candidate: Any) -> bool:
    ours, theirs = as_region(gold), as_region(candidate)
    if ours is None or theirs is None or len({ours.name, theirs.name} - {""}) > 1:
        return False
    first, second = _parts(ours.reals), _parts(theirs.reals)
    if first is None or second is None or [kind for _, kind in first] != [kind for _, kind in second]:
        return bool(ours.reals == theirs.reals)
    return all(all(map(equal, a, b)) for (a, _), (b, _) in zip(first, second, strict=True))


def _parts(reals: Any) -> list[tuple[tuple[Any, ...], str]] | None:
    """Intervals and points of a set in their order, each as its ends and its kind; None for other sets."""
    parts: list[tuple[tuple[Any, ...], str]] = []
    for part in reals.args if isinstance(reals, sympy.Union) else [reals]:
        if part.free_symbols or not isinstance(part, sympy.FiniteSet | sympy.Interval):
            return None
        if isinstance(part, sympy.FiniteSet):
            parts += [((point,), "point") for point in part.args]
        else:
            parts.append(((part.start, part.end), "[("[bool(part.left_open)] + "])"[bool(part.right_open)]))
    return sorted(parts, key=lambda part: float(part[0][0].evalf()))


def _same_number(gold: Number, candidate: Number) -> bool:
    values = [(gold.expr, candidate.expr)]
    if gold.percent or candidate.percent:
        values.append((gold.expr / (100 if gold.percent else 1), candidate.expr / (100 if candidate.percent else 1)))
    if gold.degrees != candidate.degrees:
        values.append(tuple(n.expr * sympy.pi / 180 if n.degrees else n.expr for n in (gold, candidate)))
    return any(equal(a, b) for a, b in values) or _rounded(gold, candidate)


def _rounded(gold: Number, candidate: Number) -> bool:
    """Whether a long decimal reference agrees to all its digits; an exact reference has no roundings."""
    written = [number.places for number in (gold, candidate) if number.places is not None]
    if gold.places is None or gold.percent != candidate.percent or any(digits < _MIN_ROUNDED for digits, _ in written):
        return False
    difference = abs((gold.expr - candidate.expr).evalf(_DIGITS))
    return bool(difference.is_number and difference <= 5.0 * 10.0 ** (max(last for _, last in written) - 1))


def _values(exprs: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The values of expressions at a few points, to 30 digits; points where one has none are left out."""
    letters = sorted(set().union(*(expr.free_symbols for expr in exprs)), key=str)
    rows = []
    for round_ in range(6 if letters else 1):
        point = {
            letter: sympy.Rational(
                (-1) ** (round_ * (i + 1) + (round_ > 3)) * (7 + 11 * i + 3 * round_ * (i + 2)), 10 + 3 * round_
            )
            for i, letter in enumerate(letters)
        }
        values = tuple(expr.subs(point).evalf(_DIGITS, maxn=400) for expr in exprs)
        if all(value.is_number and value.is_finite is not False and value is not sympy.nan for value in values):
            rows.append(values)
    return rows


def _near(a: Any, b: Any) -> bool:
    scale = max(abs(a), abs(b), 1e-300)
    return bool(abs(a - b) <= scale * 1e-20)


def equal(gold: Any, candidate: Any) -> bool:
    """Whether two sympy expressions are the same for all values of their letters."""
    if gold == candidate:
        return True
    if gold.is_infinite or candidate.is_infinite:
        return False
    rows = _values((gold, candidate))
    if rows:
        return all(_near(a, b) or abs(a - b) < 1e-24 for a, b in rows)
    return bool(sympy.simplify(gold - candidate) == 0)


def _same_relation(gold: Relation, candidate: Relation) -> bool:
    if gold.name and candidate.name and (gold.name == candidate.name or {"y", "f(x)"} == {gold.name, candidate.name}):
        return same(gold.value, candidate.value)
    if len(gold.signs) != len(candidate.signs) or None in (*gold.sides, *candidate.sides):
        return False
    ours, theirs = _differences(gold), _differences(candidate)
    if [sign for sign, _ in ours] != [sign for sign, _ in theirs]:
        theirs = theirs[::-1]
    return all(a[0] == b[0] and _proportional(a[1], b[1], a[0]) for a, b in zip(ours, theirs, strict=True))


def _differences(relation: Relation) -> list[tuple[str, Any]]:
    """Each sign with left side minus right side; every > turned into <."""
    pairs = zip(relation.signs, relation.sides, relation.sides[1:], strict=False)
    return [(s.replace(">", "<"), b - a if ">" in s else a - b) for s, a, b in pairs]


def _proportional(gold: Any, candidate: Any, sign: str) -> bool:
    """Whether two left sides vanish (or are negative) at the same points."""
    if gold.free_symbols != candidate.free_symbols or not gold.free_symbols:
        return equal(gold, candidate)
    if sign in ("=", "!="):
        gold, candidate = (sympy.numer(sympy.together(each)) for each in (gold, candidate))
    rows = [(a, b) for a, b in _values((gold, candidate)) if a != 0 and b != 0]
    ratios = [a / b for a, b in rows]
    if ratios and all(_near(ratio, ratios[0]) for ratio in ratios):
        return sign in ("=", "!=") or bool(ratios[0].is_real and ratios[0] > 0)
    return False


_FRACTION = re.compile(r"(-?)\s*(?:\\frac\s*\{\s*(-?)(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d+)\s*/\s*(\d+))")


def _prm800k_allows(candidate: str, gold: str) -> bool:
    values = read(gold), read(candidate)
    if words_key(gold) == words_key(candidate) or all(isinstance(value, Relation | Region) for value in values):
        return words_key(gold) == words_key(candidate)
    numbers = [read_number(tidy(text)) for text in (gold, candidate)]
    if numbers[0] and numbers[1]:
        return numbers[0].value == numbers[1].value
    fractions = [_FRACTION.fullmatch(with_braces(clean(text)).replace(" ", "")) for text in (gold, candidate)]
    if fractions[0] and fractions[1]:
        return [*filter(None, fractions[0].groups())] == [*filter(None, fractions[1].groups())]
    if all(isinstance(value, Number) for value in values):
        return not any(number is not None and number.value.denominator == 1 for number in numbers)
    if all(isinstance(value, Items) for value in values):
        return _in_order(values[0].items, values[1].items)
    return type(values[0]) is type(values[1]) or any(isinstance(value, Relation) for value in values)
