"""Settings of a model: what is refused, and the way to a plain dict and back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stepkd.errors import ConfigError
from stepkd.models import LoraSpec, PolicySpec, spec_from_dict, spec_to_dict


@pytest.mark.parametrize(
    "spec",
    [
        PolicySpec(),
        PolicySpec(path="org/name", revision="main", dtype="bfloat16", attention="sdpa", gradient_checkpointing=True),
        PolicySpec(lora=LoraSpec(r=4, alpha=8.0, target_modules=["q_proj"], modules_to_save=["lm_head"], rslora=True)),
        PolicySpec(lora=LoraSpec(), quantization="nf4"),
    ],
)
def test_dict_round_trip(spec: PolicySpec) -> None:
    assert spec_from_dict(spec_to_dict(spec)) == spec
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": ""}, r"policy\.path is empty"),
        ({"dtype": "float8"}, r"unknown policy\.dtype 'float8': .*choose from auto, float32"),
        ({"quantization": "int3"}, r"unknown policy\.quantization 'int3': .*choose from none, nf4, int8"),
        ({"quantization": "nf4"}, r"policy\.quantization='nf4' without policy\.lora.*add a lora section"),
    ],
)
def test_bad_policy_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicySpec(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"policy\.lora\.r=0"),
        ({"alpha": 0.0}, r"policy\.lora\.alpha=0\.0: must be positive"),
        ({"dropout": 1.0}, r"policy\.lora\.dropout=1\.0: must lie in \[0, 1\)"),
        ({"dropout": -0.1}, r"policy\.lora\.dropout=-0\.1"),
    ],
)
def test_bad_lora_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraSpec(**settings)


def test_settings_of_a_newer_version_are_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown policy settings \['warp'\].*newer stepkd"):
        spec_from_dict({"path": "x", "warp": 9})
    with pytest.raises(ConfigError, match=r"unknown policy\.lora settings \['gears'\].*newer stepkd"):
        spec_from_dict({"path": "x", "lora": {"r": 2, "gears": 5}})


def test_trust_in_remote_code_is_off() -> None:
    assert PolicySpec().trust_remote_code is False
