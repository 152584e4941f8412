"""Searches with a real (tiny) model: problems searched together or alone give the same trees and solutions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from tiny_policy import tiny_policy

from stepkd.grading.pool import Grader
from stepkd.models.policy import Policy
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.search.beam import Beam, ParticleFilter
from stepkd.search.generate import ContinuationValue, SampledSteps
from stepkd.search.mcts import MCTS, Reference, TreeConfig, tree_search
from stepkd.search.phi import PhiDecoding
from stepkd.search.state import Found, Problem, Search, State, Tools
from stepkd.search.tree import Node, SearchTree

SETTINGS = TreeConfig(iterations=2, root_factor=2, actions=3, depth=2, max_steps=3)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


def search(
    policy: Policy, problems: list[Problem], settings: TreeConfig = SETTINGS, *, max_rows: int = 64, seed: int = 0
) -> list[SearchTree]:
    engine = TransformersEngine(policy, max_rows=max_rows)
    spec = SamplingConfig(max_new_tokens=8, seed=seed)
    generator = SampledSteps(engine, policy, spec, segmenter="regex:[a-m]", max_step_tokens=8)
    with Grader(extractors=("last_number",)) as grader:
        value = ContinuationValue(generator, grader, continuations=2)
        return tree_search(problems, generator, value.values, settings, Reference(grader))


def shape(node: Node) -> Any:
    """All that should be the same; log-probabilities to ten digits."""
    step = node.step
    own = None if step is None else (step.text, step.token_ids, step.end, step.sample, float(f"{step.logprob:.10g}"))
    return own, node.visits, round(node.q, 9), node.correct, [shape(child) for child in node.children]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, force_end=True, choose="visits")])
def test_trees_do_not_depend_on_what_else_is_searched(policy: Policy, settings: TreeConfig) -> None:
    texts = {0: "1+2=", 4: "a much longer problem: 17*3+4=", 7: "9"}
    problems = [
        Problem(index, {"id": str(index), "prompt": text, "answer": "3"}, tuple(policy.tokenizer(text)["input_ids"]))
        for index, text in texts.items()
    ]
    together = [shape(tree.root) for tree in search(policy, problems, settings)]
    assert [shape(tree.root) for tree in search(policy, problems[::-1], settings, max_rows=3)][::-1] == together
    for problem, expected in zip(problems, together, strict=True):
        (alone,) = search(policy, [problem], settings)
        assert shape(alone.root) == expected
        assert len(list(alone.root.subtree())) > 8
    assert len({str(tree) for tree in together}) == 3
    assert shape(search(policy, problems[:1], settings, seed=1)[0].root) != together[0]


class ByText:
    """Scores that are a function of the text alone."""

    def values(self, states: Sequence[State], reduction: str | None = None) -> list[float | None]:
        return [(sum(map(ord, state.text)) % 97 + 1) / 99 for state in states]

    def provenance(self) -> dict[str, Any]:
        return {}


def told(found: Sequence[Found]) -> str:
    """All that should be the same; numbers to nine digits."""
    text = json.dumps([[each.token_ids.tolist(), each.finish, each.score, each.trace] for each in found])
    return json.dumps(json.loads(text, parse_float=lambda number: f"{float(number):.9g}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        Beam(n=4, width=2, max_steps=4),
        MCTS(iterations=3, root_factor=2, actions=3, depth=2, max_steps=4),
        MCTS(iterations=3, root_factor=2, depth=1, force_end=True, choose="visits", vote="weighted"),
        ParticleFilter(n=4, max_steps=4),
        ParticleFilter(n=4, max_steps=4, temperature=0.5),
        PhiDecoding(beams=2, rollouts=2, min_rounds=1, max_rounds=3),
        PhiDecoding(variant="code", beams=2, rollouts=2, min_rounds=2, max_rounds=3, foresight_temperature=0.7),
    ],
    ids=lambda method: method.name,
)
def test_what_is_found_does_not_depend_on_what_else_is_searched(policy: Policy, method: Search) -> None:
    """Nor what it costs; solutions of at most 20 tokens, some of which are full in the middle of the search."""
    texts = {0: "1+2=", 4: "a much longer problem: 17*3+4=", 7: "9"}
    problems = [
        Problem(index, {"id": str(index), "prompt": text, "answer": "3"}, tuple(policy.tokenizer(text)["input_ids"]))
        for index, text in texts.items()
    ]
    with Grader(extractors=("last_number",)) as grader:

        def run(some: Sequence[Problem], max_rows: int) -> list[str]:
            spec = SamplingConfig(temperature=0.8, max_new_tokens=20)
            engine = TransformersEngine(policy, max_rows=max_rows)
            steps = SampledSteps(engine, policy, spec, segmenter="regex:[a-m]", max_step_tokens=8, max_tokens=20)
            results = method.run(some, Tools(steps, grader, ByText(), steps.costs))
            spent = [dict(steps.costs[problem.index]) for problem in some]
            return [f"{told(found)} {cost}" for found, cost in zip(results, spent, strict=True)]

        together = run(problems, 64)
        assert len(set(together)) == 3
        assert '"length"' in "".join(together)
        assert run(problems[::-1], 3)[::-1] == together
        assert [run([problem], 1)[0] for problem in problems] == together
