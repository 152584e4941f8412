"""Best-of-k with a judge that is off, in a model that can be solved: arXiv 2512.19905.

Bayesian linear regression on a teacher's data gives a normal predictive distribution at every point. Of k draws from it
one is chosen by softmax(reward / T), the reward being minus the square of the distance to what a linear judge says.

For T -> 0 the draw nearest to the judge is chosen: its density is k p(y) (1 - G(|y - r|))^(k - 1), where G is the
chance that a draw is nearer to r. With the teacher as judge the expected square error falls as 1 / (2 k^2 p(t)^2), as a
distance below a has the chance 2 a p(t); this constant is derived here, the paper's abstract has the power alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
from scipy.special import ndtr

from stepkd.randomness import generator
from stepkd.search.best_of_n import soft_choice

DRAWS = 1000
OFF = -2.0
"""How far the judge is off, where it is."""


class Point(NamedTuple):
    """What the learner believes at one point, and what teacher and judge say there."""

    mean: float
    std: float
    teacher: float
    judge: float


def points(offset: float, *, d: int = 6, n: int = 24, noise: float = 0.5, prior: float = 1.0) -> list[Point]:
    """Posterior predictive of three points; the judge's weights are the teacher's plus ``offset`` times others."""
    rng = generator(0, "judge-theory", d, n)
    teacher, other = rng.standard_normal((2, d))
    x_ND, new_MD = rng.standard_normal((n, d)), rng.standard_normal((3, d))
    y_N = x_ND @ teacher / math.sqrt(d) + noise * rng.standard_normal(n)
    covariance_DD = np.linalg.inv(x_ND.T @ x_ND / (d * noise**2) + np.eye(d) / prior**2)
    mean_D = covariance_DD @ x_ND.T @ y_N / (math.sqrt(d) * noise**2)
    found = []
    for x_D in new_MD / math.sqrt(d):
        std = math.sqrt(x_D @ covariance_DD @ x_D + noise**2)
        found.append(Point(x_D @ mean_D, std, x_D @ teacher, x_D @ (teacher + offset * other)))
    return found


def nearest_error(p: Point, k: int) -> float:
    """Expected square error for T -> 0."""

    z, w = np.polynomial.legendre.leggauss(24)
    edges = p.std * np.concatenate([[0.0], np.geomspace(0.1 / k, 16.0, 24)])  # the mass is within some 1 / k
    half_E = np.diff(edges) / 2
    a, weights = (edges[:-1, None] + half_E[:, None] * (1 + z)).ravel(), (half_E[:, None] * w).ravel()
    low, high = ((p.judge + sign * a - p.mean) / p.std for sign in (-1, 1))
    farther = ndtr(low) + ndtr(-high)
    return sum(
        float(weights @ ((p.judge + sign * a - p.teacher) ** 2 * k * density(z) / p.std * farther ** (k - 1)))
        for sign, z in ((-1, low), (1, high))
    )


def density(z: np.ndarray | float) -> np.ndarray | float:
    """Of the standard normal distribution."""
    return np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def soft_error(p: Point, k: int, temperature: float, nodes: int = 40) -> float:
    """Expected square error at a temperature by Gauss-Hermite quadrature over all k draws; k of 1 or 2."""
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    y, w = p.mean + p.std * z, w / w.sum()
    y_K = np.stack(np.meshgrid(*[y] * k, indexing="ij"))
    reward = -((y_K - p.judge) ** 2) / temperature
    chance = np.exp(reward - reward.max(0))
    error = ((y_K - p.teacher) ** 2 * chance).sum(0) / chance.sum(0)
    for _ in range(k):
        error = error @ w
    return float(error)


def drawn_errors(p: Point, k: int, temperature: float) -> np.ndarray:
    """The square errors of what the project chooses among k draws, many times."""
    y = p.mean + p.std * generator(1, "judge-theory", k).standard_normal((DRAWS, k))
    kept = [soft_choice((-((row - p.judge) ** 2)).tolist(), temperature, 0, i) for i, row in enumerate(y)]
    return (y[np.arange(DRAWS), kept] - p.teacher) ** 2


@pytest.mark.parametrize("k", [64, 512, 4096])
def test_with_the_teacher_as_judge_the_error_falls_as_one_over_k_squared(k: int) -> None:
    for p in points(0.0):
        error = nearest_error(p, k)
        assert math.log(nearest_error(p, 2 * k) / error) / math.log(2) == pytest.approx(-2, abs=3 / k)
        at_teacher = density((p.teacher - p.mean) / p.std) / p.std
        assert error == pytest.approx(1 / (2 * k**2 * at_teacher**2), rel=4 / k)
        # That of the least of k distances that are evenly spread, as they are near the teacher.
        assert error == pytest.approx(1 / (2 * (k + 1) * (k + 2) * at_teacher**2), rel=max(16 / k**2, 1e-6))


def test_a_judge_that_is_off_has_a_finite_best_k() -> None:
    """The error falls, has its least at some k, and rises to the square of the judge's distance from the teacher."""
    ks = [1, 2, 3, 4, 6, 8, 16, 64, 1024]
    errors_K = np.mean([[nearest_error(p, k) for k in ks] for p in points(OFF)], axis=0)
    best = int(errors_K.argmin())
    assert ks[best] == 4
    assert (np.diff(errors_K[: best + 1]) < 0).all()
    assert (np.diff(errors_K[best:]) > 0).all()
    limit = np.mean([(p.judge - p.teacher) ** 2 for p in points(OFF)])
    assert errors_K[-1] == pytest.approx(limit, rel=1e-2)
    assert errors_K[-1] > 2 * errors_K[best]
    perfect_K = [np.mean([nearest_error(p, k) for p in points(0.0)]) for k in ks]
    assert (np.diff(perfect_K) < 0).all()


def test_a_temperature_between_best_and_any_is_best_for_that_judge() -> None:
    """Of very many draws the chosen one is normal: predictive times exp(reward / T)."""
    p = points(OFF)[1]
    temperatures = [1e-9, 1.0, 1e6]
    few, many = ([drawn_errors(p, k, t) for t in temperatures] for k in (16, 256))
    for errors, t in zip(many, temperatures, strict=True):
        precision = 1 / p.std**2 + 2 / t
        mean = (p.mean / p.std**2 + 2 * p.judge / t) / precision
        expected = 1 / precision + (mean - p.teacher) ** 2
        assert abs(errors.mean() - expected) < 4 * errors.std() / math.sqrt(DRAWS) + 0.05 * expected
    for errors in (few, many):
        for other in (errors[0], errors[2]):
            gain = other - errors[1]
            assert gain.mean() > 4 * gain.std() / math.sqrt(DRAWS)


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (2, 0.5), (2, 4.0), (16, 1e-9)])
def test_soft_choice_has_the_error_of_the_theory(k: int, temperature: float) -> None:
    best = temperature < 1e-6
    p = points(0.0)[0] if best else points(OFF)[1]
    expected = nearest_error(p, k) if best else soft_error(p, k, temperature)
    errors = drawn_errors(p, k, temperature)
    assert abs(errors.mean() - expected) < 4 * errors.std() / math.sqrt(DRAWS) < 0.5 * expected


def test_quadratures_agree() -> None:
    """Two draws: towards temperature 0 the nearest one, high up any one; one draw has no choice."""
    for p in points(OFF):
        assert soft_error(p, 2, 1e-3, 200) == pytest.approx(nearest_error(p, 2), rel=1e-2)
        anyone = p.std**2 + (p.mean - p.teacher) ** 2
        assert soft_error(p, 2, 1e7) == pytest.approx(anyone, rel=1e-6)
        assert soft_error(p, 1, 0.1) == pytest.approx(anyone) == nearest_error(p, 1)
