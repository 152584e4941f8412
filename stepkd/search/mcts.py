"""Monte-Carlo tree search over steps, for many problems at once.

A *walk* starts at the node that is to be decided, goes down by PUCT, gives every leaf it meets its children, and ends
where a solution ends or the look-ahead does; then it is backed up. After its walks the node's best child is taken, and
the search goes on from there, keeping the tree below, until a solution ends.

Every tree runs in a coroutine that stops where a node needs children. The leaves of all trees that have stopped are
expanded in one call of the generator, one of the grader and one of the value; no tree waits for another's walk.

Source: Xie et al. 2024, arXiv 2405.00451, and its released code. What differs from the code:

* a step is a line, the look-ahead is three lines, and nothing ends a solution early; there a step is a share of the
  whole solution, and the action at the last depth is forced to end it, so that nearly every walk meets an outcome;
* candidates are samples only; there the reference's own next step is among them by default;
* self-evaluation asks about every step and multiplies; there it is one question about the whole partial solution;
* estimates are not divided by depth (``damp_after``) and come from continuations unless told otherwise; there both are
  the other way round;
* the best child has the highest value; there it has the most visits, weighted by the gap between its children's;
* pairs need any right solution in the tree; there the chosen path must be right;
* equal actions are merged; there near-duplicates by their embeddings, too;
* a right solution is not worth more for differing from the reference;
* a walk visits the root once; there twice, and a node under expansion counts as unvisited.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from stepkd.errors import ConfigError, DataError, check_choice
from stepkd.grading.pool import Grader
from stepkd.search.tree import Node, Problem, StateValue, Step, StepGenerator, back_up, best_child, select

Until = Literal["end", "leaf"]


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How trees are searched. Walks, actions, depth and exploration are the paper's for mathematics; the module's text
    says what is not."""

    iterations: int = 64
    """Walks per decision, >= 1."""
    root_factor: int = 4
    """The first decision gets this many times the walks, >= 1."""
    actions: int = 2
    """Steps sampled at every node, >= 1; equal ones are merged."""
    root_actions: int | None = None
    """Steps sampled at the root; None: as everywhere."""
    depth: int = 3
    """Look-ahead in steps from the node that is decided, >= 1."""
    max_steps: int = 32
    """Longest solution in steps, >= ``depth``; one that is longer stays unfinished."""
    until: Until = "end"
    """Where a walk ends: at the end of a solution or of the look-ahead (``end``), or at the first node that had no
    children yet (``leaf``), which costs one expansion per walk."""
    exploration: float = 1.0
    """c of PUCT, >= 0."""
    gamma: float = 1.0
    """Discount of what follows a step, in [0, 1]."""
    outcome: float = 1.0
    """What a right solution's end adds to its value, and a wrong one's takes away, >= 0."""
    damp_after: int | None = None
    """Estimates are divided by ``max(1, depth of the parent - damp_after)``, against solutions that go on and on (the
    released code: 3); None: they are not."""

    def __post_init__(self) -> None:
        check_choice("until", self.until, get_args(Until))
        for name in ("iterations", "root_factor", "actions", "root_actions", "depth"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{name}={number}: must be at least 1")
        if self.max_steps < self.depth:
            raise ConfigError(f"max_steps={self.max_steps} is below the look-ahead, depth={self.depth}")
        if max(self.actions, self.root_actions or 0) < 2:
            raise ConfigError("with one action everywhere there is nothing to choose from: actions must be at least 2")
        if self.damp_after is not None and self.damp_after < 0:
            raise ConfigError(f"damp_after={self.damp_after}: must be 0 or more, or null")
        if not 0 <= self.gamma <= 1:
            raise ConfigError(f"gamma={self.gamma}: must lie in [0, 1]")
        for name in ("exploration", "outcome"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)}: must be 0 or more, and finite")


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
    root: Node = field(default_factory=lambda: Node(None, None))
    decisions: list[Decision] = field(default_factory=list)
    """The chosen path, from the root on."""

    @property
    def solved(self) -> bool:
        """Whether the tree holds a right solution."""
        return any(node.correct for node in self.root.subtree())

    @property
    def last(self) -> Node:
        """Where the chosen path ends."""
        return self.decisions[-1].chosen if self.decisions else self.root


def tree_search(
    problems: Sequence[Problem],
    generator: StepGenerator,
    value: StateValue,
    grader: Grader,
    settings: SearchConfig,
) -> list[SearchTree]:
    """Search a tree for each problem.

    Args:
        problems: problems with an ``answer`` each.
        generator: proposes steps.
        value: estimates states, in [0, 1].
        grader: compares the final answers of finished solutions with the problem's.
        settings: see :class:`SearchConfig`.

    Returns:
        One tree per problem, in order; a tree does not depend on the others.

    Raises:
        DataError: a problem without an answer.
    """
    for problem in problems:
        if problem.row.get("answer") in (None, ""):
            raise DataError(
                "the problem has no answer to grade solutions by",
                path=str(problem.row.get("id", problem.index)),
                column="answer",
            )
    trees = [SearchTree(problem) for problem in problems]
    walks = [_decide_all(tree, settings) for tree in trees]
    expand = _Expansion(generator, value, grader, settings)
    going = list(range(len(trees)))
    while going:
        stopped = [(i, leaf) for i in going if (leaf := next(walks[i], None)) is not None]
        if stopped:
            expand([(trees[i], leaf) for i, leaf in stopped])
        going = [i for i, _ in stopped]
    return trees


def _decide_all(tree: SearchTree, settings: SearchConfig) -> Iterator[Node]:
    """Decide step after step; yields the nodes that need children and goes on when they have them."""
    node, walks = tree.root, settings.iterations * settings.root_factor
    while not node.terminal and node.depth < settings.max_steps:
        for _ in range(walks):
            yield from _walk(node, settings)
        if not node.children:
            return
        options = tuple(Option(child, child.q, child.visits) for child in node.children)
        tree.decisions.append(Decision(node, options, best_child(node)))
        node, walks = tree.decisions[-1].chosen, settings.iterations


def _walk(start: Node, settings: SearchConfig) -> Iterator[Node]:
    """One walk with its backup; yields the leaves it meets."""
    path = [start]
    limit = min(start.depth + settings.depth, settings.max_steps)
    while True:
        node = path[-1]
        node.visits += 1
        if node.terminal or node.depth >= limit:
            break
        leaf = not node.children
        if leaf:
            yield node
        if not node.children:
            break
        path.append(select(node, settings.exploration))
        if leaf and settings.until == "leaf":
            path[-1].visits += 1
            break
    back_up(path, settings.gamma)


@dataclass
class _Expansion:
    """Gives nodes their children."""

    generator: StepGenerator
    value: StateValue
    grader: Grader
    settings: SearchConfig

    def __call__(self, leaves: Sequence[tuple[SearchTree, Node]]) -> None:
        """Expand leaves, at most one of each tree."""
        everywhere = self.settings.actions
        by_actions: dict[int, list[tuple[SearchTree, Node]]] = {}
        for tree, leaf in leaves:
            actions = everywhere if leaf.depth else self.settings.root_actions or everywhere
            by_actions.setdefault(actions, []).append((tree, leaf))
        for actions, group in sorted(by_actions.items(), key=lambda item: item[0]):
            proposed = self.generator.propose([leaf.state(tree.problem) for tree, leaf in group], actions)
            for (_, leaf), steps in zip(group, proposed, strict=True):
                leaf.children = _merged(leaf, steps)
        self._evaluate([(tree, child) for tree, leaf in leaves for child in leaf.children])

    def _evaluate(self, new: Sequence[tuple[SearchTree, Node]]) -> None:
        over = [(tree, node) for tree, node in new if node.terminal]
        grades = self.grader.grade(
            [node.state(tree.problem).text for tree, node in over],
            [str(tree.problem.row["answer"]) for tree, _ in over],
        )
        for (_, node), grade in zip(over, grades, strict=True):
            node.correct = grade.verdict == "correct"
        estimates = self.value.values([node.state(tree.problem) for tree, node in new]) if new else []
        for (_, node), estimate in zip(new, estimates, strict=True):
            assert node.parent is not None
            # Without an estimate the step neither gains nor loses.
            after = self.settings.damp_after
            damping = 1 if after is None else max(node.parent.depth - after, 1)
            node.value = node.parent.value if estimate is None else estimate / damping
            if node.correct is not None:
                node.value += self.settings.outcome * (1 if node.correct else -1)
            node.q = node.reward


def _merged(parent: Node, steps: Sequence[Step]) -> list[Node]:
    """Children of a node; of steps that say the same and end alike only the first."""
    children: dict[tuple[str, bool], Node] = {}
    for step in steps:
        key = (step.text, step.end == "step")
        if key in children:
            children[key].copies += 1
        else:
            children[key] = Node(step, parent)
    return list(children.values())
