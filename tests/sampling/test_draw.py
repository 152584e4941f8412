"""Drawing a token: filters against a brute force, inverse-CDF edges, frequencies."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.errors import ConfigError
from stepkd.sampling.draw import draw, sampling_logprobs
from stepkd.sampling.engine import SamplingConfig


def logits_of(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def brute_force(logits: list[float], spec: SamplingConfig) -> list[float]:
    """Probabilities by the book, one token at a time."""
    weights = [math.exp(x / spec.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    if 0 < spec.top_k < len(logits):
        weights = [w if w >= weights[order[spec.top_k - 1]] else 0.0 for w in weights]  # ties with the k-th stay
    total = sum(weights)
    kept, mass = set(), 0.0
    for i in order:
        if mass < spec.top_p * total and weights[i] > 0:
            kept.add(i)
        mass += weights[i]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@settings(max_examples=150, deadline=None)
@given(
    # Hundredths: logits that differ only in the last bit may tie after the division by the temperature.
    st.lists(st.integers(-600, 600).map(lambda n: n / 100), min_size=2, max_size=9, unique=True),
    st.floats(0.2, 3),
    st.integers(0, 10),
    st.sampled_from([0.05, 0.31, 0.62, 0.93, 1.0]),
)
def test_filters_equal_brute_force(logits: list[float], temperature: float, top_k: int, top_p: float) -> None:
    spec = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    actual = sampling_logprobs(torch.tensor([logits], dtype=torch.float64), spec).exp()[0]
    assert actual.tolist() == pytest.approx(brute_force(logits, spec), abs=1e-12)
    assert actual.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        ({}, [0.5, 0.25, 0.125, 0.125]),
        ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 3}, [0.5, 0.25, 0.125, 0.125]),  # a tie with the third most likely stays
        ({"top_k": 99}, [0.5, 0.25, 0.125, 0.125]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.500001}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.8}, [4 / 7, 2 / 7, 1 / 7, 0]),  # of two equal tokens the first
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),  # top-p sees the renormalised 2/3 and 1/3
    ],
)
def test_filters_closed_form(settings_: dict[str, Any], expected: list[float]) -> None:
    probabilities = sampling_logprobs(logits_of([0.5, 0.25, 0.125, 0.125]), SamplingConfig(**settings_)).exp()[0]
    assert probabilities.tolist() == pytest.approx(expected, abs=1e-12)


def test_rows_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 30, dtype=torch.float64) * 3
    spec = SamplingConfig(temperature=0.7, top_k=11, top_p=0.8)
    uniforms = torch.rand(9, dtype=torch.float64)
    together = draw(logits, uniforms, spec)
    for i in range(9):
        alone = draw(logits[i : i + 1], uniforms[i : i + 1], spec)
        assert [part[0].item() for part in alone] == [part[i].item() for part in together]


ALMOST_ONE = np.nextafter(1.0, 0.0)


@pytest.mark.parametrize(
    ("probabilities", "uniform", "token"),
    [
        ([0.25, 0.5, 0.25], 0.0, 0),
        ([0.25, 0.5, 0.25], 0.2499999, 0),
        ([0.25, 0.5, 0.25], 0.2500001, 1),
        ([0.25, 0.5, 0.25], ALMOST_ONE, 2),
        ([0.0, 0.0, 1.0], 0.0, 2),  # u = 0 skips tokens of probability zero
        ([0.0, 1.0, 0.0], 0.0, 1),
        ([0.0, 1.0, 0.0], ALMOST_ONE, 1),  # and the end never falls off the last possible token
        ([1.0, 0.0, 0.0], ALMOST_ONE, 0),
        ([0.5, 0.0, 0.5], 0.5000001, 2),
        ([0.1] * 10, ALMOST_ONE, 9),
    ],
)
def test_inverse_cdf_edges(probabilities: list[float], uniform: float, token: int) -> None:
    drawn = draw(logits_of(probabilities), torch.tensor([uniform], dtype=torch.float64), SamplingConfig())
    assert drawn.tokens_B.tolist() == [token]
    assert drawn.logprobs_B.item() == pytest.approx(math.log(probabilities[token]), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_uniforms_never_draw_an_impossible_token(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits = torch.randn(200, 50, dtype=dtype) * 8
    logits[torch.rand(200, 50) < 0.5] = -math.inf
    logits[:, 25] = 0
    spec = SamplingConfig(top_p=0.9, top_k=7)
    for uniform in (0.0, 1e-300, ALMOST_ONE):
        drawn = draw(logits, torch.full((200,), uniform, dtype=torch.float64), spec)
        assert torch.isfinite(drawn.logprobs_B).all()
        assert torch.isfinite(drawn.raw_logprobs_B).all()


@pytest.mark.parametrize("size", [1, 7, 255, 256, 257, 1024, 3000])
@pytest.mark.parametrize("kind", ["random", "peaked", "ties", "impossible", "one possible"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_token_is_that_of_the_running_sum_over_the_whole_vocabulary(
    size: int, kind: str, dtype: torch.dtype
) -> None:
    """Block by block, against the inverse of the cumulative distribution by the book."""
    rows = 200
    noise = torch.Generator().manual_seed(size)
    logits = torch.randn(rows, size, dtype=torch.float64, generator=noise) * (12 if kind == "peaked" else 2)
    if kind == "ties":
        logits = logits.round()
    if kind in ("impossible", "one possible"):
        possible = torch.rand(rows, size, generator=noise) < (0.02 if kind == "impossible" else 0)
        possible[:, -1] |= ~possible.any(-1)
        logits[~possible] = -math.inf
    logits = logits.to(dtype)
    uniforms = torch.rand(rows, dtype=torch.float64, generator=noise)
    uniforms[:6] = torch.tensor([0.0, 1e-300, 1e-17, ALMOST_ONE, 1 - 1e-15, 0.5], dtype=torch.float64)
    cdf = logits.double().softmax(-1).cumsum(-1)
    wanted = torch.minimum(uniforms[:, None] * cdf[:, -1:], cdf[:, -1:].nextafter(torch.tensor(0.0).double()))
    expected = torch.searchsorted(cdf, wanted, right=True)
    drawn = draw(logits, uniforms, SamplingConfig())
    # A uniform this close to the edge of a token may fall on either side of it.
    near = ((cdf - wanted).abs() < (1e-6 if dtype == torch.float32 else 1e-14)).any(-1)
    assert not near[6:].all()
    assert torch.equal(drawn.tokens_B[~near], expected[~near, 0])
    exact = torch.log_softmax(logits.double(), -1).gather(1, drawn.tokens_B[:, None])[:, 0]
    assert torch.isfinite(exact).all()  # edges too: what is drawn is possible
    assert drawn.logprobs_B.tolist() == pytest.approx(exact.tolist(), rel=2e-6, abs=2e-6)


def test_logits_that_are_not_numbers_give_log_probabilities_that_are_none() -> None:
    logits = torch.zeros(2, 700)
    logits[0, 500] = math.nan
    for spec in (SamplingConfig(), SamplingConfig(temperature=0.5), SamplingConfig(temperature=0)):
        drawn = draw(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), spec)
        assert drawn.raw_logprobs_B.isnan().tolist() == [True, False]
        assert drawn.tokens_B.max() < 700


@pytest.mark.parametrize("settings_", [{}, {"temperature": 0.6}, {"temperature": 1.7, "top_k": 9, "top_p": 0.85}])
def test_frequencies_follow_the_probabilities(settings_: dict[str, Any]) -> None:
    """Pearson's statistic of 20,000 draws stays below its mean plus five standard deviations."""
    torch.manual_seed(2)
    spec, draws = SamplingConfig(**settings_), 20_000
    logits = torch.randn(1, 15, dtype=torch.float64) * 1.5
    expected = sampling_logprobs(logits, spec).exp()[0] * draws
    uniforms = torch.from_numpy(np.random.Generator(np.random.Philox(7)).random(draws))
    counts = draw(logits.expand(draws, -1), uniforms, spec).tokens_B.bincount(minlength=15)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    freedom = int(possible.sum()) - 1
    statistic = float(((counts - expected) ** 2 / expected)[possible].sum())
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_greedy() -> None:
    logits = logits_of([0.2, 0.5, 0.3])
    drawn = draw(logits, torch.tensor([0.99], dtype=torch.float64), SamplingConfig(temperature=0))
    assert drawn.tokens_B.tolist() == [1]
    assert drawn.logprobs_B.tolist() == [0.0]
    assert drawn.raw_logprobs_B.item() == pytest.approx(math.log(0.5))


def test_lowest_temperature_is_finite() -> None:
    logits = torch.tensor([[900.0, 899.0, -900.0]])
    drawn = draw(logits, torch.tensor([0.5], dtype=torch.float64), SamplingConfig(temperature=1e-4))
    assert drawn.tokens_B.tolist() == [0]
    assert drawn.logprobs_B.tolist() == [0.0]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"n": 0}, "n=0: must be at least 1"),
        ({"temperature": -1}, "temperature=-1: must be 0 (greedy), or finite and at least 1e-4"),
        ({"temperature": 1e-9}, "temperature=1e-09: must be 0 (greedy), or finite and at least 1e-4"),
        ({"temperature": float("inf")}, "temperature=inf: must be 0"),
        ({"temperature": float("nan")}, "temperature=nan: must be 0"),
        ({"top_p": 0}, "top_p=0: must lie in (0, 1]"),
        ({"top_p": 1.5}, "top_p=1.5: must lie in (0, 1]"),
        ({"top_p": float("nan")}, "top_p=nan: must lie in (0, 1]"),
        ({"top_k": -1}, "top_k=-1: must be 0 or positive"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"stop": ("a", "")}, "an empty stop string would end every completion at once"),
    ],
)
def test_bad_settings(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        SamplingConfig(**settings_)


def test_a_single_stop_string_may_come_without_a_tuple() -> None:
    assert SamplingConfig(stop="Q:").stop == ("Q:",)  # type: ignore[arg-type]
    assert SamplingConfig(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
