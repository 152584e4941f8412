"""What plots hold, in pixels."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from stepkd.report.plots import (
    APART,
    FLOOR,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TALL,
    TOP,
    WIDTH,
    Series,
    bars,
    dots,
    plot,
    scatter,
    thinned,
)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], ["0", "0.25", "0.5", "0.75", "1"]),
        ([3.0, 97.0], ["0", "25", "50", "75", "100"]),
        ([-0.4, 0.3], ["−0.4", "−0.2", "0", "0.2", "0.4"]),
        ([0.0, 120_000.0], ["0", "50k", "100k", "150k"]),
        ([1e-6, 4e-6], ["1e−06", "2e−06", "3e−06", "4e−06"]),
        ([1.00001, 1.00004], ["1.00001", "1.00002", "1.00003", "1.00004"]),
        ([2.0e-4, 5.0e-4], ["0.0002", "0.0003", "0.0004", "0.0005"]),
        ([-30_000.0, -10_000.0], ["−30k", "−25k", "−20k", "−15k", "−10k"]),
        ([5.0, 5.0], ["4.5", "4.75", "5", "5.25", "5.5"]),
        ([], ["0", "0.25", "0.5", "0.75", "1"]),
    ],
)
def test_ticks_are_round_numbers_that_enclose_the_values(values: list[float], ticks: list[str]) -> None:
    figure = plot("t", [Series("s", range(len(values)), values)], "x", "y")
    assert list(figure.up.ticks.values()) == ticks
    assert all(TOP <= figure.up(value) <= FLOOR for value in values)


def test_a_line_skips_what_is_no_number_and_its_band_closes() -> None:
    series = Series("s", [0, 1, 2, 3], [1.0, None, math.nan, 2.0], low=[0.5, None, 1.0, 1.5], high=[1.5, 2.0, 2.0, 2.5])
    figure = plot("t", [series], "x", "y")
    band, line, *markers = figure.shapes
    assert band["d"].count("L") == 5  # three places that have both ends, there and back
    assert band["d"].endswith("Z")
    assert line["d"].count("L") == 1
    assert len(markers) == 2
    assert "nan" not in str(figure.shapes)


def test_lines_of_one_plot_differ_in_colour_dashes_and_marker() -> None:
    lines = [Series(str(style), [0, 1], [style, style + 1], style=style) for style in range(4)]
    looks = [(each.colour, each.stroke("")["stroke-dasharray"], each.markers([(0, 0)])[0]["d"]) for each in lines]
    for part in zip(*looks, strict=True):
        assert len(set(part)) == 4


def test_bars_stack_and_only_hatching_tells_the_second_from_the_first_without_colour() -> None:
    low, high = bars([0, 1, 2], {"a": [1, 2], "none": [0, 0], "b": [3, 0]})
    assert (list(low.high), list(high.low), list(high.high)) == ([1, 1, 2, 2], [1, 1, 2, 2], [4, 4, 2, 2])
    assert (low.fill, high.fill) == ("fill0", "fill2")
    assert [shape.get("fill") for shape in high.area("M0 0")] == [None, "url(#fill2)"]
    figure = plot("t", [low, high], "x", "y")
    assert figure.up(0) == FLOOR
    assert (figure.across(0), figure.across(2)) == (LEFT, WIDTH - RIGHT)


def test_rows_of_dots_leave_out_undefined_ends_and_draw_single_values() -> None:
    figure = dots(
        "t", {"a": [0.5, 0.25, 0.75, 0.4, 0.6], "b": [0.125, None, None], "c": [None, None, None]}, "x", 100.0
    )
    assert list(figure.up.ticks.values()) == ["a", "b", "c"]
    assert [shape["class"].split()[0] for shape in figure.shapes] == ["line", "ring", "ring", "dot", "dot"]
    assert next(iter(figure.across.ticks.values())) == "0"
    assert figure.legend == ()


def test_long_curves_are_means_of_neighbours() -> None:
    assert thinned([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    found = thinned(range(MOST_POINTS * 3 - 1))
    assert len(found) == MOST_POINTS
    assert found[0] == 1
    assert found[-1] == pytest.approx(MOST_POINTS * 3 - 2.5)


@pytest.mark.parametrize(
    "values", [[0.1, 0.09999999999999999], [0.0, 1e-14], [-1e-14, 1e-14], [1e9, 1e9 + 1e-6], [1e-13, 1e-13], [0, 2e-12]]
)
def test_values_that_differ_by_rounding_only_are_drawn_as_equal_ones(values: list[float]) -> None:
    figure = plot("t", [Series("s", [0, 1], values)], "x", "y")
    assert len(figure.up.ticks) > 2
    assert all(TOP <= figure.up(value) <= FLOOR for value in values)


@pytest.mark.parametrize(
    ("places", "ticks"),
    [
        ([100.0, 1600.0], ["100", "200", "500", "1000"]),
        ([40.0, 5_000.0], ["50", "100", "200", "500", "1000", "2000", "5000"]),
        ([90.0, 110.0], ["90", "95", "100", "105", "110"]),
    ],
)
def test_points_stand_on_a_logarithmic_axis_with_round_ticks(places: list[float], ticks: list[str]) -> None:
    across = scatter("t", {}, [Series("s", places, [0.0, 1.0])], "x", "y").across
    assert [across(math.log10(at)) for at in places] == pytest.approx([across.start, across.end])
    assert list(across.ticks.values()) == ticks
    assert all(across.start <= across(at) <= across.end for at in across.ticks)


def test_points_have_intervals_numbers_beside_them_and_a_legend_that_names_them() -> None:
    points: dict[str, list[float | None]] = {
        "greedy": [50.0, 0.5, 0.25, 0.75],
        "beam": [400.0, 0.75, None, None],
        "nowhere": [None, 0.5, 0.25, 0.75],
        "nothing": [400.0, None, None, None],
    }
    figure = scatter("t", points, [Series("majority", [50.0, 400.0], [0.5, 0.7], style=-1)], "tokens", "correct")
    assert [part.name for part in figure.legend] == ["1 greedy", "2 beam", "majority"]
    assert [len(part.swatch) for part in figure.legend] == [1, 1, 1]  # a marker, a marker, a line
    assert [text for *_, text in figure.texts] == ["2", "1"]
    interval = f"M{figure.across(math.log10(50)):.1f} {figure.up(0.25):.1f}V{figure.up(0.75):.1f}"
    assert [shape["class"] for shape in figure.shapes if shape["d"] == interval] == ["line c0"]
    middle = f"translate({figure.across(math.log10(400)):.1f} {figure.up(0.75):.1f})"
    assert [shape["class"] for shape in figure.shapes if shape.get("transform") == middle] == ["dot c1"]


def test_points_of_one_place_stand_side_by_side_in_order_and_inside() -> None:
    points: dict[str, list[float | None]] = {str(i): [1000.0 + i % 3, 0.5, 0.0, 1.0 - i / 20] for i in range(12)}
    figure = scatter("t", {"greedy": [100.0, 0.5, 0.4, 0.6], **points}, [], "tokens", "correct")
    places = sorted(x for x, _, text in figure.texts if text != "1")
    assert [b - a for a, b in pairwise(places)] == pytest.approx([APART] * 11)
    assert places[-1] <= WIDTH - RIGHT
    assert "side by side" in figure.note
    assert [text for *_, text in figure.texts][-5:] == ["11", "8", "5", "2", "1"]  # those of 1,000 on the left
    assert all(TOP <= y < TALL for _, y, _ in figure.texts)
