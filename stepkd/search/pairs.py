"""Step preference pairs from a searched tree (MCTS-DPO, arXiv 2405.00451; :mod:`stepkd.search.mcts` says what differs).

Pairs are taken at every depth of the chosen path. At every decision the siblings are ranked by Q (equal ones by
visits): the better side is the best, the worse side the worst. A run of steps of which each is its parent's only child
is one action, and its texts and ids are joined.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stepkd.errors import check_bounds
from stepkd.search.mcts import TreeConfig
from stepkd.search.tree import Decision, Node, Option, SearchTree

_ROUNDING = 1e-9
"""Values that differ by less are equal: sums of the same numbers in another order."""


@dataclass(frozen=True, kw_only=True)
class PairTreeConfig(TreeConfig):
    """How trees for pairs are searched. Walks, actions, depth and exploration are the paper's for mathematics (arXiv
    2405.00451); :mod:`stepkd.search.mcts` says what is not."""

    _place = "search."

    outcome: float = 1.0
    """What a correct solution's end adds to its value, and an incorrect one's takes away, at least 0; 1 is the range of
    the estimates."""
    gold_steps: bool = False
    """Whether the next step of the row's solution is the first candidate wherever a state says the solution's
    beginning, as in the released code; off, so that pairs are the policy's own and rows need no solution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self._place, self, outcome="[0, inf)")


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
