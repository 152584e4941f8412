"""Paths in a star graph: the first step needs a look ahead, all others only copy an edge.

Source: Bachmann and Nagarajan, "The pitfalls of next-token prediction" (2024).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from stepkd.errors import ConfigError
from stepkd.tasks.base import INTEGER, Task, TaskProblem, answer_line, check_integer, draw_length, trim

_NODE = re.compile(INTEGER)


@dataclass(frozen=True)
class StarGraph(Task):
    """Find the way from the centre of a star to the end of one arm.

    The prompt lists all edges, each written outward and in shuffled order, then the question:
    ``4>7,1>3,7>2,4>1:4>2=``. A line is the next node of the path (``7``, ``2``). The answer is the first node after
    the centre, the one choice that cannot be copied from an edge; so a path with a wrong node in it can still end in
    the right answer. An answer guessed at random is right once in `arms` times.
    """

    name: ClassVar[str] = "star_graph"

    arms: int | str = 3
    """Arms of the star, 2 to 100; ``2-4`` draws the number for each problem."""
    length: int | str = 3
    """Nodes on each arm (the centre not counted), 2 to 100; ``2-4`` draws the length for each problem."""
    nodes: int = 10
    """Labels are drawn without repeats from [0, nodes), at most 99999; needs ``arms * length + 1`` of them."""

    def __post_init__(self) -> None:
        most_arms = self._store_range("arms", minimum=2, maximum=100).high
        most_nodes = self._store_range("length", minimum=2, maximum=100).high
        check_integer("star_graph: nodes", self.nodes, minimum=5, maximum=99_999)
        needed = most_arms * most_nodes + 1
        if needed > self.nodes:
            raise ConfigError(
                f"star_graph: arms={self.arms} and length={self.length} make up to {needed} nodes but only "
                f"nodes={self.nodes} labels exist; set nodes={needed} or more"
            )

    def problem(self, rng: random.Random) -> TaskProblem:
        arms, length = draw_length(self.arms, rng), draw_length(self.length, rng)
        centre, *labels = rng.sample(range(self.nodes), arms * length + 1)
        paths = [labels[start : start + length] for start in range(0, len(labels), length)]
        edges = [edge for path in paths for edge in zip([centre, *path], path, strict=False)]
        rng.shuffle(edges)
        # The arms are random already, so the first one is as good a target as any; the edges do not tell it apart.
        goal = paths[0][-1]
        prompt = ",".join(f"{start}>{end}" for start, end in edges) + f":{centre}>{goal}=\n"
        return TaskProblem(prompt, str(paths[0][0]), {"centre": centre, "goal": goal, "arms": paths})

    def next_step(self, problem: TaskProblem, previous_steps: Sequence[str]) -> str | None:
        """As in `Task`: from a node the outward edge follows, from the end of any arm the answer line."""
        path = [_claimed(step) for step in previous_steps]
        if any(node is None for node in path):
            return None
        arms: list[list[int]] = problem.meta["arms"]
        if not path or path[-1] == problem.meta["centre"]:
            return next(f"{arm[0]}\n" for arm in arms if arm[-1] == problem.meta["goal"])
        for arm in arms:
            if path[-1] == arm[-1]:
                return answer_line(str(path[0]))
            if path[-1] in arm:
                return f"{arm[arm.index(path[-1]) + 1]}\n"
        return None

    def slips(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> list[str]:
        """The nodes of the other arms at the same distance from the centre."""
        node = _claimed(step)
        arms: list[list[int]] = problem.meta["arms"]
        depths = [arm.index(node) for arm in arms if node in arm]
        return [f"{arm[depth]}\n" for depth in depths for arm in arms if arm[depth] != node]

    def operands(self, problem: TaskProblem, previous_steps: Sequence[str], step: str) -> str:
        current = trim(previous_steps[-1]) if previous_steps else problem.meta["centre"]
        return f"{current}>{problem.meta['goal']}"


def _claimed(step: str) -> int | None:
    """Read the node a line names; None for anything that is not a node line."""
    text = trim(step)
    return int(text) if _NODE.fullmatch(text) else None
