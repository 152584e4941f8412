"""Plots: lines, bands, bars and points over one axis, and rows of dots with intervals; the template draws them as SVG.

Colours come from the page's style sheet (classes ``c0`` to ``c6``: the palette of Okabe & Ito, told apart by
colour-blind readers), so that they follow its theme. Dashes, markers and hatching repeat every difference. All plots
have one width, at which a phone shows them without shrinking the text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

WIDTH, FLOOR = 360, 192
"""Width of a plot, and where its horizontal axis is, in pixels."""
LEFT, RIGHT, TOP = 54, 18, 10
NAMES, ROW = 132, 24
"""Width of the names of rows of dots, and height of a row."""
COLOURS = 7
DASHES = ("none", "6 3", "2 3", "8 3 2 3")
MARKERS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0",
    "M-3-3h6v6h-6z",
    "M0-4l4 7h-8z",
    "M0-4l4 4-4 4-4-4z",
    "M-3-3l6 6m0-6-6 6",
)
TALL = 280
"""Where the horizontal axis of a plot of points is: they are many, and their values are near each other."""
APART = 8
"""How far points with intervals stand from each other at least, from left to right."""
MOST_MARKED = 24
"""A line of more points has no markers."""
MOST_POINTS = 160
"""Points of a curve; a longer one is drawn as means of neighbours."""

Shape = Mapping[str, str]
"""Attributes of a path."""


@dataclass(frozen=True)
class Series:
    """One line, band or set of bars."""

    name: str
    """What it is, for the legend."""
    x: Sequence[float]
    """(n,) places."""
    y: Sequence[float | None] = ()
    """(n,) values of a line, or empty; None and what is not finite are left out."""
    low: Sequence[float | None] = ()
    """(n,) lower edge of a band, or empty."""
    high: Sequence[float | None] = ()
    """(n,) its upper edge."""
    style: int = 0
    """Which colour, marker and dashes; below 0 a faint line without markers."""
    fill: str = ""
    """Class of the band of bars: fill0 plain, fill1 hatched, fill2 dotted, behind faint; else the band is faint."""

    @property
    def colour(self) -> str:
        """Class of its colour."""
        return "guide" if self.style < 0 else f"c{self.style % COLOURS}"

    def stroke(self, path: str) -> Shape:
        """A line along a path."""
        return {"d": path, "class": f"line {self.colour}", "stroke-dasharray": DASHES[self.style % len(DASHES)]}

    def markers(self, places: Sequence[tuple[float, float]]) -> list[Shape]:
        """Its markers, unless they are too many."""
        look = {"d": MARKERS[self.style % len(MARKERS)], "class": f"dot {self.colour}"}
        kept = places if self.style >= 0 and len(self.y) <= MOST_MARKED else ()
        return [{**look, "transform": f"translate({x:.1f} {y:.1f})"} for x, y in kept]

    def area(self, path: str) -> list[Shape]:
        """A band within a path; hatching is drawn over it."""
        over = [{"d": path, "fill": f"url(#{self.fill})"}] if self.fill in ("fill1", "fill2") else []
        return [{"d": path, "class": f"bar {self.fill}" if self.fill else f"band {self.colour}"}, *over]

    @property
    def swatch(self) -> list[Shape]:
        """What the legend shows, 28 by 16 pixels; of a single point no line."""
        line = [self.stroke("M0 8H28")] if len(self.x) > 1 else []
        return self.area("M0 2H28V14H0Z") if self.fill else [*line, *self.markers([(14, 8)])]


@dataclass(frozen=True)
class Axis:
    """Values to pixels."""

    low: float
    high: float
    start: float
    end: float
    ticks: Mapping[float, str]

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class Figure:
    """A plot with its words."""

    title: str
    """One line above it."""
    shapes: Sequence[Shape]
    """What is drawn, from the back."""
    across: Axis
    """The horizontal axis."""
    up: Axis
    """The vertical axis."""
    x: str
    """Title of the horizontal axis."""
    y: str = ""
    """Title of the vertical axis."""
    legend: Sequence[Series] = ()
    """What the legend names; empty where there is one thing."""
    note: str = ""
    """What a reader must know, below it."""
    texts: Sequence[tuple[float, float, str]] = ()
    """Words in it: where their middle is, from the left and from above, and what they say."""


def plot(
    title: str,
    parts: Sequence[Series],
    x: str,
    y: str,
    *,
    ticks: Mapping[float, str] | None = None,
    note: str = "",
    floor: int = FLOOR,
) -> Figure:
    """Lines, bands and bars over one horizontal axis.

    Args:
        title: what is shown.
        parts: what is drawn, from the back.
        x, y: titles of the axes.
        ticks: place -> text on the horizontal axis; None: round numbers.
        note: text below.
        floor: where the horizontal axis is, in pixels from above.
    """
    values = [at for part in parts for row in (part.y, part.low, part.high) for at in row if _is_number(at)]
    is_tight = ticks is not None or any(part.fill for part in parts)
    places, start = [at for part in parts for at in part.x], LEFT if any(part.fill for part in parts) else LEFT + 8
    up, end = _axis(values, floor, TOP), WIDTH - RIGHT
    across = _axis(places, start, end, ticks, tight=is_tight)
    shapes: list[Shape] = []
    for part in parts:
        both = zip(part.x, part.low, part.high, strict=False)
        ends = [(at, low, high) for at, low, high in both if _is_number(low) and _is_number(high)]
        if len(ends) > 1:
            edge = [(at, high) for at, _, high in ends] + [(at, low) for at, low, _ in reversed(ends)]
            shapes += part.area(_path([(across(at), up(value)) for at, value in edge]) + "Z")
        points = [(across(at), up(value)) for at, value in zip(part.x, part.y, strict=False) if _is_number(value)]
        shapes += [part.stroke(_path(points)), *part.markers(points)]
    return Figure(title, shapes, across, up, x, y, parts if len(parts) > 1 else (), note)


def scatter(
    title: str, points: Mapping[str, Sequence[float | None]], lines: Sequence[Series], x: str, y: str
) -> Figure:
    """Points with their intervals over a logarithmic axis, each with its number in the legend, and lines behind them.

    Args:
        title: what is shown.
        points: name -> place (above 0), value, and the ends of the value's interval, None where it has none; one
            without a place or a value is left out.
        lines: what is drawn behind the points, at places above 0.
        x, y: titles of the axes.
    """
    parts, values = list[Series](), list[float]()
    for number, (name, (at, value, low, high)) in enumerate(points.items()):
        if _is_number(at) and _is_number(value) and at > 0:
            ends = [value if end is None else end for end in (low, high)]
            parts.append(Series(f"{number + 1} {name}", [at], low=ends[:1], high=ends[1:], style=number))
            values.append(value)
    every = [at for part in (*lines, *parts) for at in part.x] or [1.0, 10.0]
    first, last = min(every), max(every)
    powers = [10.0**power for power in range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)]
    ticks = [at for at in (factor * power for power in powers for factor in (1, 2, 5)) if first <= at <= last]
    if len(ticks) < 3:  # all near each other
        ticks = [at for at in _axis([first, last], 0, 1).ticks if first <= at <= last]
    logged = [replace(each, x=[math.log10(at) for at in each.x]) for each in (*lines, *parts)]
    marks = {math.log10(at): _tick(at, 4) for at in ticks}
    note = "Points at nearly the same place stand side by side: the table has what they cost."
    figure = plot(title, logged, x, y, ticks=marks, note=note, floor=TALL)
    shapes, texts = [*figure.shapes], list[tuple[float, float, str]]()
    across, up = float(WIDTH - RIGHT + APART), figure.up
    places = [figure.across(part.x[0]) for part in logged[len(lines) :]]
    for rank, i in enumerate(sorted(range(len(parts)), key=places.__getitem__)[::-1]):
        part, bottom, top = parts[i], *(up(end or 0.0) for end in (*parts[i].low, *parts[i].high))
        across = min(places[i], across - APART)
        shapes += [{"d": f"M{across:.1f} {bottom:.1f}V{top:.1f}", "class": f"line {part.colour}"}]
        shapes += part.markers([(across, up(values[i]))])
        is_above = (rank % 2 == 0 or bottom > TALL - 14) and top > TOP + 8  # neighbours take turns
        texts.append((across, top - 5 if is_above else min(bottom + 12, TALL - 4), part.name.partition(" ")[0]))
    return replace(figure, shapes=shapes, texts=texts, legend=[*parts, *lines])


def dots(title: str, rows: Mapping[str, Sequence[Any]], x: str, scale: float = 1.0) -> Figure:
    """A row per name: a value with its interval, and single values (of seeds) as small rings.

    Args:
        title: what is shown.
        rows: name -> value, ends of its interval, and any number of single values; what is no number is left out.
        x: title of the axis.
        scale: what all numbers are multiplied with.
    """
    scaled = [[at * scale if _is_number(at) else None for at in numbers] for numbers in rows.values()]
    across = _axis([at for numbers in scaled for at in numbers if at is not None], NAMES, WIDTH - RIGHT)
    up = Axis(-0.5, len(rows) - 0.5, TOP, TOP + ROW * len(rows), dict(enumerate(rows)))
    shapes: list[Shape] = []
    for number, (value, low, high, *single) in enumerate(scaled):
        line = Series("", (), style=number)
        if low is not None and high is not None:
            shapes.append(
                {"d": f"M{across(low):.1f} {up(number):.1f}H{across(high):.1f}", "class": f"line {line.colour}"}
            )
        for at in filter(_is_number, single):
            shapes += [{**each, "class": f"ring {line.colour}"} for each in line.markers([(across(at), up(number))])]
        shapes += [] if value is None else line.markers([(across(value), up(number))])
    return Figure(title, shapes, across, up, x)


def bars(edges: Sequence[float], stack: Mapping[str, Sequence[float]]) -> list[Series]:
    """Stacked bars; those that are all empty are left out.

    Args:
        edges: (n + 1,) edges of the bars, ascending.
        stack: name -> (n,) heights, from below, at most three.
    """
    below, found, twice = [0.0] * (len(edges) - 1), list[Series](), [at for at in edges for _ in range(2)][1:-1]
    for number, (name, heights) in enumerate(stack.items()):
        tops = [low + height for low, height in zip(below, heights, strict=True)]
        low, high = ([at for at in each for _ in range(2)] for each in (below, tops))
        found += [Series(name, twice, low=low, high=high, fill=f"fill{number}")] if any(heights) else []
        below = tops
    return found


def thinned(values: Sequence[float]) -> list[float]:
    """A curve's places or values as at most :data:`MOST_POINTS` numbers: means of neighbours."""
    size = max(1, -(-len(values) // MOST_POINTS))
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    return [sum(group) / len(group) for group in groups]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""


def _axis(
    values: Sequence[float], start: float, end: float, ticks: Mapping[float, str] | None = None, *, tight: bool = False
) -> Axis:
    """An axis that holds the values, and ends with them where it is tight; its ticks are round unless given."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    size = max(abs(low), abs(high))
    if high - low <= max(1e-5 * size, 1e-12):  # too near for ticks of their own
        low, high = low - (size or 1) / 10, high + (size or 1) / 10
    exponent = math.floor(math.log10((high - low) / 4))
    power = 10.0**exponent
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= (high - low) / 4 * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    places = [round(i * step, 1 - exponent) for i in range(first, last + 1)]
    digits = max(4, math.floor(math.log10(max(size, high - low))) - exponent + 2)  # so that neighbours differ
    marks = {at: _tick(at, digits) for at in places if low <= at <= high or not tight}
    ends = (low, high) if tight else (min(marks), max(marks))
    return Axis(*ends, start, end, marks if ticks is None else ticks)


def _tick(value: float, digits: int) -> str:
    unit, scale = ("M", 1e6) if abs(value) >= 1e6 else ("k", 1e3) if abs(value) >= 1e4 else ("", 1.0)
    return f"{value / scale:.{digits}g}{unit}".replace("-", "−")
