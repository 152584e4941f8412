"""Monte-Carlo tree search over steps, for many problems at once; and step preference pairs from a searched tree.

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

Pairs are taken at every depth of the chosen path. At every decision the siblings are ranked by Q (equal ones by
visits): the better side is the best, which is the one that was chosen; the worse side is the worst. A run of steps of
which each is its parent's only child is one action, and its texts and ids are joined.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stepkd.errors import ConfigError, DataError, check_bounds
from stepkd.grading.pool import Grader
from stepkd.search.state import START, Problem, StateValue, Step, StepGenerator
from stepkd.search.tree import Node, back_up, best_child, select


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
    """Depth, at least 0, against solutions that go on and on: a step's estimate is divided by how much deeper than this
    the step before it is (the released code has 3); the default does not divide them."""

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
            yield node  # the caller adds its children, where there are any
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
        [node.state(tree.problem).text for tree, node in over],
        [str(tree.problem.row["answer"]) for tree, _ in over],
        rows=[tree.problem.row for tree, _ in over],
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


# --- pairs ------------------------------------------------------------------------------------------------------------

_ROUNDING = 1e-9
"""Values that differ by less are equal: sums of the same numbers in another order."""


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """Which pairs a tree gives."""

    max_pairs: int = 8
    """Most pairs of a problem, the first ones along the path, at least 1; the released code's number."""
    solved_only: bool = True
    """Take pairs only from trees with a correct solution: elsewhere nothing but estimates tells the sides apart."""

    def __post_init__(self) -> None:
        check_bounds("pairs.", self, max_pairs="[1, inf)")


@dataclass(frozen=True)
class FoundPairs:
    """What one tree gave."""

    rows: tuple[dict[str, Any], ...]
    """Step preference rows, by depth."""
    dropped: Mapping[str, int]
    """What was left out, by reason: ``unsolved_tree`` and ``no_steps`` (the whole tree), ``no_sibling``,
    ``equal_values``, ``same_text``, ``blank_step`` (the solution ends without another word), ``cut_off`` (the better
    side, whatever its answer), ``over_limit``."""


def tree_pairs(
    tree: SearchTree,
    settings: PairConfig | None = None,
    *,
    columns: Sequence[str] = ("answer",),
    provenance: Mapping[str, Any] | None = None,
) -> FoundPairs:
    """Pairs of a searched tree.

    Args:
        tree: after :func:`tree_search`.
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
    if settings.solved_only and not tree.solved:
        return FoundPairs((), {"unsolved_tree": 1})
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
    problem, prefix = tree.problem, decision.node.state(tree.problem)
    chosen, rejected = action(better.node), action(worse.node)
    name = str(problem.row.get("id", problem.index))
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
