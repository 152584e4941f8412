"""Demonstrations: scratchpad solutions, clean or with slips.

A student needs noisy ones: trained on clean solutions only, it has no good behaviour to prefer. Random slips give a
student whose greedy answer is right and whose samples are not; systematic slips give one whose most likely step is
wrong on some operands.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

from stepkd.errors import ConfigError, check_choice
from stepkd.tasks.base import Task, TaskProblem, check_integer
from stepkd.tasks.keys import keyed_bits, keyed_fraction, keyed_rng

NoiseKind = Literal["random", "systematic"]


@dataclass(frozen=True)
class Noise:
    """How often the lines of a demonstration slip, and what becomes of a slip.

    The answer line copies what was computed before it and does not slip on its own.
    """

    rate: float
    """Random: the probability that a line's result is replaced by a wrong one. Systematic: the share of operand
    combinations that are mislearnt. In [0, 1]."""
    kind: NoiseKind = "random"
    """``random``: every line slips independently, to a wrong result drawn afresh. ``systematic``: whether a line slips,
    and to what, is a fixed function of its operands and operator (for the cellular automaton the whole row, for the
    star graph the node and the goal)."""
    recover: float = 0.5
    """Probability that a slip is silently recovered (the lines after it go on from the true values); otherwise they
    carry it on. In [0, 1]."""
    seed: int = 0
    """Which operands are mislearnt (systematic); which lines slip (random), together with the caller's generator."""

    def __post_init__(self) -> None:
        check_choice("noise kind", self.kind, get_args(NoiseKind))
        check_integer("noise seed", self.seed, minimum=0)
        for name in ("rate", "recover"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"noise {name}={value!r} is not a probability; it must lie between 0 and 1")


def demonstration(
    task: Task, problem: TaskProblem, rng: random.Random, noise: Noise | None = None
) -> tuple[list[str], list[bool]]:
    """Write out a solution, with slips if `noise` asks for them.

    Args:
        task: the task the problem belongs to.
        problem: the problem.
        rng: draws the random slips and which slips are recovered; unused without noise.
        noise: the slips; None for a clean demonstration.

    Returns:
        The steps, and for each whether ``task.check_step`` finds it right given the truth.
    """
    if noise is None:
        steps = task.solution(problem)
    else:
        steps = _noisy_steps(task, problem, keyed_rng(noise.seed, rng.getrandbits(64)), noise)
    return steps, task.check_solution(problem, steps)


def _noisy_steps(task: Task, problem: TaskProblem, rng: random.Random, noise: Noise) -> list[str]:
    truth = task.solution(problem)
    steps: list[str] = []
    believed: list[str] = []  # what later lines build on: `steps`, or the truth after a recovered slip
    for index, true_step in enumerate(truth):
        step = task.next_step(problem, believed)
        assert step is not None, "a slip of the task's own is well-formed, so something follows from it"
        wrong = task.slips(problem, believed, step)
        if noise.kind == "random":
            # On a chain that carries an earlier slip, a replacement that happens to be true would be no slip.
            wrong = [candidate for candidate in wrong if candidate != true_step]
            slip = rng.choice(wrong) if wrong and rng.random() < noise.rate else None
        else:
            slip = _mislearnt(task, task.operands(problem, believed, step), wrong, noise) if wrong else None
        steps.append(step if slip is None else slip)
        recovered = slip is not None and rng.random() < noise.recover
        believed = truth[: index + 1] if recovered else [*believed, steps[-1]]
    return steps


def _mislearnt(task: Task, operands: str, wrong: list[str], noise: Noise) -> str | None:
    """Return the wrong line that these operands always lead to, or None if they are among those learnt right."""
    if keyed_fraction(noise.seed, "slips", task.name, operands) >= noise.rate:
        return None
    # The candidate of lowest hash, so that the choice hangs on the operands and not on the candidates' order.
    return min(wrong, key=lambda line: keyed_bits(noise.seed, "to", task.name, operands, line))
