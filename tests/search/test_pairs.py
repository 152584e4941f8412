"""Pairs from searched trees: which sides, merged chains, visit counts, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest

from stepkd.data.rows import STEP_PREFERENCE, validate
from stepkd.errors import ConfigError
from stepkd.search.mcts import Reference, TreeConfig
from stepkd.search.mcts import tree_search as search
from stepkd.search.state import START, Problem, Step
from stepkd.search.tree import Decision, Node, Option, PairConfig, SearchTree, best_child, tree_pairs


def grow(parent: Node, text: str, q: float, visits: int, *, end: str = "step", correct: bool | None = None) -> Node:
    """Add a child with given numbers; its one token is the text's length."""
    node = Node(Step(text, (len(text),), -1.0, end, len(parent.children)), parent)  # type: ignore[arg-type]
    node.q, node.visits, node.correct = q, visits, correct
    parent.children.append(node)
    return node


def decide(problem: Problem, root: Node) -> SearchTree:
    """The tree whose chosen path follows the best children."""
    tree, node = SearchTree(problem), root
    tree.root = root
    while node.children:
        options = tuple(Option(child, child.q, child.visits) for child in node.children)
        tree.decisions.append(Decision(node, options, best_child(node)))
        node = tree.decisions[-1].chosen
    return tree


@pytest.fixture
def chained(problem: Problem) -> SearchTree:
    """Two openings; the better one is followed by a single step, then by three answers."""
    root = Node(START, None)
    good = grow(root, "a\n", 0.7, 9)
    bad = grow(root, "bb\n", -0.2, 3)
    grow(bad, "only\n", -0.3, 2)
    middle = grow(good, "ccc\n", 0.6, 8)
    grow(middle, "#### 1", 1.5, 5, end="stop", correct=True)
    grow(middle, "#### 22", -1.0, 1, end="stop", correct=False)
    grow(middle, "#### 333", 0.1, 2, end="stop", correct=False)
    return decide(problem, root)


def test_chains_are_one_action(chained: SearchTree) -> None:
    found = tree_pairs(chained, provenance={"builder": "tree"})
    assert found.dropped == {}
    first, second = found.rows
    assert (first["prefix"], first["prefix_ids"]) == ([], [])
    assert (first["chosen"], first["chosen_ids"], first["chosen_visits"]) == ("a\nccc\n", [2, 4], 9)
    assert (first["rejected"], first["rejected_ids"], first["rejected_visits"]) == ("bb\nonly\n", [3, 5], 3)
    assert (second["prefix"], second["prefix_ids"]) == (["a\n", "ccc\n"], [2, 4])
    assert (second["chosen"], second["chosen_ids"], second["chosen_visits"]) == ("#### 1", [6], 5)
    assert (second["rejected"], second["rejected_visits"]) == ("#### 22", 1)
    assert [row["id"] for row in found.rows] == ["p/0", "p/2"]
    for row in found.rows:
        validate(row, STEP_PREFERENCE, extra="keep")
        assert (row["problem_id"], row["prompt"], row["answer"]) == ("p", "?", "1")
        assert row["pairing"] == {"builder": "tree"}
    assert first["pair_facts"] == {
        "siblings": 2, "chosen_value": 0.7, "rejected_value": -0.2, "chosen_steps": 2, "rejected_steps": 2
    }  # fmt: skip
    assert second["pair_facts"]["siblings"] == 3


def test_most_pairs_of_a_problem(chained: SearchTree) -> None:
    one = tree_pairs(chained, PairConfig(max_pairs=1))
    assert [row["id"] for row in one.rows] == ["p/0"]
    assert one.dropped == {"over_limit": 1}
    assert "pairing" not in one.rows[0]


def test_a_single_opening_is_no_choice(problem: Problem) -> None:
    root = Node(START, None)
    only = grow(root, "a\n", 0.5, 4)
    grow(only, "#### 1", 1.0, 3, end="stop", correct=True)
    grow(only, "#### 2", -1.0, 1, end="stop", correct=False)
    found = tree_pairs(decide(problem, root))
    assert [row["prefix"] for row in found.rows] == [["a\n"]]
    assert found.dropped == {"no_sibling": 1}


@pytest.mark.parametrize(
    ("better", "worse", "end", "reason"),
    [
        (("#### 1", 0.1 + 0.2), ("#### 2", 0.3), "stop", "equal_values"),
        (("#### 1", 1.0), ("#### 1", -1.0), "stop", "same_text"),
        (("", 1.0), ("#### 2", -1.0), "stop", "blank_step"),
        (("#### 1", 1.0), (" \n", -1.0), "stop", "blank_step"),
        (("#### 1 and then", 1.0), ("#### 2", -1.0), "length", "cut_off"),
    ],
)
def test_what_is_left_out(problem: Problem, better: Any, worse: Any, end: str, reason: str) -> None:
    root = Node(START, None)
    grow(root, *better, 3, end=end, correct=True)
    grow(root, *worse, 2, end="length", correct=False)
    found = tree_pairs(decide(problem, root))
    assert (found.rows, found.dropped) == ((), {reason: 1})


def test_unsolved_and_empty_trees(problem: Problem) -> None:
    root = Node(START, None)
    grow(root, "#### 2", 0.3, 3, end="stop", correct=False)
    grow(root, "#### 3", 0.1, 2, end="stop", correct=False)
    tree = decide(problem, root)
    assert tree_pairs(tree).dropped == {"unsolved_tree": 1}
    assert len(tree_pairs(tree, PairConfig(require="none")).rows) == 1
    assert tree_pairs(SearchTree(problem)).dropped == {"no_steps": 1}


def test_the_chosen_path_may_have_to_be_correct(problem: Problem) -> None:
    """The better-looking path is incorrect, and a correct solution stands beside it."""
    root = Node(START, None)
    grow(root, "#### 2", 0.9, 3, end="stop", correct=False)
    grow(root, "#### 1", 0.1, 1, end="stop", correct=True)
    tree = decide(problem, root)
    assert len(tree_pairs(tree).rows) == 1
    strict = tree_pairs(tree, PairConfig(require="path"))
    assert (strict.rows, strict.dropped) == ((), {"incorrect_path": 1})
    root.children[0].q = 0.05
    assert len(tree_pairs(decide(problem, root), PairConfig(require="path")).rows) == 1


def test_the_better_side_is_that_of_the_highest_q_whatever_was_chosen(problem: Problem) -> None:
    """As in the released code: a choice by visits goes its way, and the sides of a pair are the best and the worst."""
    root = Node(START, None)
    grow(root, "a\n", 0.3, 9)
    grow(root, "b\n", 0.7, 2)
    grow(root, "c\n", 0.1, 1)
    below = grow(root.children[0], "#### 1", 1.0, 5, end="stop", correct=True)
    grow(root.children[0], "#### 2", -1.0, 3, end="stop", correct=False)
    tree, node = SearchTree(problem), root
    tree.root = root
    while node.children:
        options = tuple(Option(child, child.q, child.visits) for child in node.children)
        tree.decisions.append(Decision(node, options, best_child(node, "visits")))
        node = tree.decisions[-1].chosen
    assert tree.last is below
    rows = tree_pairs(tree).rows
    assert [(row["prefix"], row["chosen"], row["rejected"]) for row in rows] == [
        ([], "b\n", "c\n"),
        (["a\n"], "#### 1", "#### 2"),
    ]


def test_visits_are_those_of_the_decision(
    scripted: Any, known_tree: Any, known_values: Any, grader: Any, problem: Problem
) -> None:
    """The tree worked out by hand in test_mcts: walk 5 raises N(a) to 4 after a was chosen with 3."""
    settings = TreeConfig(iterations=1, root_factor=4, depth=2, exploration=4.0)
    (tree,) = search([problem], scripted(known_tree), known_values.values, settings, Reference(grader))
    rows = tree_pairs(tree).rows
    assert [(r["chosen"], r["chosen_visits"], r["rejected"], r["rejected_visits"]) for r in rows] == [
        ("a\n", 3, "b\n", 1),
        ("#### 1", 3, "#### 2", 1),
    ]
    assert rows[0]["pair_facts"]["chosen_value"] == pytest.approx(1.275)


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="max_pairs=0"):
        PairConfig(max_pairs=0)
