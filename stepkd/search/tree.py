"""The tree of states, in pure Python: nodes, priors, PUCT selection and backup; the same input gives the same tree.

Source: Xie et al. 2024, arXiv 2405.00451, and its released code:

* prior of an action of L tokens: ``p = exp(sum log pi / L^1.25)``
* selection: the child with the highest ``Q + c * p * sqrt(N_parent) / (1 + N)``
* reward of a step: ``r = value - parent's value``
* backup: ``Q = r + gamma * V`` with ``V = sum max(1, N) * Q / sum max(1, N)`` over the node's children.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Literal

from stepkd.errors import ConfigError
from stepkd.search.state import START, Problem, State, Step

LENGTH_POWER = 1.25
"""Exponent of the token count in the prior; 1 would be the geometric mean of the tokens' probabilities."""


@dataclass(eq=False)
class Node:
    """A state in the tree, and the step that led to it."""

    step: Step
    """The action; `START` at the root."""
    parent: Node | None
    """Where the action was taken; None at the root."""
    value: float = 0.0
    """How good the state is, by estimate and outcome; the root's is 0."""
    score: float | None = None
    """What was estimated of it, in [0, 1]; None: nothing."""
    correct: bool | None = None
    """Whether the finished solution is correct; None: it goes on."""
    depth: int = 0
    """Steps from the root."""
    whole: State | None = None
    """The solution up to here, where the action has several steps: a forced end."""
    children: list[Node] = field(default_factory=list)
    """Next steps, in the order in which they were sampled."""
    visits: int = 0
    """N: how many walks came by."""
    v: float = 0.0
    """V: mean of the children's Q by visits; 0 without children."""
    q: float = 0.0
    """Q: reward of the step and what follows."""

    def __post_init__(self) -> None:
        if self.parent is not None:
            self.depth = self.parent.depth + 1
        self.q = self.reward

    @property
    def reward(self) -> float:
        """r: what the step added to the value."""
        return self.value - (0.0 if self.parent is None else self.parent.value)

    @property
    def terminal(self) -> bool:
        """Whether the solution is over here."""
        return self.step.end != "step"

    @property
    def prior(self) -> float:
        """p: how likely the model is to take the step, by a length-normalised probability in (0, 1]."""
        if self.step.logprob is None:
            raise ConfigError(
                "a tree weighs steps by the model's own log-probabilities, which this engine has at temperature 1 "
                "without top-p and top-k only: take these, or --engine Transformers"
            )
        return math.exp(self.step.logprob / len(self.step.token_ids) ** LENGTH_POWER)

    def path(self) -> list[Node]:
        """The nodes from the root (left out) to this one."""
        nodes = [self]
        while (parent := nodes[-1].parent) is not None:
            nodes.append(parent)
        return nodes[-2::-1]

    def subtree(self) -> Iterator[Node]:
        """This node and all below it, parents first."""
        waiting = [self]
        while waiting:
            yield (node := waiting.pop())
            waiting.extend(reversed(node.children))

    def state(self, problem: Problem) -> State:
        """The solution so far."""
        state = self.whole or reduce(State.then, (node.step for node in self.path()), State(problem))
        return replace(state, correct=self.correct)


@dataclass(frozen=True)
class Option:
    """A child at the time of the decision; later walks change its visits."""

    node: Node
    q: float
    visits: int


@dataclass(frozen=True)
class Decision:
    """A step that was chosen, and what there was to choose from."""

    node: Node
    """Where the choice was made."""
    options: tuple[Option, ...]
    """Its children then, in the order in which they were sampled; at least one."""
    chosen: Node
    """The best of them."""


@dataclass(eq=False)
class SearchTree:
    """One problem's tree."""

    problem: Problem
    root: Node = field(default_factory=lambda: Node(START, None))
    decisions: list[Decision] = field(default_factory=list)
    """The chosen path, from the root on."""

    @property
    def solved(self) -> bool:
        """Whether the tree holds a correct solution."""
        return any(node.correct for node in self.root.subtree())

    @property
    def last(self) -> Node:
        """Where the chosen path ends."""
        return self.decisions[-1].chosen if self.decisions else self.root


def puct(node: Node, exploration: float) -> float:
    """What a child is selected by: ``Q + c * p * sqrt(N_parent) / (1 + N)``.

    Args:
        node: a child.
        exploration: c, >= 0.
    """
    assert node.parent is not None, "the root has no rivals"
    return node.q + exploration * node.prior * math.sqrt(node.parent.visits) / (1 + node.visits)


def select(node: Node, exploration: float) -> Node:
    """The child to walk on to; of equals the first.

    Args:
        node: a node with children.
        exploration: c, >= 0.
    """
    return max(node.children, key=lambda child: puct(child, exploration))


def best_child(node: Node, choose: Literal["value", "visits"] = "value", *, scored: bool = False) -> Node:
    """The child that a decision takes; of equals the first.

    Args:
        node: a node with children.
        choose: ``value``: the highest Q, of equals the highest value, then the most visited. ``visits``: the highest
            ``N * (1 + gap)``, of equals the highest Q, then V; the gap is that between the most and the least visited
            of the child's own children, as in the released code of arXiv 2405.00451 at temperature 0.
        scored: whether a child without a score is taken only where all are.
    """

    def rank(child: Node) -> tuple[float, float, float]:
        if choose == "visits":
            visits = [each.visits for each in child.children] or [0]
            return child.visits * (1 + max(visits) - min(visits)), child.q, child.v
        # Under an exact checker a correct step to a dead end has the Q of an incorrect one.
        return child.q, child.value, child.visits

    rivals = [child for child in node.children if child.score is not None] if scored else []
    return max(rivals or node.children, key=rank)


def back_up(path: Sequence[Node], gamma: float) -> None:
    """Renew V and Q along a walk, from its end to its start.

    The start, whose own step has been decided on (or which is the root), keeps its Q.

    Args:
        path: the nodes of the walk, the start first; each the parent of the next.
        gamma: discount of what follows, in [0, 1].
    """
    for node in reversed(path):
        if node.children:
            weights = [max(1, child.visits) for child in node.children]
            values = [weight * child.q for weight, child in zip(weights, node.children, strict=True)]
            node.v = math.fsum(values) / sum(weights)
        if node is not path[0]:
            node.q = node.reward + gamma * node.v
