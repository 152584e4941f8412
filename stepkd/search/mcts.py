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
* pairs need any correct solution in the tree; there the chosen path must be correct;
* equal actions are merged; there near-duplicates by their embeddings, too;
* a correct solution is not worth more for differing from the reference;
* a walk visits the root once; there twice, and a node under expansion counts as unvisited.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from stepkd.errors import ConfigError, DataError, check_bounds
from stepkd.grading.pool import Grader
from stepkd.search.tree import Node, Problem, StateValue, Step, StepGenerator, back_up, best_child, select


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How trees are searched. Walks, actions, depth and exploration are the paper's for mathematics; the module's text
    says what is not."""

    iterations: int = 64
    """Walks per decision, at least 1; the paper's number."""
    root_factor: int = 4
    """Factor on the walks of the first decision, at least 1; the paper's number."""
    actions: int = 2
    """Steps sampled at every node, at least 2, of which equal ones are merged; the paper's number."""
    depth: int = 3
    """Look-ahead in steps from the node that is decided, at least 1; the paper's number."""
    max_steps: int = 32
    """Longest solution in steps, not below depth, beyond which it stays unfinished; 32 is more than most have."""
    exploration: float = 1.0
    """Weight c of the exploration term of PUCT, at least 0; the paper's number."""
    gamma: float = 1.0
    """Discount of what follows a step, in [0, 1]; 1 lets all steps of a walk count alike."""
    outcome: float = 1.0
    """What a correct solution's end adds to its value, and an incorrect one's takes away, at least 0; 1 is the range of
    the estimates."""
    damp_after: int | None = None
    """Depth, at least 0, from which estimates are divided by the steps beyond it, against solutions that go on and on
    (the released code has 3); the default does not divide them."""

    def __post_init__(self) -> None:
        check_bounds(
            "search.",
            self,
            iterations="[1, inf)",
            root_factor="[1, inf)",
            actions="[2, inf)",
            depth="[1, inf)",
            exploration="[0, inf)",
            gamma="[0, 1]",
            outcome="[0, inf)",
            damp_after="[0, inf)",
        )
        if self.max_steps < self.depth:
            raise ConfigError(f"search.max_steps={self.max_steps} is below the look-ahead, search.depth={self.depth}")


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
        """Whether the tree holds a correct solution."""
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
    going = list(range(len(trees)))
    while going:
        stopped = [(i, leaf) for i in going if (leaf := next(walks[i], None)) is not None]
        if stopped:
            _expand([(trees[i], leaf) for i, leaf in stopped], generator, value, grader, settings)
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
        if not node.children:
            yield node
        if not node.children:
            break
        path.append(select(node, settings.exploration))
    back_up(path, settings.gamma)


def _expand(
    leaves: Sequence[tuple[SearchTree, Node]],
    generator: StepGenerator,
    value: StateValue,
    grader: Grader,
    settings: SearchConfig,
) -> None:
    """Give leaves, at most one of each tree, their children, and these their values."""
    proposed = generator.propose([leaf.state(tree.problem) for tree, leaf in leaves], settings.actions)
    for (_, leaf), steps in zip(leaves, proposed, strict=True):
        leaf.children = _merged(leaf, steps)
    new = [(tree, child) for tree, leaf in leaves for child in leaf.children]
    over = [(tree, node) for tree, node in new if node.terminal]
    grades = grader.grade(
        [node.state(tree.problem).text for tree, node in over], [str(tree.problem.row["answer"]) for tree, _ in over]
    )
    for (_, node), grade in zip(over, grades, strict=True):
        node.correct = grade.verdict == "correct"
    estimates = value.values([node.state(tree.problem) for tree, node in new]) if new else []
    for (_, node), estimate in zip(new, estimates, strict=True):
        assert node.parent is not None
        # Without an estimate the step neither gains nor loses.
        damping = 1 if settings.damp_after is None else max(node.parent.depth - settings.damp_after, 1)
        node.value = node.parent.value if estimate is None else estimate / damping
        if node.correct is not None:
            node.value += settings.outcome * (1 if node.correct else -1)
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
