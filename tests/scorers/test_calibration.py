"""Temperature scaling against closed forms and a grid."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stepkd.errors import DataError
from stepkd.scorers.calibration import CLIP, fit_temperature, scaled


def data(temperature: float, n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Scores whose logits are `temperature` times the true ones."""
    rng = np.random.default_rng(0)
    true = rng.normal(0, 1.5, n)
    labels = rng.random(n) < 1 / (1 + np.exp(-true))
    return np.clip(1 / (1 + np.exp(-temperature * true)), CLIP, 1 - CLIP), labels


def test_closed_form_of_one_score_value() -> None:
    # Scores 0.9 and 0.1, correct in 3 of 4 cases: the best temperature turns 0.9 into 0.75.
    fit = fit_temperature([0.9] * 4 + [0.1] * 4, [1, 1, 1, 0, 0, 0, 0, 1])
    assert fit["temperature"] == pytest.approx(math.log(9) / math.log(3), rel=1e-12)
    assert scaled([0.9, 0.1], fit["temperature"]) == pytest.approx([0.75, 0.25])
    assert fit["nll_after"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert fit["nll_before"] == pytest.approx(-0.75 * math.log(0.9) - 0.25 * math.log(0.1))
    assert fit["n"] == 8


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_recovers_the_temperature_and_beats_a_grid(temperature: float) -> None:
    scores, labels = data(temperature)
    fit = fit_temperature(scores, labels)
    assert fit["temperature"] == pytest.approx(temperature, rel=0.1)
    logits = np.log(scores / (1 - scores))
    grid = [np.mean(np.logaddexp(0, logits / t) - labels * logits / t) for t in np.geomspace(0.01, 100, 2001)]
    assert fit["nll_after"] <= min(grid) + 1e-12
    assert fit["nll_after"] <= fit["nll_before"]


def test_order_and_side_of_one_half_are_kept() -> None:
    scores, labels = data(3.0, 300)
    found = scaled(scores, fit_temperature(scores, labels)["temperature"])
    assert (np.argsort(found) == np.argsort(scores)).all()
    assert ((found > 0.5) == (scores > 0.5)).all()


def test_scaling_keeps_shape_and_missing_scores_and_clips() -> None:
    found = scaled([[0.3, math.nan], [0.0, 1.0]], 1.0)
    assert found.shape == (2, 2)
    assert found[0, 0] == pytest.approx(0.3)
    assert math.isnan(found[0, 1])
    assert found[1] == pytest.approx([CLIP, 1 - CLIP])


def test_bounds() -> None:
    perfect = fit_temperature([0.9, 0.1], [1, 0])
    assert perfect["temperature"] == 0.01
    contrary = fit_temperature([0.9, 0.1], [0, 1])
    assert contrary["temperature"] == 100
    extreme = fit_temperature([1.0, 1.0, 0.0, 0.0], [1, 0, 0, 0])
    assert math.isfinite(extreme["nll_after"])


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.5, 0.6], [1], "one label per score"),
        ([], [], "at least one"),
        ([0.5, math.nan], [1, 0], r"score 1 is missing \(NaN\)"),
        ([0.5, 1.2], [1, 0], r"score 1 is 1\.2"),
        ([0.5, 0.6], [1, 0.5], r"label 1 is 0\.5"),
        ([0.4, 0.6], [1, 1], "all 2 labels are 1"),
        ([0.5, 0.5], [1, 0], r"all scores are 0\.5"),
    ],
)
def test_bad_data(scores: list[float], labels: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_temperature(scores, labels)
