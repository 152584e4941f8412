"""Every engine does the same: what `tests/helpers/engine_contract.py` says, in this process and on a stand-in.

vLLM itself, on servers and in its own process, is held to the same functions in test_real_vllm.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_contract
import pytest
from vllm_standin import StandIn

from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig
from stepkd.sampling.client import Client
from stepkd.sampling.engine import Engine
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.sampling.vllm import ServerEngine


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    served = StandIn(Policy.load(PolicyConfig(path=str(folder))), str(folder))
    yield served.address
    served.close()


def engine(name: str, policy: Policy, address: str) -> Engine:
    if name == "in process":
        return TransformersEngine(policy, max_rows=4)
    return ServerEngine(policy, Client([address], 4, 30.0))


@pytest.mark.parametrize("name", ["in process", "server"])
@pytest.mark.parametrize("rule", [*engine_contract.SAMPLES, *engine_contract.SCORES], ids=lambda rule: rule.__name__)
def test_every_engine_keeps_to_it(name: str, rule: Any, policy: Policy, address: str) -> None:
    rule(engine(name, policy, address), policy)


@pytest.mark.parametrize("name", ["in process", "server"])
def test_every_version_is_sampled_from(name: str, folder: Path, address: str) -> None:
    moved = Policy.load(PolicyConfig(path=str(folder), lora=LoRAConfig(r=4)))
    engine_contract.every_version_is_sampled_from(engine(name, moved, address), moved)
