"""A tiny model, and an evaluation of seven tiny problems with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepkd.evaluation.config import EvaluateConfig
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig
from stepkd.sampling.config import Transformers
from stepkd.sampling.engine import SamplingConfig


@pytest.fixture(scope="session")
def policy() -> Policy:
    return Policy.load(PolicyConfig(path="tiny-0.1m", dtype="float64"))


@pytest.fixture
def spec(tmp_path: Path) -> EvaluateConfig:
    return EvaluateConfig(
        model="tiny-0.1m",
        benchmark="task",
        data="task=modular:terms=3,n=7",
        out=str(tmp_path / "out"),
        sampling=SamplingConfig(temperature=0.0, max_new_tokens=24),
        engine=Transformers(2),
        dtype="float64",
        device="cpu",
    )
