"""Train/test overlap by word n-grams: how much of each test text stands in the training texts.

Texts are compared as words in lower case, without punctuation and spacing; arithmetic operators count as words, since
``3 + 4`` and ``3 * 4`` are different problems. Hashed n-grams of the test texts are held in memory and the training
texts stream past, so memory grows with the test texts only.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from stepkd.errors import ConfigError

# Words, or an operator; a hyphen is a minus only before a digit or an opening parenthesis.
_WORDS = re.compile(r"\w+|[+*/=<>^%]|-(?=\s*[\d(])")

HALF = 0.5
"""Share of n-grams from which on a test text counts as largely seen."""


@dataclass(frozen=True)
class OverlapReport:
    """What :func:`overlap_report` found."""

    n: int
    """Words per n-gram."""
    train_count: int
    """Number of training texts."""
    shares: tuple[float, ...]
    """Per test text: share of its distinct n-grams that stand in some training text, in [0, 1]."""
    exact_ids: tuple[str, ...]
    """Test ids whose whole text, normalised, is a training text."""
    half_ids: tuple[str, ...]
    """Test ids with a share of at least one half, exact duplicates included."""

    def __str__(self) -> str:
        count = len(self.shares)

        def percent(some: int) -> str:
            return f"{some} ({100 * some / max(count, 1):.2f}%)"

        shown = ", ".join(self.half_ids[:5]) + (", ..." if len(self.half_ids) > 5 else "")
        return (
            f"Overlap of {count} test texts with {self.train_count} training texts ({self.n}-word n-grams): "
            f"{percent(len(self.exact_ids))} are exact duplicates, {percent(len(self.half_ids))} have at least half of "
            f"their n-grams in training, {percent(sum(share > 0 for share in self.shares))} share at least one; on "
            f"average a test text shares {100 * sum(self.shares) / max(count, 1):.2f}% of its n-grams."
            + (f" Largely seen: {shown}." if shown else "")
        )


def overlap_report(
    train_texts: Iterable[str], test_texts: Iterable[str], n: int = 8, *, test_ids: Sequence[str] | None = None
) -> OverlapReport:
    """Measure how much of the test texts stands in the training texts.

    A test text of fewer than ``n`` words is compared as a whole: its share is 1 if a training text equals it, else 0.

    Args:
        train_texts: read once, may be a generator of any length.
        test_texts: held as hashes.
        n: words per n-gram, at least 1; 8 to 13 are usual for contamination checks.
        test_ids: one per test text; None: their 0-based positions.

    Returns:
        The report.

    Raises:
        ConfigError: ``n`` below 1.
        ValueError: not as many ids as test texts.
    """
    if n < 1:
        raise ConfigError(f"n={n}: an n-gram needs at least 1 word")
    wholes: list[int] = []
    grams: list[frozenset[int]] = []
    for text in test_texts:
        words = normalised_words(text)
        wholes.append(_hash("whole", words))
        grams.append(frozenset(_hashes(words, n)))
    ids = map(str, range(len(grams))) if test_ids is None else test_ids
    named = list(zip(ids, wholes, grams, strict=True))

    wanted = set().union(*grams) | set(wholes) if grams else set()
    seen: set[int] = set()
    train_count = 0
    for text in train_texts:
        train_count += 1
        words = normalised_words(text)
        seen.update(wanted.intersection(_hashes(words, n)))
        seen.update(wanted & {_hash("whole", words)})

    shares = tuple(len(own & seen) / len(own) if own else 0.0 for _, _, own in named)
    return OverlapReport(
        n=n,
        train_count=train_count,
        shares=shares,
        exact_ids=tuple(name for name, whole, _ in named if whole in seen),
        half_ids=tuple(name for (name, _, _), share in zip(named, shares, strict=True) if share >= HALF),
    )


def normalised_words(text: str) -> list[str]:
    """Return a text's words and arithmetic operators, case-folded, in compatibility form.

    Args:
        text: any text.
    """
    folded = unicodedata.normalize("NFKC", text).replace("\u2212", "-").casefold()
    return _WORDS.findall(folded)


def _hashes(words: Sequence[str], n: int) -> Iterator[int]:
    if 0 < len(words) < n:
        yield _hash("whole", words)
    for start in range(len(words) - n + 1):
        yield _hash("gram", words[start : start + n])


def _hash(kind: str, words: Sequence[str]) -> int:
    # A 64-bit hash that is the same in every process; a false match among 10 million n-grams has odds of 1 in 10^5.
    data = "\x1f".join((kind, *words)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
