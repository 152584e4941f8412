"""What search works with: states, steps and the protocols that give and judge them; the tree of them, in pure Python.

Nodes, priors, PUCT selection and backup; the same input gives the same tree. Source: Xie et al. 2024, arXiv 2405.00451,
and its released code:

* prior of an action of L tokens: ``p = exp(sum log pi / L^1.25)``
* selection: the child with the highest ``Q + c * p * sqrt(N_parent) / (1 + N)``
* reward of a step: ``r = value - parent's value``
* backup: ``Q = r + gamma * V`` with ``V = sum max(1, N) * Q / sum max(1, N)`` over the node's children.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

End = Literal["step", "stop", "length"]
"""How a step ends: the solution goes on (``step``), is over (``stop``: end token or stop string), or was cut off
(``length``: no room for more tokens)."""


@dataclass(frozen=True)
class Problem:
    """A problem to search solutions of."""

    index: int
    """Number of the problem in the whole run; keys everything that is drawn for it."""
    row: Mapping[str, Any]
    """Problem row: ``id``, ``prompt``, ``answer``; scorers may want ``solution``, ``task`` and ``meta``."""
    prompt_ids: tuple[int, ...]
    """Prompt as the generator reads it."""


@dataclass(frozen=True)
class State:
    """A solution so far."""

    problem: Problem
    """What is being solved."""
    steps: tuple[str, ...] = ()
    """Texts of the steps, separators included; joined they are the solution's text."""
    token_ids: tuple[int, ...] = ()
    """Sampled ids of all steps, without the prompt."""
    path: tuple[int, ...] = ()
    """Which of its siblings each step was when it was sampled: names the state within its problem, and keys what is
    drawn from it."""
    correct: bool | None = None
    """Whether the final answer is correct; None: the solution goes on."""

    @property
    def text(self) -> str:
        """The solution's text."""
        return "".join(self.steps)


@dataclass(frozen=True)
class Step:
    """What continues a state: its next step, or all the rest of the solution."""

    text: str
    """Text, separator included; blank where the solution ends at once."""
    token_ids: tuple[int, ...]
    """Sampled ids; an end token only where it ends the solution."""
    logprob: float
    """Sum of the tokens' log-probabilities under the model at temperature 1 (nats, <= 0)."""
    end: End
    """How it ends."""
    sample: int = 0
    """Which of the samples it was, from 0."""


START = Step("", (), 0.0, "step")
"""What leads to a tree's root."""


class StepGenerator(Protocol):
    """Continues states. What it gives for a state depends on the state alone, not on the others of a call."""

    def propose(self, states: Sequence[State], n: int) -> list[list[Step]]:
        """Draw ``n`` next steps of every state.

        Args:
            states: unfinished solutions, of any problems.
            n: steps per state, >= 1.

        Returns:
            For each state its steps by sample number; several may say the same.
        """
        ...

    def complete(self, states: Sequence[State], n: int) -> list[list[Step]]:
        """Draw ``n`` continuations of every state to the end of the solution.

        Args:
            states: unfinished solutions, of any problems.
            n: continuations per state, >= 1.

        Returns:
            For each state its continuations by sample number, each as one step.
        """
        ...

    def provenance(self) -> dict[str, Any]:
        """What the steps come from.

        Returns:
            JSON values: model, sampling settings, segmenter, seed.
        """
        ...


class StateValue(Protocol):
    """Estimates how good states are: by continuations, by a step scorer, or by the policy itself."""

    def values(self, states: Sequence[State]) -> list[float | None]:
        """Estimate states.

        Args:
            states: solutions of at least one step, finished ones (``correct`` is known) among them.

        Returns:
            For each a number in [0, 1], the higher the better; None: no estimate.
        """
        ...

    def provenance(self) -> dict[str, Any]:
        """What the values come from, as JSON values."""
        ...


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
        steps = [node.step for node in self.path()]
        return State(
            problem,
            tuple(step.text for step in steps),
            tuple(token for step in steps for token in step.token_ids),
            tuple(step.sample for step in steps),
            self.correct,
        )


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
