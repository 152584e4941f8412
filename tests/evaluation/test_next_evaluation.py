"""What a finished run advises to do next."""

from __future__ import annotations

import shlex

import pytest

from stepkd.data.config import DataConfig, benchmark_data, next_evaluation, parse_spec
from stepkd.data.sources import get_benchmark

TINY = {"task": "modular:terms=4", "n": 128}


@pytest.mark.parametrize(
    ("spec", "template", "expected"),
    [
        (DataConfig(source="gsm8k", split="train", limit=64), "gsm8k", "--benchmark gsm8k"),
        (DataConfig(source="gsm8k", path="my test.jsonl"), "gsm8k", "--benchmark gsm8k --data 'my test.jsonl'"),
        (DataConfig(source="task", options=TINY), "task", "--benchmark task --data task=modular:terms=4,n=128"),
        (DataConfig(path="held_out.jsonl"), "gsm8k", "--benchmark rows --data held_out.jsonl"),
        (DataConfig(path="held_out.jsonl"), "task", "--benchmark rows --data held_out.jsonl"),
        (DataConfig(hub="org/set", split="test"), "plain", "--benchmark rows --data hub=org/set,split=test"),
        (None, "gsm8k", "--benchmark rows --data PROBLEMS.jsonl"),
        (None, "math", "--benchmark math500"),
        (None, "task", "--benchmark task"),
    ],
)
def test_a_policy_is_evaluated_on_problems_like_its_own(spec: DataConfig | None, template: str, expected: str) -> None:
    found = next_evaluation(spec, template)
    assert found == expected
    words = shlex.split(found)
    data = benchmark_data(get_benchmark(words[1]), words[3] if len(words) > 2 else None, None)
    if spec is not None:
        assert (data.source, data.path, data.hub, data.options) == (spec.source, spec.path, spec.hub, spec.options)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (DataConfig(source="math_shepherd", split="train"), "--sets gsm8k math"),
        (None, "--sets gsm8k math"),
        (DataConfig(path="steps.jsonl"), "--sets steps.jsonl"),
        (
            DataConfig(source="task", split="validation", options={**TINY, "noise": {"rate": 0.3}}),
            "--sets task:task=modular:terms=4,n=128,noise.rate=0.3,split=validation",
        ),
    ],
)
def test_a_reward_model_is_judged_on_steps_like_its_own(spec: DataConfig | None, expected: str) -> None:
    found = next_evaluation(spec, "task", steps=True)
    assert found == expected
    if spec is not None and "math" not in expected:
        assert parse_spec(shlex.split(found)[1]) == spec
