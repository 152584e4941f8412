"""Priors, PUCT, choice and backup against numbers worked out by hand."""

from __future__ import annotations

import math
import random

import pytest

from stepkd.search.state import START, Step
from stepkd.search.tree import Node, back_up, best_child, puct, select


def child(parent: Node, value: float, *, logprob: float = 0.0, tokens: int = 1, visits: int = 0) -> Node:
    node = Node(Step(f"{len(parent.children)}\n", tuple(range(tokens)), logprob, "step", len(parent.children)), parent)
    node.value, node.visits = value, visits
    node.q = node.reward
    parent.children.append(node)
    return node


def test_prior() -> None:
    for logprob, tokens, expected in ((math.log(0.5), 1, 0.5), (-6.0, 16, math.exp(-6 / 32)), (0.0, 5, 1.0)):
        node = Node(Step("a", (7,) * tokens, logprob, "step"), None)  # 16^1.25 = 32
        assert node.prior == pytest.approx(expected)


def test_puct() -> None:
    root = Node(START, None)
    root.visits = 9
    node = child(root, 0.2, logprob=math.log(0.5), visits=2)
    assert puct(node, 2.0) == pytest.approx(0.2 + 2 * 0.5 * 3 / 3)
    assert puct(node, 0.0) == pytest.approx(0.2)


def test_select_and_best_child() -> None:
    root = Node(START, None)
    root.visits = 4
    likely, good, twin = (child(root, q, logprob=math.log(p)) for q, p in ((0.1, 0.9), (0.5, 0.1), (0.5, 0.1)))
    assert select(root, 0.0) is good, "of equals the first"
    assert select(root, 1.0) is likely  # 0.1 + 0.9 * 2 against 0.5 + 0.1 * 2
    assert best_child(root) is good
    twin.visits = 1
    assert best_child(root) is twin, "of equals the most visited"


def test_best_child_of_equal_q_has_the_higher_value() -> None:
    """A correct step (1) whose only next step is incorrect (0) against an incorrect one: both have Q 0."""
    root = Node(START, None)
    correct, incorrect = child(root, 1.0, visits=1), child(root, 0.0, visits=5)
    back_up([root, correct, child(correct, 0.0)], gamma=1.0)
    assert (correct.q, incorrect.q) == (0.0, 0.0)
    assert best_child(root) is correct
    assert best_child(Node(START, None, children=[incorrect, correct])) is correct


def test_best_child_by_visits_weighs_by_the_gap_below() -> None:
    """N * (1 + gap): 4 * (1 + 0), 3 * (1 + 2) and 9 * 1 without children; of equals the higher Q, then the higher V."""
    root = Node(START, None)
    even, torn, bare = (child(root, q, visits=n) for q, n in ((0.9, 4), (0.1, 3), (0.2, 9)))
    for parent, visits in ((even, (2, 2)), (torn, (2, 0))):
        for n in visits:
            child(parent, 0.0, visits=n)
    assert best_child(root) is even, "by Q"
    assert best_child(root, "visits") is bare, "9 and 9: the higher Q"
    torn.children[0].visits = 3
    assert best_child(root, "visits") is torn, "3 * 4"
    twins = [Node(bare.step, None, visits=2), Node(bare.step, None, visits=2, v=0.5)]
    assert best_child(Node(START, None, children=twins), "visits") is twins[1]


def test_back_up_by_hand() -> None:
    """Root, a with two children: V weighs by max(1, N), Q adds the reward, gamma discounts what follows."""
    root = Node(START, None)
    a = child(root, 0.5, visits=3)
    b = child(root, 0.8, visits=0)
    a1 = child(a, 1.5, visits=3)
    a2 = child(a, -0.5, visits=0)
    assert (a1.reward, a2.reward, a1.depth) == (1.0, -1.0, 2)
    back_up([root, a, a1], gamma=0.5)
    assert a1.q == pytest.approx(1.0)
    assert a.v == pytest.approx((3 * 1.0 + 1 * -1.0) / 4)
    assert a.q == pytest.approx(0.5 + 0.5 * 0.5)
    assert root.v == pytest.approx((3 * 0.75 + 1 * 0.8) / 4)
    assert (root.q, b.q) == (0.0, 0.8)
    # A start that is not the root keeps the Q that it was chosen by.
    a2.visits, kept = 5, a.q
    back_up([a, a2], gamma=0.5)
    assert a.q == kept
    assert a.v == pytest.approx((3 * 1.0 + 5 * -1.0) / 8)


def test_without_discount_q_is_the_mean_value_below_the_parent() -> None:
    """gamma 1: rewards telescope, so Q of a node is the mean of the leaves' values less its parent's value."""
    drawn = random.Random(3)
    root = Node(START, None)
    middle = child(root, drawn.random(), visits=6)
    leaves = [child(middle, drawn.random(), visits=n) for n in (1, 2, 3)]
    for leaf in leaves:
        back_up([root, middle, leaf], gamma=1.0)
    mean = sum(leaf.visits * leaf.value for leaf in leaves) / 6
    assert middle.q == pytest.approx(mean - root.value)


def test_a_tree_may_be_deeper_than_python_recurses() -> None:
    root = node = Node(START, None)
    for _ in range(2_000):
        node.children.append(Node(Step("a\n", (1,), 0.0, "step", 0), node))
        node = node.children[0]
    assert len(list(root.subtree())) == 2_001
    assert len(node.state.steps) == 2_000


def test_state_and_subtree() -> None:
    root = Node(START, None)
    a = child(root, 0.0, tokens=2)
    child(root, 0.0)
    a1 = child(a, 0.0, tokens=3)
    state = a1.state
    assert (state.steps, state.token_ids, state.path, state.text) == (("0\n", "0\n"), (0, 1, 0, 1, 2), (0, 0), "0\n0\n")
    assert [node.depth for node in root.subtree()] == [0, 1, 2, 1]
    assert not root.terminal
