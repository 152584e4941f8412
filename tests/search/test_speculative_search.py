"""Speculative sampling as a method: solutions, costs and trace; engines that cannot are refused."""

from __future__ import annotations

from typing import Any

import pytest

from stepkd.errors import ConfigError
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.search.generate import SampledSteps
from stepkd.search.state import Problem, Tools
from stepkd.search.tokens import Speculative


def test_solutions_are_drafted_and_counted() -> None:
    policy = Policy.load(PolicyConfig(path="tiny-0.1m", init_seed=1, dtype="float64"))
    problems = [Problem(i, {"id": str(i)}, tuple(policy.tokenizer(text)["input_ids"])) for i, text in enumerate("1+")]

    def run(method: Any, temperature: float) -> tuple[Any, Tools]:
        tools = Tools(None, None)  # type: ignore[arg-type]
        spec = SamplingConfig(temperature=temperature, max_new_tokens=12)
        tools.generator = SampledSteps(TransformersEngine(policy), policy, spec, costs=tools.costs)
        tools.generators = {"small": tools.generator}
        return method.run(problems, tools), tools

    method = Speculative(draft="small", length=3, n=2)
    assert (method.models, method.needs_scorer, method.at_once) == (("small",), False, 2)
    (first, second), tools = run(method, 1.0)
    assert [len(first), len(second)] == [2, 2]
    assert first[0].token_ids.tolist() != first[1].token_ids.tolist()
    events = [answer.trace[0] for answer in first]
    assert [event["tokens"] for event in events] == [len(answer.token_ids) for answer in first]
    assert all(event["drafted"] == event["accepted"] for event in events), "its own draft"
    names = {"continuations": "tokens", "drafted": "drafted", "passes": "passes"}
    assert tools.costs[0] == {name: sum(event[told] for event in events) for name, told in names.items()}
    assert tools.costs[0]["passes"] < tools.costs[0]["continuations"]


def test_other_engines_are_refused(table_engine: Any, tools_of: Any, problem: Problem) -> None:
    tools = tools_of(table_engine({}))
    tools.generators = {"small": tools.generator}
    with pytest.raises(ConfigError, match=r"TableEngine does not give.*--engine Transformers"):
        Speculative(draft="small").run([problem], tools)
    with pytest.raises(ConfigError, match=r"threshold=1\.0"):
        Speculative(draft="tiny-0.1m", threshold=1.0)
