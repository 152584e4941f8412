"""The tree of states, in pure Python: nodes, priors, PUCT selection and backup; the same input gives the same tree.

Source: Xie et al. 2024, arXiv 2405.00451, and its released code:

* prior of an action of L tokens: ``p = exp(sum log pi / L^1.25)``
* selection: the child with the highest ``Q + c * p * sqrt(N_parent) / (1 + N)``
* reward of a step: ``r = value - parent's value``
* backup: ``Q = r + gamma * V`` with ``V = sum max(1, N) * Q / sum max(1, N)`` over the node's children.

Step preference pairs (:func:`tree_pairs`) are taken at every depth of the chosen path. At every decision the siblings
are ranked by Q (equal ones by visits): the better side is the best, the worse side the worst. A run of steps of which
each is its parent's only child is one action, and its texts and ids are joined.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stepkd.errors import check_bounds
from stepkd.search.state import START, Problem, State, Step, no_logprobs

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
    """Whether the finished solution is correct; None: it is unfinished."""
    depth: int = 0
    """Steps from the root."""
    state: State = field(default_factory=lambda: State(Problem(0, {}, ())))
    """The solution so far; its last action may have several steps."""
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
            self.depth, self.state = self.parent.depth + 1, self.parent.state.then(self.step)
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
            raise no_logprobs("tree search")
        return math.exp(self.step.logprob / len(self.step.token_ids) ** LENGTH_POWER)

    def subtree(self) -> Iterator[Node]:
        """This node and all below it, parents first."""
        waiting = [self]
        while waiting:
            yield (node := waiting.pop())
            waiting.extend(reversed(node.children))


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
    root: Node = field(init=False)
    decisions: list[Decision] = field(default_factory=list)
    """The chosen path, from the root on."""

    def __post_init__(self) -> None:
        self.root = Node(START, None, state=State(self.problem))

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


# --- step preference pairs --------------------------------------------------------------------------------------------

_ROUNDING = 1e-9
"""Values that differ by less are equal: sums of the same numbers in another order."""


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """Which pairs a tree gives."""

    max_pairs: int = 8
    """Most pairs of a problem, the first ones along the path, at least 1; the released code's number."""
    require: Literal["path", "tree", "none"] = "tree"
    """What must be correct for a tree to give pairs: the solution at the end of its chosen path (the released code's
    filter), any solution in it, or none; without one nothing but estimates tells the sides apart."""

    def __post_init__(self) -> None:
        check_bounds("pairs.", self, max_pairs="[1, inf)")


@dataclass(frozen=True)
class FoundPairs:
    """What one tree gave."""

    rows: tuple[dict[str, Any], ...]
    """Step preference rows, by depth."""
    dropped: Mapping[str, int]
    """What was left out, by reason: ``unsolved_tree``, ``incorrect_path`` and ``no_steps`` (the whole tree),
    ``no_sibling``, ``equal_values``, ``same_text``, ``blank_step`` (the solution ends without another word),
    ``cut_off`` (the better side, whatever its answer), ``over_limit``."""


def tree_pairs(
    tree: SearchTree,
    settings: PairConfig | None = None,
    *,
    columns: Sequence[str] = ("answer",),
    provenance: Mapping[str, Any] | None = None,
) -> FoundPairs:
    """Pairs of a searched tree.

    Args:
        tree: after :func:`~stepkd.search.mcts.tree_search`.
        settings: which pairs; None: the defaults.
        columns: columns of the problem that the rows keep.
        provenance: where the pairs come from, for the column ``pairing``; None: no such column.

    Returns:
        The rows, and what was left out. The column ``pair_facts`` holds values, siblings, and steps of each side.
    """
    settings = settings or PairConfig()
    dropped: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    if not tree.decisions:
        return FoundPairs((), {"no_steps": 1})
    if settings.require != "none" and not tree.solved:
        return FoundPairs((), {"unsolved_tree": 1})
    if settings.require == "path" and not tree.last.correct:
        return FoundPairs((), {"incorrect_path": 1})
    for decision in _choices(tree.decisions):
        found = _pair(decision)
        if isinstance(found, str):
            dropped[found] += 1
        elif len(rows) == settings.max_pairs:
            dropped["over_limit"] += 1
        else:
            row = _row(tree, decision, *found)
            row |= {name: tree.problem.row[name] for name in columns if tree.problem.row.get(name) is not None}
            if provenance is not None:
                row["pairing"] = dict(provenance)
            rows.append(row)
    return FoundPairs(tuple(rows), dict(sorted(dropped.items())))


def action(node: Node) -> list[Node]:
    """A step, and those that follow it without an alternative: together they are one action.

    Args:
        node: the first step of the action.

    Returns:
        The nodes of the action, in order, this one first.
    """
    nodes = [node]
    while len(nodes[-1].children) == 1:
        nodes.append(nodes[-1].children[0])
    return nodes


def _choices(decisions: Sequence[Decision]) -> Iterator[Decision]:
    """The decisions, without those inside of an action."""
    inside: set[int] = set()
    for decision in decisions:
        if id(decision.chosen) not in inside:
            yield decision
        inside.update(id(node) for node in action(decision.chosen))


def _pair(decision: Decision) -> tuple[Option, Option] | str:
    """The two sides, or why there are none."""
    ranked = sorted(decision.options, key=lambda option: (-option.q, -option.visits))
    if len(ranked) < 2:
        return "no_sibling"
    better, worse = ranked[0], ranked[-1]
    if better.q - worse.q <= _ROUNDING:
        return "equal_values"
    sides = [action(option.node) for option in (better, worse)]
    last, texts = sides[0][-1].step, [_text(side) for side in sides]
    if last.end == "length":
        return "cut_off"
    if not all(text.strip() for text in texts):
        return "blank_step"
    return "same_text" if texts[0] == texts[1] else (better, worse)


def _row(tree: SearchTree, decision: Decision, better: Option, worse: Option) -> dict[str, Any]:
    problem, prefix = tree.problem, decision.node.state
    chosen, rejected = action(better.node), action(worse.node)
    name = problem.id
    return {
        "id": f"{name}/{decision.node.depth}",
        "problem_id": name,
        "prompt": problem.row["prompt"],
        "prefix": list(prefix.steps),
        "prefix_ids": list(prefix.token_ids),
        "chosen": _text(chosen),
        "chosen_ids": _ids(chosen),
        "chosen_visits": better.visits,
        "rejected": _text(rejected),
        "rejected_ids": _ids(rejected),
        "rejected_visits": worse.visits,
        "pair_facts": {
            "siblings": len(decision.options),
            "chosen_value": better.q,
            "rejected_value": worse.q,
            "chosen_steps": len(chosen),
            "rejected_steps": len(rejected),
        },
    }


def _text(nodes: Sequence[Node]) -> str:
    return "".join(node.step.text for node in nodes)


def _ids(nodes: Sequence[Node]) -> list[int]:
    return [token for node in nodes for token in node.step.token_ids]
