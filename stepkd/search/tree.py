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

from stepkd.errors import ConfigError
from stepkd.search.state import Problem, State, Step

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
    correct: bool | None = None
    """Whether the finished solution is correct; None: it goes on."""
    depth: int = 0
    """Steps from the root."""
    copies: int = 1
    """How many of the samples said the same."""
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
        state = reduce(State.then, (node.step for node in self.path()), State(problem))
        return replace(state, correct=self.correct)


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


def best_child(node: Node) -> Node:
    """The child with the highest Q; of equals the most visited, of those the first."""
    return max(node.children, key=lambda child: (child.q, child.visits))


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
