"""Keyed streams: same key, same numbers; any other key, other numbers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from stepkd.randomness import generator, stream_key


def test_keys_are_stable() -> None:
    """The value is written down: a change would silently change every experiment's draws."""
    assert stream_key(0, "rollout", 3, 7) == 159523706901469338697213249561178690367
    assert generator(0, "rollout", 3, 7).random(2).tolist() == [0.10207111065874352, 0.6357513285872118]


def test_same_key_in_another_process() -> None:
    code = "from stepkd.randomness import generator; print(generator(5, 'shuffle', 2).random(3).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str(generator(5, "shuffle", 2).random(3).tolist())


def test_different_keys_differ() -> None:
    keys = {
        stream_key(seed, purpose, *parts)
        for seed in (0, 1, 10)
        for purpose in ("rollout", "shuffle")
        for parts in [(), (0,), (1,), (0, 1), (1, 0), (0, 0), (10,), ("0",), ("0, 1",), ("a",)]
    }
    assert len(keys) == 3 * 2 * 10


def test_integer_types_do_not_matter() -> None:
    assert stream_key(np.int64(3), "p", np.int64(5), np.int32(6)) == stream_key(3, "p", 5, 6)  # type: ignore[arg-type]


def test_a_stream_is_a_prefix_of_a_longer_one() -> None:
    assert generator(0, "p", 1).random(4).tolist() == generator(0, "p", 1).random(9)[:4].tolist()


def test_streams_are_independent_and_uniform() -> None:
    draws = np.stack([generator(0, "p", i).random(64) for i in range(400)])
    assert abs(draws.mean() - 0.5) < 4 / np.sqrt(12 * draws.size)
    neighbours = np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(draws.size)


def test_parts_must_be_integers_or_strings() -> None:
    with pytest.raises(TypeError, match=r"stream part 1.5 is a float: must be an integer or a string"):
        stream_key(0, "p", 1.5)  # type: ignore[arg-type]
