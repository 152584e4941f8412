"""A model folder as users have them on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepkd.models import build_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole transformers folder with tied weights: tiny-0.1m, seed 3."""
    return save_tiny(tmp_path / "model")


def save_tiny(path: Path, *, seed: int = 3) -> Path:
    """Write a tiny model and its tokenizer."""
    model, tokenizer = build_tiny("tiny-0.1m", seed=seed)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
