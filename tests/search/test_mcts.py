"""The search against a simulation by hand, its invariants on random trees, and that trees do not mix."""

from __future__ import annotations

import random
from typing import Any

import pytest

from stepkd.errors import ConfigError, DataError
from stepkd.search.mcts import SearchConfig, SearchTree, tree_search
from stepkd.search.state import Problem
from stepkd.search.tree import Node

HAND = SearchConfig(iterations=1, root_factor=4, actions=2, depth=2, exploration=4.0)


def numbers(tree: SearchTree) -> list[tuple[str, int, float]]:
    """Text, visits and Q of every node but the root."""
    return [(n.step.text, n.visits, n.q) for n in tree.root.subtree() if n is not tree.root]


def test_by_hand(scripted: Any, known_tree: Any, known_values: Any, grader: Any, problem: Problem) -> None:
    """Four walks at the root and one at ``a``, by hand.

    Priors are 0.5 (a, answers) and 0.25 (b). Values: a 0.6, b 0.5; a's answers 0.9 + 1 and 0.4 - 1, b's 0.3 - 1 and
    0.2 - 1. PUCT with c = 4:
    walk 1: a 2.6, b 1.5 -> a; 1 3.3, 2 0.8 -> 1. V(a) = (1.3 - 1.2) / 2, Q(a) = 0.65.
    walk 2: a 0.65 + 2 sqrt2 / 2 = 2.064, b 0.5 + sqrt2 = 1.914 -> a; 1 2.714, 2 1.628 -> 1. Q(a) = 0.6 + 1.4 / 3.
    walk 3: a 1.0667 + 2 sqrt3 / 3 = 2.2214, b 0.5 + sqrt3 = 2.2321 -> b; 2 0.8, 3 0.7 -> 2. Q(b) = 0.5 - 1.25.
    walk 4: a 1.0667 + 4 / 3 = 2.4, b 0.25 -> a; 1 2.455, 2 2.264 -> 1. Q(a) = 0.6 + 2.7 / 4 = 1.275.
    a is chosen; walk 5 starts there with N(a) = 4: 1 1.3 + 4 / 4 = 2.3, 2 -1.2 + 4 = 2.8 -> 2.
    """
    generator = scripted(known_tree)
    (tree,) = tree_search([problem], generator, known_values, grader, HAND)
    expected = [
        *(("a\n", 4, 1.275), ("#### 1", 3, 1.3), ("#### 2", 1, -1.2)),
        *(("b\n", 1, -0.75), ("#### 2", 1, -1.2), ("#### 3", 0, -1.3)),
    ]
    found = numbers(tree)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected])
    assert tree.root.visits == 4
    assert tree.root.v == pytest.approx((3 * 1.275 - 0.75) / 4)
    first, second = tree.decisions
    assert [(o.visits, o.q) for o in first.options] == [(3, pytest.approx(1.275)), (1, -0.75)], "as decided"
    assert [(o.visits, o.q) for o in second.options] == [(3, pytest.approx(1.3)), (1, pytest.approx(-1.2))]
    assert tree.last.state(problem).text == "a\n#### 1"
    assert tree.last.correct is True
    assert tree.solved
    assert generator.calls == [1, 1, 1], "every node is expanded once"


def test_the_better_branch_wins_against_its_first_value(
    scripted: Any, valued: Any, known_tree: Any, grader: Any, problem: Problem
) -> None:
    """``b`` looks and is worse by likelihood, but only it leads to the correct answer."""
    row = dict(problem.row) | {"answer": "3"}
    values = valued(dict.fromkeys(("a\n", *(t + e for t in ("a\n", "b\n") for e in TAILS)), 0.5) | {"b\n": 0})
    settings = SearchConfig(iterations=8, depth=2)
    (tree,) = tree_search([Problem(0, row, (7,))], scripted(known_tree), values, grader, settings)
    assert tree.last.state(problem).text == "b\n#### 3"


TAILS = ("#### 1", "#### 2", "#### 3")


def random_script(seed: int) -> tuple[dict[str, Any], dict[str, float | None]]:
    """A tree of up to four levels with one to three steps at each node, and values."""
    drawn = random.Random(seed)
    script: dict[str, Any] = {}
    values: dict[str, float | None] = {}
    waiting = [("", 0)]
    while waiting:
        text, depth = waiting.pop()
        script[text] = []
        for j in range(drawn.randint(1, 3)):
            over = depth == 3 or drawn.random() < 0.2
            step = f"#### {drawn.randint(0, 3)}{' ' * j}" if over else f"{'abc'[j]}\n"
            script[text].append((step, drawn.uniform(0.05, 0.9), "stop" if over else "step"))
            values[text + step] = None if drawn.random() < 0.1 else drawn.random()
            if not over:
                waiting.append((text + step, depth + 1))
    return script, values


@pytest.mark.parametrize("seed", range(8))
def test_invariants(scripted: Any, valued: Any, seed: int, grader: Any, problem: Problem) -> None:
    script, known_values = random_script(seed)
    values = valued(known_values)
    settings = SearchConfig(iterations=5, actions=3, depth=2, gamma=0.9, damp_after=1)
    (tree,) = tree_search([problem], scripted(script), values, grader, settings)
    decided = {id(decision.node): decision.options for decision in tree.decisions}
    for node in tree.root.subtree():
        if node.terminal:
            assert node.correct is (node.state(problem).text.split()[-1] == "1")
        if node.children:
            # A decided node is left as it was then, while walks from its child go on to count that one's visits.
            seen: Any = decided.get(id(node), node.children)
            weights = [max(1, c.visits) for c in seen]
            mean = sum(w * c.q for w, c in zip(weights, seen, strict=True)) / sum(weights)
            if node.visits:
                assert node.v == pytest.approx(mean)
                if id(node) not in decided:
                    assert node.q == pytest.approx(node.reward + 0.9 * mean)
        if node is not tree.root:
            known = known_values[node.state(problem).text]
            plain = node.value - (0 if node.correct is None else 1 if node.correct else -1)
            assert node.parent is not None
            expected = node.parent.value if known is None else known / max(1, node.parent.depth - 1)
            assert plain == pytest.approx(expected)
    assert tree.root.visits == 20
    for decision in tree.decisions:
        assert max((o.q, o.visits) for o in decision.options) == next(
            (o.q, o.visits) for o in decision.options if o.node is decision.chosen
        )


def same(a: Node, b: Node) -> bool:
    return (a.visits, a.q, a.value, a.correct, a.step) == (b.visits, b.q, b.value, b.correct, b.step) and all(
        same(x, y) for x, y in zip(a.children, b.children, strict=True)
    )


def test_together_or_alone(scripted: Any, known_tree: Any, known_values: Any, grader: Any) -> None:
    """Trees that need different numbers of expansions share their calls and nothing else."""
    problems = [Problem(i, {"id": str(i), "prompt": "?", "answer": str(i + 1)}, (7,)) for i in range(3)]
    generator = scripted(known_tree)
    together = tree_search(problems, generator, known_values, grader, HAND)
    assert generator.calls[:2] == [3, 3]
    for problem, tree in zip(problems, together, strict=True):
        (alone,) = tree_search([problem], scripted(known_tree), known_values, grader, HAND)
        assert same(tree.root, alone.root)
    assert not same(together[0].root, together[1].root)


def test_equal_steps_are_merged(scripted: Any, known_values: Any, grader: Any, problem: Problem) -> None:
    steps = [("a\n", 0.5, "step"), ("a\n", 0.5, "step"), ("b\n", 0.5, "step"), ("a\n", 0.5, "stop")]
    script = {"": steps, "a\n": [("#### 1", 0.5, "stop")], "b\n": [("#### 2", 0.5, "stop")]}
    settings = SearchConfig(iterations=1, actions=4, depth=2)
    (tree,) = tree_search([problem], scripted(script), known_values, grader, settings)
    found = [(n.step.text, n.step.end, n.copies) for n in tree.root.children]
    assert found == [("a\n", "step", 2), ("b\n", "step", 1), ("a\n", "stop", 1)]


def test_the_look_ahead_and_the_longest_solution_are_kept(
    scripted: Any, valued: Any, grader: Any, problem: Problem
) -> None:
    script = {"ab\n" * k: [("ab\n", 0.5, "step"), ("#### 1", 0.4, "step")] for k in range(8)}
    script |= {text + "#### 1": [("", 0.5, "stop")] for text in script}
    values = valued({t: 0.1 if "#" in t else 0.9 for t in script})

    class Deepest(scripted):
        def propose(self, states: Any, n: int) -> Any:
            deepest.append(max(len(state.steps) for state in states))
            return super().propose(states, n)

    deepest: list[int] = []
    tree_search([problem], Deepest(script), values, grader, SearchConfig(iterations=2, depth=2, max_steps=2))
    assert max(deepest) == 1
    (tree,) = tree_search([problem], Deepest(script), values, grader, SearchConfig(iterations=2, depth=1, max_steps=5))
    assert max(deepest) == 4
    assert len(tree.decisions) == 5
    assert tree.last.correct is None, "unfinished"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "iterations=0"),
        ({"root_factor": 0}, "root_factor=0"),
        ({"actions": 1}, "actions=1: must be at least 2"),
        ({"depth": 9, "max_steps": 8}, "below the look-ahead"),
        ({"gamma": 1.5}, "gamma=1.5"),
        ({"exploration": -1.0}, "exploration=-1.0"),
        ({"outcome": float("nan")}, "outcome=nan"),
        ({"damp_after": -1}, "damp_after=-1"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SearchConfig(**change)


def test_a_problem_without_answer(scripted: Any, known_tree: Any, known_values: Any, grader: Any) -> None:
    with pytest.raises(DataError, match=r"p9.*no answer"):
        tree_search([Problem(0, {"id": "p9", "prompt": "?"}, (1,))], scripted(known_tree), known_values, grader, HAND)
