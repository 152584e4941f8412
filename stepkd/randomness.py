"""Keyed randomness: what is drawn depends on what it is for, never on rank, batch position or batch size.

Every random stream has a key such as ``(seed, "rollout", step, global sample index)``. Streams of different keys are
independent (a 128-bit BLAKE2 digest keys a Philox counter generator), and the same key gives the same numbers on any
machine, in any batch and in any process.
"""

from __future__ import annotations

import hashlib
from numbers import Integral

import numpy as np


def stream_key(seed: int, purpose: str, *parts: int | str) -> int:
    """128-bit key of a stream; an integer keys the same stream whatever its type (int, NumPy).

    Raises:
        TypeError: a part that is neither an integer nor a string.
    """
    for part in parts:
        if not isinstance(part, (Integral, str)):
            raise TypeError(f"stream part {part!r} is a {type(part).__name__}: must be an integer or a string")
    plain = [part if isinstance(part, str) else int(part) for part in parts]
    text = repr((int(seed), str(purpose), *plain)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def generator(seed: int, purpose: str, *parts: int | str) -> np.random.Generator:
    """NumPy generator of the stream with this key.

    Args:
        seed: the run's seed.
        purpose: what the numbers are for (``"shuffle"``, ``"rollout"``, ...).
        *parts: what distinguishes the streams of one purpose: optimiser step, global sample index, epoch.
    """
    return np.random.Generator(np.random.Philox(key=stream_key(seed, purpose, *parts)))
