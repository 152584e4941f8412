"""Entropy-triggered branching: how many trials, where, which stands, what it costs; and sampling as its limit."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tiny_policy import tiny_policy

from stepkd.errors import ConfigError
from stepkd.models.policy import Policy
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.search.generate import SampledSteps
from stepkd.search.state import Problem, State, Tools
from stepkd.search.tokens import EntropyBranching

TABLE = {
    "": {"a": 1.0},
    "a": {"1": 0.375, "2": 0.375, "3": 0.25},
    "a1": {".": 1.0},
    "a2": {".": 0.5, "0": 0.5},
    "a20": {".": 0.5, "$": 0.5},
    "a3": {",": 0.25, "$": 0.75},
    "a1.": {"b": 1.0},
    "a2.": {"b": 1.0},
    "a20.": {"b": 1.0},
}


def test_trials_grow_with_entropy_between_the_bounds() -> None:
    method = EntropyBranching(k_max=9, low=0.5, high=1.5)
    assert [method.trials(h) for h in (0.0, 0.5, 0.62, 0.63, 1.0, 1.49, 1.5, 9.0)] == [1, 1, 1, 2, 5, 8, 9, 9]
    assert [EntropyBranching().trials(h) for h in (0.0, 0.01, 0.04, 0.05, 1.5)] == [1, 1, 1, 2, 40]


def test_the_trial_of_least_perplexity_stands(table_engine: Any, tools_of: Any, problem: Problem) -> None:
    samples = {"": ["a20.b"], "a": ["3,", "1.b"], "a1.": ["b$"]}
    engine = table_engine(TABLE, samples, {"a": 1.0})
    tools = tools_of(engine)
    ((answer,),) = EntropyBranching(k_max=3, high=1.0).run([problem], tools)
    assert (answer.text, answer.finish) == ("a1.b", "stop")
    (event,) = answer.trace
    assert (event["event"], event["token"], event["entropy"], event["kept"]) == ("branch", 1, 1.0, [2])
    assert event["steps"] == ["a20.", "a3,", "a1."]
    geometric = [(0.375 * 0.5 * 0.5) ** (1 / 3), (0.25 * 0.25) ** 0.5, (0.375 * 1.0) ** 0.5]
    assert event["scores"] == pytest.approx(geometric)
    assert engine.calls == [[""], ["a", "a"], ["a1."]], "all trials at once; the rest of the draft is one of them"
    assert tools.costs[0] == {"continuations": 4 + 2 + 2 + 2}


def test_certain_tokens_are_sampled_as_ever(table_engine: Any, tools_of: Any, problem: Problem) -> None:
    engine = table_engine(TABLE, {"": ["a2."], "a2.": ["b$"]}, {"a": 0.009})
    ((answer,),) = EntropyBranching().run([problem], tools_of(engine))
    assert (answer.text, answer.trace) == ("a2.b", ())


def test_a_trial_that_never_ends_is_bounded(table_engine: Any, tools_of: Any, problem: Problem) -> None:
    table = {"x" * n: {"x": 1.0} for n in range(50)}
    samples = {"x" * n: ["x" * 99] * 3 for n in range(50)}
    tools = tools_of(table_engine(table, samples, {"xx": 9.0}), max_step_tokens=4, max_new_tokens=11)
    ((answer,),) = EntropyBranching(k_max=3).run([problem], tools)
    assert (len(answer.token_ids), answer.finish, len(answer.trace)) == (11, "length", 1)
    # A draft of 4, the last 2 of them a trial (of equal ones the first stands), two more of 4, and drafts of 4 and 3.
    assert tools.costs[0]["continuations"] == 4 + 2 * 4 + 4 + 3


def test_an_engine_without_entropies_is_refused(
    table_engine: Any, tools_of: Any, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_engine, "gives_entropies", False)
    with pytest.raises(ConfigError, match=r"TableEngine tells the most likely tokens only.*--engine Transformers"):
        EntropyBranching().run([problem], tools_of(table_engine(TABLE)))
    ((answer,),) = EntropyBranching(k_max=1).run([problem], tools_of(table_engine(TABLE, {"": ["a1.b$"]})))
    assert answer.text == "a1.b", "sampling needs none"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k_max": 0}, "k_max=0"),
        ({"low": 2.0}, "high=1.5: must be finite, and above low=2.0"),
        ({"high": math.nan}, "high=nan"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EntropyBranching(**settings)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy(scale=3)


def test_on_a_model_nothing_depends_on_the_batch_and_one_trial_is_sampling(policy: Policy) -> None:
    texts = ["1+2=", "a much longer problem: 17*3+4="]
    problems = [Problem(i, {"id": str(i)}, tuple(policy.tokenizer(text)["input_ids"])) for i, text in enumerate(texts)]

    def steps(max_rows: int = 64) -> SampledSteps:
        engine = TransformersEngine(policy, max_rows=max_rows)
        return SampledSteps(engine, policy, SamplingConfig(max_new_tokens=14, seed=5), max_step_tokens=9)

    def run(method: EntropyBranching, some: list[Problem], **how: Any) -> list[Any]:
        found = method.run(some, Tools(steps(**how), None))  # type: ignore[arg-type]
        return [(answer.token_ids.tolist(), len(answer.trace)) for (answer,) in found]

    sampled = steps().complete([State(problem) for problem in problems], 1)
    assert [ids for ids, _ in run(EntropyBranching(k_max=1), problems)] == [list(s.token_ids) for (s,) in sampled]
    method = EntropyBranching(k_max=4, low=0.5, high=3.0)
    branched = run(method, problems)
    assert all(count >= 2 for _, count in branched)
    assert run(method, problems[::-1], max_rows=2)[::-1] == branched
