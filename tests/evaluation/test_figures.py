"""Figures are written, say what they show, and are the same every time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepkd.errors import ConfigError
from stepkd.evaluation.best_of_n import ProblemSamples, bon_curve, outvoted
from stepkd.evaluation.diagnostics import argmin_positions
from stepkd.evaluation.figures import argmin_histogram, best_of_n_figure, reliability_diagram
from stepkd.evaluation.step_metrics import calibration_report

matplotlib = pytest.importorskip("matplotlib")


def through_json(result: Any) -> dict[str, Any]:
    return json.loads(json.dumps(result.to_dict(), allow_nan=False))


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(0)
    p = rng.random(200)
    problems = [ProblemSamples(str(i), (rng.random(8) < 0.5).tolist(), ["1"] * 8) for i in range(5)]
    scores = {"prm": [rng.random(8).tolist() for _ in problems]}
    return {
        "reliability": through_json(calibration_report(p, rng.random(200) < p, n_resamples=50)),
        "argmin": argmin_positions([rng.random(5).tolist() for _ in range(30)], n_resamples=50),
        "curve": through_json(bon_curve(problems, [1, 2, 8], scores, n_resamples=50)),
    }


WRITERS = {"reliability": reliability_diagram, "argmin": argmin_histogram, "curve": best_of_n_figure}
TEXTS = {
    "reliability": ["score", "count", "share of correct labels", "perfect calibration", "Reliability (n = 200, ECE 0."],
    "argmin": ["relative position of the lowest step score", "solutions", "random place", "(random 0.200)"],
    "curve": ["samples N", "accuracy", "pass@N (ceiling)", "majority", "prm_vote", "Best of N over 5 problems"],
}


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_svg_is_labelled_and_repeatable(kind: str, results: dict[str, Any], tmp_path: Path) -> None:
    path = WRITERS[kind](results[kind], tmp_path / "a" / "figure.svg")
    text = path.read_text(encoding="utf-8")
    for expected in TEXTS[kind]:
        assert expected in text
    assert not re.search(r"<dc:date>|20\d\d-\d\d-\d\d", text)
    assert WRITERS[kind](results[kind], tmp_path / "b.svg").read_bytes() == path.read_bytes()


def test_the_curve_says_where_a_score_alone_chooses_worse_than_the_vote(tmp_path: Path) -> None:
    """Three of four samples are correct, and the highest score is that of the incorrect one: in 11 of 12 problems, or
    in 2, which may be chance."""
    problems = [ProblemSamples(str(i), [True, True, True, False], ["1", "1", "1", "2"]) for i in range(12)]
    for fooled in (11, 2):
        scores = [[0.5, 0.5, 0.5, 0.9 if i < fooled else 0.1] for i in range(12)]
        curve = through_json(bon_curve(problems, [1, 2, 4], {"prm": scores}, n_resamples=100))
        assert curve["curves"]["prm"][-1]["value"] < curve["curves"]["majority"][-1]["value"] == 1.0
        text = best_of_n_figure(curve, tmp_path / f"{fooled}.svg").read_text(encoding="utf-8")
        assert ("At N=2, 4 the solution that prm scores highest" in text) == (fooled == 11) == bool(outvoted(curve))
    assert outvoted({name: curve[name] for name in ("ks", "curves")}) == []


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_png_is_repeatable_and_the_users_style_is_left_alone(
    kind: str, results: dict[str, Any], tmp_path: Path
) -> None:
    first = WRITERS[kind](results[kind], tmp_path / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        assert WRITERS[kind](results[kind], tmp_path / "b.png").read_bytes() == first
        assert matplotlib.rcParams["font.size"] == 30


def test_curve_without_intervals_is_drawn(tmp_path: Path) -> None:
    curve = bon_curve([ProblemSamples("a", [True, False], ["1", "2"])], [1, 2], {}, n_resamples=50)
    assert best_of_n_figure(through_json(curve), tmp_path / "c.svg").exists()


def test_other_kinds_of_files_are_refused(results: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.svg or \.png"):
        reliability_diagram(results["reliability"], tmp_path / "a.pdf")
    assert not list(tmp_path.iterdir())


def test_metrics_do_not_import_matplotlib() -> None:
    code = "import sys, stepkd.evaluation.figures, stepkd.evaluation.best_of_n; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
