"""Monte-Carlo tree search over steps, for many problems at once; an answer from a tree at test time (:class:`MCTS`).

A *walk* starts at the node that is to be decided, goes down by PUCT, gives every leaf it meets its children, and ends
where a solution ends or the look-ahead does; then it is backed up. After its walks the node's best child is taken, and
the search proceeds from there, keeping the tree below, until a solution ends.

Every tree runs in a coroutine that stops where a node needs children. The leaves of all trees that have stopped are
expanded in one call of the generator, one of the grader and one of the value; no tree waits for another's walk.

Source: Xie et al. 2024, arXiv 2405.00451, and its released code (YuxiXie/MCTS-DPO at fb23437, the script for
mathematics). How MCTS-DPO differs from that code, with the option that comes nearest to it, which
``recipes/mcts_dpo.yaml`` sets:

1. A step is one segment, by default a line. There it is as many lines as fit half of the reference solution's tokens,
   at most 128, so that nearly every walk of depth 3 meets an outcome; a state of three steps gets one action, to the
   end. ``search.force_end`` has that action too, and all walks lead to it; steps before it remain lines.
2. Candidates are samples only. There the next steps of the reference solution stand first among them, by default and in
   the script. ``search.gold_steps`` does the same: one step, not as many as fit, where no end is forced.
3. Self-evaluation asks about every step, Yes against No, and multiplies. There one question is about the whole partial
   solution, and the probability of "(B) correct" among all tokens counts. ``value.whole`` asks once, and takes that of
   Yes; the words are ours, and the first token answers, where the code looks for the answer among four.
4. Values come from continuations. There from self-evaluation: ``value: SelfEvaluation``.
5. Estimates are not divided by depth. There by depth less 3: ``search.damp_after: 3``.
6. The child of the highest Q is taken. There that of the most visits, weighted by the gap between its own children's:
   ``search.choose: visits``. The sides of a pair go by Q in both, so the better one need not be the chosen one.
7. Any correct solution in a tree lets it give pairs. There the chosen path must be correct: ``pairs.require: path``.
8. A walk visits every node on its way once. There its first node counts twice, and a node under expansion counts as
   unvisited, so that the first choice below it is by Q alone. No option has that.
9. The loss is a mean over pairs. There over those of one problem, then over 64 problems; no option has that. Weight
   decay 0.05 and warm-up 0.03 are the recipe's.

Beside these: equal actions are merged, there near-duplicates by their embeddings, too; a correct solution is not worth
more, there 1.25, for differing from the reference; siblings of equal value give no pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, Literal, TypeAlias

from stepkd.errors import ConfigError, DataError, check_bounds
from stepkd.grading.pool import Grader
from stepkd.scorers.scorer import Reduction
from stepkd.search.best_of_n import answered, elected
from stepkd.search.state import Found, Problem, Search, State, Step, StepGenerator, Tools, correct_ones, for_some
from stepkd.search.tree import Decision, Node, Option, SearchTree, back_up, best_child, select

Estimate: TypeAlias = Callable[[Sequence[State]], Sequence[float | None]]
"""How good states are, in [0, 1]; None: no estimate."""


@dataclass(frozen=True, kw_only=True)
class TreeConfig:
    """How trees are searched. Walks, actions, depth and exploration are MCTS-DPO's for mathematics (arXiv 2405.00451);
    the module's text says what is not."""

    iterations: int = 64
    """Walks per decision, at least 1; the paper's number."""
    root_factor: int = 4
    """Factor on the walks of the first decision, at least 1; the paper's number."""
    actions: int = 2
    """Steps sampled at every node, at least 2, of which equal ones are merged; the paper's number."""
    depth: int = 3
    """Look-ahead in steps from the node that is decided, at least 1; the paper's number."""
    force_end: bool = False
    """Whether all walks lead to an outcome: what follows a solution's first ``depth`` steps is drawn once, to the end,
    as one action, so that at most depth steps are decided one by one; false ends a walk with its look-ahead."""
    max_steps: int = 32
    """Longest solution in steps, not below depth, beyond which it stays unfinished; 32 is more than most have.
    With force_end it has no effect."""
    exploration: float = 1.0
    """Weight c of the exploration term of PUCT, at least 0; the paper's number."""
    gamma: float = 1.0
    """Discount of what follows a step, in [0, 1]; 1 lets all steps of a walk count alike."""
    damp_after: int | None = None
    """Depth, at least 0, against solutions without an end: a step's estimate is divided by how much deeper than this
    the step before it is (the released code has 3); the default does not divide them."""
    choose: Literal["value", "visits"] = "value"
    """Which child a decision takes: that of the highest Q (value), or that of the most visits, weighted by how much its
    own children's differ (visits, the released code's); by value a correct step wins wherever the scorer tells it."""

    def __post_init__(self) -> None:
        bounds = dict.fromkeys(("iterations", "root_factor", "depth"), "[1, inf)")
        bounds |= {"actions": "[2, inf)", "gamma": "[0, 1]"} | dict.fromkeys(("exploration", "damp_after"), "[0, inf)")
        check_bounds("", self, **bounds)
        if self.max_steps < self.depth:
            raise ConfigError(f"max_steps={self.max_steps} is below the look-ahead, depth={self.depth}")

    @property
    def deepest(self) -> int:
        """Depth beyond which nothing is searched."""
        return self.depth + 1 if self.force_end else self.max_steps


@dataclass(frozen=True, kw_only=True)
class PairTreeConfig(TreeConfig):
    """How trees for pairs are searched. Walks, actions, depth and exploration are the paper's for mathematics (arXiv
    2405.00451); the module's text says what is not."""

    outcome: float = 1.0
    """What a correct solution's end adds to its value, and an incorrect one's takes away, at least 0; 1 is the range of
    the estimates."""
    gold_steps: bool = False
    """Whether the next step of the row's solution is the first candidate wherever a state says the solution's
    beginning, as in the released code; off, so that pairs are the policy's own and rows need no solution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("", self, outcome="[0, inf)")


@dataclass(frozen=True)
class Reference:
    """What a search for training data knows of the answer; one at test time knows nothing."""

    grader: Grader
    """Compares the final answers of finished solutions with the problem's."""
    outcome: float = 1.0
    """What a correct solution's end adds to its value, and an incorrect one's takes away, at least 0."""
    follow: Callable[[Sequence[State]], Sequence[Sequence[Step]]] | None = None
    """Steps of the reference solution behind each state, to its end, none where a state says something else; the first
    of them is then among the candidates. None: candidates are samples only."""


def tree_search(
    problems: Sequence[Problem],
    generator: StepGenerator,
    estimate: Estimate,
    settings: TreeConfig,
    reference: Reference | None = None,
) -> list[SearchTree]:
    """Search a tree for each problem.

    Args:
        problems: any; with a reference each has an ``answer``.
        generator: proposes steps.
        estimate: values states, finished ones among them.
        settings: see :class:`TreeConfig`.
        reference: grades finished solutions; None: their value is its estimate alone.

    Returns:
        One tree per problem, in order; a tree does not depend on the others.

    Raises:
        DataError: a problem without an answer.
    """
    for problem in problems if reference else []:
        if problem.row.get("answer") in (None, ""):
            raise DataError("the problem has no answer to grade solutions by", path=problem.id, column="answer")
    trees = [SearchTree(problem) for problem in problems]
    walks = [_decide_all(tree, settings, scored=reference is None) for tree in trees]
    while stopped := [(walk, leaf) for walk in walks if (leaf := next(walk, None)) is not None]:
        _expand([leaf for _, leaf in stopped], generator, estimate, settings, reference)
        walks = [walk for walk, _ in stopped]
    return trees


def _decide_all(tree: SearchTree, settings: TreeConfig, *, scored: bool) -> Iterator[Node]:
    """Decide step after step; yields the nodes that need children, and is resumed when they have them."""
    node, walks = tree.root, settings.iterations * settings.root_factor
    while not node.terminal and node.depth < settings.deepest:
        for _ in range(walks):
            yield from _walk(node, settings)
        if not node.children:
            return
        options = tuple(Option(child, child.q, child.visits) for child in node.children)
        tree.decisions.append(Decision(node, options, best_child(node, settings.choose, scored=scored)))
        node, walks = tree.decisions[-1].chosen, settings.iterations


def _walk(start: Node, settings: TreeConfig) -> Iterator[Node]:
    """One walk with its backup; yields the leaves it meets."""
    path = [start]
    limit = settings.deepest if settings.force_end else min(start.depth + settings.depth, settings.deepest)
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
    leaves: Sequence[Node],
    generator: StepGenerator,
    estimate: Estimate,
    settings: TreeConfig,
    reference: Reference | None,
) -> None:
    """Give leaves, at most one of each tree, their children, and these their values."""
    _propose(leaves, generator, settings, reference)
    new = [child for leaf in leaves for child in leaf.children]
    if reference:
        over = [node for node in new if node.terminal]
        grades = correct_ones([node.state for node in over], reference.grader)
        for node, correct in zip(over, grades, strict=True):
            node.correct, node.state = correct, replace(node.state, correct=correct)
    for node, value in zip(new, estimate([node.state for node in new]) if new else (), strict=True):
        assert node.parent is not None
        # Without an estimate the step neither gains nor loses.
        damping = 1 if settings.damp_after is None else max(node.parent.depth - settings.damp_after, 1)
        node.score, node.value = value, node.parent.value if value is None else value / damping
        if reference and node.correct is not None:
            node.value += reference.outcome * (1 if node.correct else -1)
        node.q = node.reward


def _propose(
    leaves: Sequence[Node], generator: StepGenerator, settings: TreeConfig, reference: Reference | None
) -> None:
    """Give leaves their children: steps, or the rest of the solution where an end is forced; those of the reference
    solution first. Of children that say the same and end alike there is only the first."""
    states = [leaf.state for leaf in leaves]
    forced = [settings.force_end and leaf.depth >= settings.depth for leaf in leaves]
    proposed = for_some([not end for end in forced], states, partial(generator.propose, n=settings.actions))
    completed = for_some(forced, states, partial(generator.complete, n=1))
    follow = reference and reference.follow
    gold_of: Sequence[Sequence[Step]] = follow(states) if follow else [()] * len(states)
    for leaf, steps, wholes, gold in zip(leaves, proposed, completed, gold_of, strict=True):
        children: dict[tuple[str, bool], Node] = {}
        for child in [Node(step, leaf) for step in steps or ()] + [_end(leaf, whole) for whole in wholes or ()]:
            children.setdefault(_says(child), child)
        if gold:
            # Its number is none of a sample's, so that what is drawn behind it is drawn for it alone.
            first = replace(gold[0], sample=settings.actions)
            given = _end(leaf, reduce(State.then, (first, *gold[1:]), leaf.state)) if wholes else Node(first, leaf)
            children = children if _says(given) in children else {_says(given): given} | children
        leaf.children = [*children.values()]


def _end(leaf: Node, whole: State) -> Node:
    """A child that is all the rest of its solution, as one action."""
    node = Node(whole.since(leaf.state), leaf)
    node.state = whole
    return node


def _says(node: Node) -> tuple[str, bool]:
    return node.step.text, node.terminal


@dataclass(frozen=True, kw_only=True)
class MCTS(TreeConfig, Search):
    """Tree search for an answer: MCTS-DPO's search (arXiv 2405.00451) without the reference answer. No solution is
    graded; a finished one is worth what the scorer says. The paper searches for training pairs only: this use is ours.
    """

    form = "mcts@{iterations}x{actions}"

    vote: Literal["path", "max", "majority", "weighted"] = "path"
    """How the answer is taken: the end of the chosen path, or by the highest score, the most frequent answer or the
    answer with the highest sum of scores among all finished solutions of the tree."""
    reduction: Reduction | None = None
    """From step scores to one: product, min, mean or last; null takes what suits the scorer's meaning."""

    @property
    def at_once(self) -> int:
        """See :attr:`~stepkd.search.state.Search.at_once`."""
        return self.actions

    def run(self, problems: Sequence[Problem], tools: Tools) -> list[list[Found]]:
        """See :meth:`~stepkd.search.state.Search.run`; behind the answer the other solutions that end in the tree."""
        trees = tree_search(problems, tools.generator, partial(tools.scores, reduction=self.reduction), self)
        traces = [[_event(decision) for decision in tree.decisions] for tree in trees]
        ends = [_ends(tree, path=self.vote == "path") for tree in trees]
        groups = [[(node.state, node.score) for node in nodes] for nodes in ends]
        if self.vote != "path":
            return elected(tools, groups, traces, self.vote)
        return [
            answered([node.state for node in own], [node.score for node in own], own.index(tree.last), trace)
            for own, tree, trace in zip(ends, trees, traces, strict=True)
        ]


def _ends(tree: SearchTree, *, path: bool) -> list[Node]:
    """Where solutions end; the chosen path may end unfinished, which counts where it is the answer or nothing else is
    there."""
    nodes = [node for node in tree.root.subtree() if node.terminal or (path and node is tree.last)]
    return nodes or [tree.last]


def _event(decision: Decision) -> dict[str, Any]:
    """A decision as an event of a trace."""
    options = decision.options
    return {
        "event": "decide",
        "step": decision.node.depth,
        "steps": [option.node.step.text for option in options],
        "scores": [option.q for option in options],
        "visits": [option.visits for option in options],
        "kept": [next(i for i, option in enumerate(options) if option.node is decision.chosen)],
    }
