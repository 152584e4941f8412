"""Keyed hashes and generators: the same parts give the same draw in every process, on every machine."""

from __future__ import annotations

import hashlib
import json
import random


def keyed_bits(*parts: str | int) -> int:
    """Hash the parts to 64 bits, independently of `PYTHONHASHSEED`.

    Args:
        parts: what the value is keyed by, in order; ``1`` and ``"1"`` are different parts.

    Returns:
        An integer in [0, 2**64).
    """
    text = json.dumps(parts, ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(text.encode("ascii"), digest_size=8).digest(), "big")


def keyed_fraction(*parts: str | int) -> float:
    """Hash the parts to a number in [0, 1), uniform over different keys."""
    return (keyed_bits(*parts) >> 11) / 2**53


def keyed_rng(*parts: str | int) -> random.Random:
    """Return a fresh generator keyed by the parts (seed, purpose, index, ...)."""
    return random.Random(keyed_bits(*parts))
