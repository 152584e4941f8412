"""Searches with a real (tiny) model: problems searched together or alone give the same trees."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stepkd.grading.pool import Grader
from stepkd.models.policy import Policy
from stepkd.models.spec import build_tiny
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.search.generate import ContinuationValue, SampledSteps
from stepkd.search.mcts import SearchConfig, SearchTree, tree_search
from stepkd.search.state import Problem
from stepkd.search.tree import Node

SETTINGS = SearchConfig(iterations=2, root_factor=2, actions=3, depth=2, max_steps=3)


@pytest.fixture(scope="module")
def policy() -> Policy:
    model, tokenizer = build_tiny("tiny-0.1m", seed=0, dtype="float64")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    return Policy(model, tokenizer)


def search(policy: Policy, problems: list[Problem], *, max_rows: int = 64, seed: int = 0) -> list[SearchTree]:
    engine = TransformersEngine(policy, max_rows=max_rows)
    spec = SamplingConfig(max_new_tokens=8, seed=seed)
    generator = SampledSteps(engine, policy, spec, segmenter="regex:[a-m]", max_step_tokens=8)
    with Grader(extractors=("last_number",)) as grader:
        return tree_search(problems, generator, ContinuationValue(generator, grader, continuations=2), grader, SETTINGS)


def shape(node: Node) -> Any:
    """All that should be the same; log-probabilities to ten digits."""
    step = node.step
    own = None if step is None else (step.text, step.token_ids, step.end, step.sample, float(f"{step.logprob:.10g}"))
    return own, node.visits, round(node.q, 9), node.correct, [shape(child) for child in node.children]


@pytest.mark.slow
def test_trees_do_not_depend_on_what_else_is_searched(policy: Policy) -> None:
    texts = {0: "1+2=", 4: "a much longer problem: 17*3+4=", 7: "9"}
    problems = [
        Problem(index, {"id": str(index), "prompt": text, "answer": "3"}, tuple(policy.tokenizer(text)["input_ids"]))
        for index, text in texts.items()
    ]
    together = [shape(tree.root) for tree in search(policy, problems)]
    assert [shape(tree.root) for tree in search(policy, problems[::-1], max_rows=3)][::-1] == together
    for problem, expected in zip(problems, together, strict=True):
        (alone,) = search(policy, [problem])
        assert shape(alone.root) == expected
        assert len(list(alone.root.subtree())) > 8
    assert len({str(tree) for tree in together}) == 3
    assert shape(search(policy, problems[:1], seed=1)[0].root) != together[0]
