"""Figures of the metrics, as SVG or PNG: the same result gives the same file, byte for byte.

Every function takes the plain dict of a result (``to_dict()``, also after a round trip through JSON). Matplotlib is
imported only when a figure is drawn. Colours are those of Okabe & Ito, told apart by colour-blind readers; line styles
and markers repeat the difference.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepkd.errors import ConfigError
from stepkd.evaluation.best_of_n import outvoted
from stepkd.runs.files import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
GREY = "#666666"
_STYLE = {
    **{"svg.hashsalt": "stepkd", "svg.fonttype": "none", "font.size": 10.0},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3},
}


def reliability_diagram(result: Mapping[str, Any], path: str | Path) -> Path:
    """Accuracy against confidence per bin, with the counts below.

    Args:
        result: ``CalibrationReport.to_dict()``.
        path: where to write, ``.svg`` or ``.png``.

    Returns:
        The path.

    Raises:
        ConfigError: another suffix.
        StepkdError: the file cannot be written.
    """
    bins = result["bins"]

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfect calibration")
        points = [(each["confidence"], each["accuracy"]) for each in bins if each["count"]]
        upper.plot(*zip(*points, strict=True), color=COLOURS[0], marker=MARKERS[0], label="scores")
        upper.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="share of correct labels")
        upper.set_title(f"Reliability (n = {result['n']}, ECE {_number(result, 'ece')})")
        figure.legend(loc="outside lower center", ncols=2)
        edges = [*(each["low"] for each in bins), bins[-1]["high"]]
        lower.stairs([each["count"] for each in bins], edges, fill=True, color=COLOURS[0])
        lower.set(xlabel="score", ylabel="count")

    return _write(draw, path, size=(5.0, 5.5))


def argmin_histogram(result: Mapping[str, Any], path: str | Path) -> Path:
    """Where the lowest step score falls, against what a random place would give.

    Args:
        result: what :func:`~stepkd.evaluation.diagnostics.argmin_positions` returns.
        path, returns and errors: as in `reliability_diagram`.
    """
    edges, observed, expected = result["edges"], result["observed"], result["expected"]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.stairs(observed, edges, fill=True, color=COLOURS[0], label="observed")
        axes.stairs(expected, edges, color=COLOURS[1], linestyle="--", linewidth=2, label="random place")
        share, chance = _number(result, "share_last"), result["expected_last"]
        axes.set_title(f"Lowest score at the last step: {share} (random {chance:.3f})")
        axes.set(xlim=(0, 1), xlabel="relative position of the lowest step score", ylabel="solutions")
        figure.legend(loc="outside lower center", ncols=2)

    return _write(draw, path, size=(6.0, 4.0))


def best_of_n_figure(result: Mapping[str, Any], path: str | Path) -> Path:
    """Accuracy against the number of samples, one line and interval band per method; the title says at which numbers a
    score alone chooses worse than the majority vote.

    Args:
        result: ``CurveResult.to_dict()``.
        path, returns and errors: as in `reliability_diagram`.
    """
    ks, curves = result["ks"], result["curves"]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (name, curve) in enumerate(curves.items()):
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(
                ks,
                [point["value"] for point in curve],
                color=colour,
                marker=MARKERS[i % len(MARKERS)],
                linestyle=LINES[i % len(LINES)],
                label=f"{name}@N (ceiling)" if name == "pass" else name,
            )
            band = [(k, at["low"], at["high"]) for k, at in zip(ks, curve, strict=True) if at["low"] is not None]
            if band:
                at, low, high = zip(*band, strict=True)
                axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        axes.set(xlabel="samples N", ylabel="accuracy")
        axes.set_title("\n".join([f"Best of N over {result['problems']} problems", *outvoted(result)]))
        figure.legend(loc="outside right center")

    return _write(draw, path, size=(7.5, 4.5))


def _number(result: Mapping[str, Any], name: str) -> str:
    value = result[name]["value"]
    return "undefined" if value is None else f"{value:.3f}"


def _write(draw: Any, path: str | Path, *, size: tuple[float, float]) -> Path:
    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("svg", "png"):
        raise ConfigError(f"cannot write a figure to {path}: its name must end in .svg or .png")
    from matplotlib import style
    from matplotlib.figure import Figure

    content = io.BytesIO()
    # A bare Figure draws with Agg or the SVG writer, whatever backend is set: no display, no global state.
    with style.context(["default", _STYLE]):  # not the user's own style
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(content, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    write_file(path, content.getvalue())
    return path
