"""Value-guided decoding: where the scorer is asked, what is taken, what it costs; and greedy decoding as its limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_policy import tiny_policy

from stepkd.errors import ConfigError
from stepkd.models.policy import Policy
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.search.best_of_n import Greedy
from stepkd.search.generate import SampledSteps
from stepkd.search.state import Problem, State, Tools
from stepkd.search.value_guided import ValueGuided

TABLE = {
    "": {"a": 0.9, "b": 0.1},
    "a": {"1": 0.5, "2": 0.4, "3": 0.1},
    "a1": {"\n": 1.0},
    "a1\n": {"x": 0.54, "y": 0.46},
    "a2": {"\n": 1.0},
    "a2\n": {"y": 0.4, "x": 0.35, "$": 0.25},
}
"""Greedy: ``a1\\nx``, unsure at the second and the fourth token; behind ``a2\\n`` unsure again."""


def test_the_scorer_decides_where_the_model_is_unsure(
    table_engine: Any, tools_of: Any, counted: Any, problem: Problem
) -> None:
    engine, value = table_engine(TABLE), counted({"a2": 0.9, "a2\n": 0.8, "a2\ny": 0.7})
    tools = tools_of(engine, value)
    ((answer,),) = ValueGuided(candidates=3).run([problem], tools)
    assert value.asked == ["a1", "a2", "a3", "a2\ny", "a2\nx", "a2\n"]
    assert (answer.text, answer.finish) == ("a2\n", "stop")
    assert answer.token_ids.tolist()[-1] in engine.policy.eos_ids, "a candidate that ends the solution"
    assert [(event["event"], event["step"], event["token"], event["kept"]) for event in answer.trace] == [
        ("rerank", 0, 1, [1]),
        ("rerank", 0, 3, [2]),
    ]
    assert answer.trace[0]["confidence"] == pytest.approx(0.5)
    assert answer.trace[0]["steps"] == ["a1", "a2", "a3"]
    assert answer.trace[0]["scores"] == [0.5, 0.9, 0.5]
    # Two drafts: a 1 \n x $, of which four are thrown away, and \n y $, of which two are.
    assert engine.calls == [[""], ["a2"]]
    assert tools.costs[0] == {"continuations": 5 + 3}


def test_a_draft_stays_where_its_token_is_taken(
    table_engine: Any, tools_of: Any, counted: Any, problem: Problem
) -> None:
    engine, value = table_engine(TABLE), counted({"a1": 0.6})
    ((answer,),) = ValueGuided().run([problem], tools_of(engine, value))
    assert answer.text == "a1\nx", "equal scores: the most likely"
    assert (len(engine.calls), [len(event["scores"]) for event in answer.trace]) == (1, [8, 8])


def test_how_far_it_looks_ahead_changes_nothing(
    table_engine: Any, tools_of: Any, counted: Any, problem: Problem
) -> None:
    known = {"a2": 0.9, "a2\nx": 0.7}
    found = []
    for ahead in (1, 2, 3, 32):
        tools = tools_of(table_engine(TABLE), counted(known))
        ((answer,),) = ValueGuided(ahead=ahead).run([problem], tools)
        found.append((answer.token_ids.tolist(), answer.trace))
        assert tools.costs[0]["continuations"] >= len(answer.token_ids) - 1
    assert all(each == found[0] for each in found)
    assert found[0][1][-1]["kept"] == [1]


@pytest.mark.parametrize("settings", [{"threshold": 0.0}, {"candidates": 1}])
def test_without_a_choice_it_is_greedy(
    table_engine: Any, tools_of: Any, counted: Any, problem: Problem, settings: dict[str, Any]
) -> None:
    value = counted({"a1": 0.1, "a1\nx": 0.1})
    tools = tools_of(table_engine(TABLE), value)
    ((answer,),) = ValueGuided(**settings).run([problem], tools)
    ((greedy,),) = Greedy().run([problem], tools_of(table_engine(TABLE)))
    assert (answer.text, answer.token_ids.tolist()) == (greedy.text, greedy.token_ids.tolist())
    assert value.asked == ([] if settings == {"threshold": 0.0} else ["a1", "a1\nx"])


def test_missing_scores_rank_last(table_engine: Any, tools_of: Any, counted: Any, problem: Problem) -> None:
    value = counted({"a1": None, "a2": None, "a3": 0.0})
    ((answer,),) = ValueGuided(candidates=3).run([problem], tools_of(table_engine(TABLE), value))
    assert answer.text == "a3"
    ((answer,),) = ValueGuided(candidates=2).run([problem], tools_of(table_engine(TABLE), value))
    assert answer.text == "a1\nx", "where all are missing, the most likely"


def test_it_ends_at_its_longest_and_at_stop_strings(
    table_engine: Any, tools_of: Any, counted: Any, problem: Problem
) -> None:
    tools = tools_of(table_engine(TABLE), counted({"a2": 0.9}), max_new_tokens=2)
    ((answer,),) = ValueGuided().run([problem], tools)
    assert (answer.text, answer.finish, len(answer.token_ids)) == ("a2", "length", 2)
    for ahead in (1, 2, 32):  # a string that begins in one draft and ends in the next, and in a candidate
        tools = tools_of(table_engine(TABLE), counted({}), stop=("1\n",))
        ((answer,),) = ValueGuided(ahead=ahead).run([problem], tools)
        assert (answer.text, answer.finish, len(answer.token_ids)) == ("a", "stop", 3)
        tools = tools_of(table_engine(TABLE), counted({"a": 0.9}), stop=("a2",))
        ((answer,),) = ValueGuided(ahead=ahead).run([problem], tools)
        assert (answer.finish, len(answer.trace)) == ("stop", 1)


def test_random_placement_asks_as_often_and_elsewhere(table_engine: Any, tools_of: Any, counted: Any) -> None:
    text = "abcdefghijklmnopqrst"
    table = {text[:i]: {c: 0.5 if i in (3, 11) else 0.9, "0": 0.05, "1": 0.04} for i, c in enumerate(text)}
    problems = [Problem(index, {"id": str(index)}, (7,)) for index in range(3)]
    guided, value = ValueGuided(candidates=2, placement="random"), counted({})
    tools = tools_of(table_engine(table), value)
    found = guided.run(problems, tools)
    asked = [tuple(event["token"] for event in answer.trace) for (answer,) in found]
    assert [len(each) for each in asked] == [2, 2, 2]
    assert len(set(asked)) == 3, "keyed by problem"
    assert (3, 11) not in asked
    assert all(0 <= place < len(text) for each in asked for place in each)
    # What tells how often to ask is not counted: one draft of the whole, whose tokens all stand.
    assert [tools.costs[index]["continuations"] for index in range(3)] == [len(text) + 1] * 3
    ((alone,),) = guided.run(problems[2:], tools_of(table_engine(table), counted({})))
    assert tuple(event["token"] for event in alone.trace) == asked[2]
    seeded = [replace(problems[2], seed=1)]
    ((other,),) = guided.run(seeded, tools_of(table_engine(table), counted({})))
    assert tuple(event["token"] for event in other.trace) != asked[2]


def test_random_placement_asks_as_often_where_choices_shorten_solutions(
    table_engine: Any, tools_of: Any, counted: Any
) -> None:
    """The scorer wants b; behind it come two tokens and the end, so that places behind them would never be asked."""
    table: dict[str, Any] = {}
    for length in range(12):
        text = "a" * length
        table[text] = {"a": 0.5 if length in (3, 5) else 0.9, "b": 0.1}
        table |= {f"{text}b": {"c": 0.9, "d": 0.1}, f"{text}bc": {"c": 0.9, "d": 0.1}}
    value = counted({f"{'a' * length}b": 0.9 for length in range(12) if length not in (3, 5)})
    problems = [Problem(index, {"id": str(index)}, (7,)) for index in range(8)]
    calls = []
    for placement in ("unsure", "random"):
        method = ValueGuided(candidates=2, placement=placement)  # type: ignore[arg-type]
        found = method.run(problems, tools_of(table_engine(table), value))
        calls.append([len(answer.trace) for (answer,) in found])
    assert calls == [[2] * 8] * 2
    assert any(len(answer.token_ids) < 12 for (answer,) in found)


def test_generators_of_steps_are_refused(scripted: Any, known_tree: Any, problem: Problem) -> None:
    with pytest.raises(ConfigError, match=r"value_guided@8 decides on tokens, and ScriptedSteps gives steps"):
        ValueGuided().run([problem], Tools(scripted(known_tree), None))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


class Parity:
    """Likes texts by their characters' sum: another choice at every token."""

    def values(self, states: list[State], reduction: str | None = None) -> list[float | None]:
        return [sum(map(ord, state.text)) % 7 / 7 for state in states]


def test_on_a_model_nothing_depends_on_the_batch_and_threshold_0_is_greedy(policy: Policy) -> None:
    texts = ["1+2=", "a much longer problem: 17*3+4="]
    problems = [Problem(i, {"id": str(i)}, tuple(policy.tokenizer(text)["input_ids"])) for i, text in enumerate(texts)]

    def run(method: Any, some: list[Problem], max_rows: int = 64) -> list[Any]:
        generator = SampledSteps(
            TransformersEngine(policy, max_rows=max_rows), policy, SamplingConfig(max_new_tokens=16)
        )
        found = method.run(some, Tools(generator, None, Parity()))  # type: ignore[arg-type]
        return [answer.token_ids.tolist() for (answer,) in found]

    greedy = run(Greedy(), problems)
    assert run(ValueGuided(threshold=0, ahead=7), problems) == greedy
    guided = run(ValueGuided(threshold=0.9, candidates=4, ahead=7), problems)
    assert sum(a != b for a, b in zip(guided, greedy, strict=True)) == 2
    assert run(ValueGuided(threshold=0.9, candidates=4, ahead=16), problems[::-1], max_rows=1)[::-1] == guided
