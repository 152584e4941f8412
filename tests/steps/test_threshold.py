"""Thresholds: the quantile against brute force, ties, the file, segmenters by name, bad input."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.errors import ConfigError, DataError
from stepkd.runs.files import write_json
from stepkd.steps.confidence import (
    AdaptiveStepSegmenter,
    EntropySegmenter,
    RejectSegmenter,
    SegmentThreshold,
    fit_threshold,
)
from stepkd.steps.segment import get_segmenter, segment
from stepkd.steps.text import TokenizedText


def pool_of(n: int, responses: int = 7) -> list[list[float]]:
    """n different log-probabilities, shuffled, over several responses."""
    values = np.log(np.random.default_rng(0).permutation(np.arange(1, n + 1)) / (n + 1))
    return [part.tolist() for part in np.array_split(values, responses)]


def completion_of(logprobs: list[float]) -> TokenizedText:
    n = len(logprobs)
    return TokenizedText(tuple(range(n)), "x" * n, tuple(range(1, n + 1)), logprobs=tuple(logprobs))


def test_closed_form() -> None:
    fitted = fit_threshold(pool_of(1000))
    assert fitted.value == math.exp(math.log(21 / 1001))  # 20 of 1000 lie below
    assert (fitted.quantile, fitted.share, fitted.num_tokens, fitted.num_responses) == (0.02, 0.02, 1000, 7)
    assert fitted.signal == "confidence"
    # 0.29 * 100 is 28.999... in floating point; the quantile is that of the number as written
    assert fit_threshold(pool_of(100), 0.29).share == 0.29
    assert fit_threshold(pool_of(6), 1 / 3).share == 1 / 3
    assert fit_threshold(pool_of(50), 0.02).share == 0.02  # one token
    assert fit_threshold(pool_of(10), math.nextafter(1, 0)).share == 0.9  # the largest value there is


def test_entropy_takes_the_upper_end() -> None:
    entropies = [[float(i) for i in range(0, 50)], [], [float(i) for i in range(50, 100)]]
    fitted = fit_threshold(entropies, 0.05, signal="entropy")
    assert (fitted.value, fitted.share, fitted.num_responses) == (94.0, 0.05, 2)
    assert fitted.segmenter() == EntropySegmenter(94.0)


@settings(max_examples=200, deadline=None)
@given(
    pool=st.lists(
        st.lists(st.sampled_from([-3.0, -2.5, -1.0, -0.25, 0.0]) | st.floats(-20, -1e-9), max_size=40), max_size=8
    ),
    quantile=st.floats(0.01, 0.9),
    signal=st.sampled_from(["confidence", "entropy"]),
)
def test_brute_force(pool: list[list[float]], quantile: float, signal: Any) -> None:
    """The largest share of at most the quantile that a token's own value as the threshold gives."""
    pool = [[abs(x) for x in response] for response in pool] if signal == "entropy" else pool
    flat = [x if signal == "entropy" else math.exp(x) for response in pool for x in response]

    def divides(value: float) -> int:
        return sum(x > value if signal == "entropy" else x < value for x in flat)

    wanted = quantile * len(flat) * (1 + 1e-12)  # the product itself is rounded
    allowed = [v for v in flat if divides(v) <= wanted]
    best = max((divides(v) for v in allowed), default=0)
    if wanted < 1 or best == 0:
        with pytest.raises(DataError):
            fit_threshold(pool, quantile, signal=signal)
        return
    fitted = fit_threshold(pool, quantile, signal=signal)
    assert fitted.share == best / len(flat)
    assert divides(fitted.value) == best
    assert fitted.num_tokens == len(flat)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-15, -1e-3), min_size=60, max_size=200, unique=True), st.floats(0.02, 0.5))
def test_the_segmenter_divides_the_share_of_tokens(logprobs: list[float], quantile: float) -> None:
    """Fitted on one completion, the segmenter closes exactly the recorded share of its tokens."""
    fitted = fit_threshold([logprobs], quantile)
    ends = fitted.segmenter().ends(completion_of(logprobs))
    below = round(fitted.share * len(logprobs))
    assert below / len(logprobs) == fitted.share
    assert len(set(ends) - {len(logprobs)}) == below - (math.exp(logprobs[-1]) < fitted.value)


def test_ties_leave_the_share_below_the_quantile() -> None:
    pool = [[-5.0, *[-2.0] * 49, *[-0.1] * 50]]
    fitted = fit_threshold(pool, 0.1)
    assert (fitted.value, fitted.share) == (math.exp(-2.0), 0.01)


def test_confidence_of_one_nearly_everywhere() -> None:
    """Half precision gives exact zeros; a threshold of 1 would be no probability below which anything can be."""
    fitted = fit_threshold([[-1.0] * 3 + [0.0] * 97], 0.05)
    assert fitted.value < 1
    assert fitted.share == 0.03


@pytest.fixture
def fitted() -> SegmentThreshold:
    return fit_threshold(
        pool_of(300),
        0.05,
        model="tiny-0.1m",
        sampling={"n": 30, "temperature": 0.7, "stop": ["\n\n"]},
    )


def test_saved_and_loaded(fitted: SegmentThreshold, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "threshold.json"
    write_json(path, fitted.to_dict())
    assert SegmentThreshold.load(path) == fitted
    assert SegmentThreshold.load(path).value.hex() == fitted.value.hex()
    content = json.loads(path.read_text())
    assert (content["format"], content["version"], content["model"]) == ("stepkd segment threshold", 1, "tiny-0.1m")
    assert get_segmenter(f"adaptive_step:{path}") == AdaptiveStepSegmenter(fitted.value)
    other = fit_threshold(pool_of(300), 0.1)
    write_json(path, other.to_dict())
    assert SegmentThreshold.load(path) == other


def test_segmenters_by_name(fitted: SegmentThreshold, tmp_path: Path) -> None:
    entropy = tmp_path / "entropy.json"
    write_json(entropy, fit_threshold([[float(i) for i in range(100)]], 0.1, signal="entropy").to_dict())
    assert get_segmenter("adaptive_step:0.05") == AdaptiveStepSegmenter(0.05)
    assert get_segmenter("entropy:1.5") == EntropySegmenter(1.5)
    assert get_segmenter(f"entropy:{entropy}") == EntropySegmenter(89.0)
    assert get_segmenter("reject") == RejectSegmenter(0.3)
    assert get_segmenter("reject:0.7") == RejectSegmenter(0.7)
    completion = completion_of([-0.1, -5.0, -0.1])
    assert segment(get_segmenter("adaptive_step:0.05"), completion) == [(0, 2), (2, 3)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "adaptive_step",
            "segmenter 'adaptive_step:' needs a number as threshold, or a threshold.json",
        ),
        ("adaptive_step:", "segmenter 'adaptive_step:' needs a number"),
        ("entropy", "segmenter 'entropy:' needs a number as threshold"),
        ("adaptive_step:1", "confidence threshold 1.0: must lie between 0 and 1 (a probability, not percent)"),
        ("adaptive_step:55", "confidence threshold 55.0"),
        ("adaptive_step:nan", "confidence threshold nan"),
        ("entropy:-1", "entropy threshold -1.0"),
        ("reject:0", "reject threshold 0.0: must lie between 0 and 1"),
        ("reject:often", "segmenter 'reject:often' needs a number as threshold"),
        (
            "adaptive_step:no/such.json",
            "segmenter 'adaptive_step:no/such.json' needs a number as threshold",
        ),
        ("adaptive_stp:0.1", "unknown segmenter 'adaptive_stp:0.1'. Did you mean 'adaptive_step'? Known: newline,"),
        ("entropi", "Did you mean 'entropy'?"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        get_segmenter(name)


def test_file_of_another_signal(fitted: SegmentThreshold, tmp_path: Path) -> None:
    path = tmp_path / "threshold.json"
    write_json(path, fitted.to_dict())
    message = f"segmenter 'entropy:{path}': the file holds a threshold on confidence; write adaptive_step:{path}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        get_segmenter(f"entropy:{path}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "not a usable threshold file (Expecting value"),
        (lambda text: text[: len(text) // 2], "not a usable threshold file ("),
        (lambda text: "\x00\ud800", "not a usable threshold file ("),
        (
            lambda text: "[1, 2]",
            "(no stepkd segment threshold of version 1); fit it again (stepkd label --steps Fitted",
        ),
        (lambda text: text.replace('"stepkd segment threshold"', '"other"'), "no stepkd segment threshold"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "no stepkd segment threshold of version 1"),
        (lambda text: text.replace('"share"', '"shre"'), "(share: "),
        (lambda text: re.sub(r'"value": [^,]*', '"value": 7', text), "confidence threshold 7"),
        (lambda text: re.sub(r'"value": [^,]*', '"value": NaN', text), "confidence threshold nan"),
        (lambda text: re.sub(r'"value": [^,]*', '"value": "x"', text), "value: Input should be a valid number"),
        (lambda text: text.replace('"confidence"', '"surprise"'), "signal: Input should be 'confidence' or 'entropy'"),
        (lambda text: re.sub(r'"sampling": \{[^}]*\}', '"sampling": 1', text), "sampling: Input should be a valid"),
    ],
)
def test_bad_files(fitted: SegmentThreshold, tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    path = tmp_path / "threshold.json"
    write_json(path, fitted.to_dict())
    path.write_bytes(change(path.read_text()).encode(errors="surrogatepass"))
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        SegmentThreshold.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the threshold: No such file"):
        SegmentThreshold.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("pool", "settings_", "message"),
    [
        ([], {}, "the pool has no tokens: sample some responses first"),
        ([[], []], {}, "the pool has no tokens"),
        ([[-1.0] * 30], {}, "the pool has 30 tokens, too few for a quantile of 0.02: sample at least 50 tokens"),
        ([[0.0] * 200], {}, "at the 0.02 quantile of the confidence many of the 200 tokens tie at 1, and no token"),
        (
            [[-1.0, -2.0], [-1.0, math.nan]],
            {},
            "response 1 of the pool: the logprobs hold nan at token 1: must be a number of nats, at most 0",
        ),
        (
            [[0.7, 0.9]],
            {},
            "response 0 of the pool: the logprobs hold 0.7 at token 0: must be a number of nats, at most 0",
        ),
        (
            [[0.5, -0.5]],
            {"signal": "entropy"},
            "response 0 of the pool: the entropies hold -0.5 at token 1: must be a number of nats, at least 0",
        ),
    ],
)
def test_bad_pools(pool: Any, settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        fit_threshold(pool, **settings_)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"quantile": 2}, "quantile=2: must lie between 0 and 1 (0.02 for 2% of the tokens)"),
        ({"quantile": 0.0}, "quantile=0.0"),
        ({"signal": "entrpy"}, "unknown signal 'entrpy': did you mean 'entropy'?"),
    ],
)
def test_bad_settings(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        fit_threshold(pool_of(300), **settings_)
