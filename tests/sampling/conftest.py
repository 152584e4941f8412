"""The model behind the stand-in for vLLM's server, and that server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm_standin import StandIn

from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose distributions are peaked, and its tokenizer."""
    found = tmp_path_factory.mktemp("model")
    policy = Policy.load(PolicyConfig(path="tiny-0.1m", init_seed=1))
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(3)
    policy.model.save_pretrained(found)
    policy.tokenizer.save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return Policy.load(PolicyConfig(path=str(folder)))


@pytest.fixture
def server(policy: Policy, folder: Path) -> Iterator[StandIn]:
    found = StandIn(policy, str(folder))
    yield found
    found.close()
