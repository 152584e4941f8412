"""Rows of the tiny world: problems with worked solutions, clean or with slips, and the check of a model's steps.

A student needs noisy demonstrations: trained on clean solutions only, it has no good behaviour to prefer. Random slips
give a student whose greedy answer is correct and whose samples are not; systematic slips give one whose most likely
step is incorrect on some operands.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from stepkd.errors import ConfigError, DataError, check_bounds, check_choice
from stepkd.tasks.base import Given, Task, TaskProblem, answer_line, keyed_bits, keyed_fraction, keyed_rng, trim
from stepkd.tasks.families import get_task


@dataclass(frozen=True)
class Noise:
    """How often the lines of a demonstration slip, and what becomes of a slip.

    The answer line copies what was computed before it and does not slip on its own.
    """

    rate: float
    """Random: the probability that a line's result is replaced by an incorrect one. Systematic: the share of operand
    combinations that are mislearnt. In [0, 1]."""
    kind: Literal["random", "systematic"] = "random"
    """``random``: every line slips independently, to an incorrect result drawn afresh. ``systematic``: whether a line
    can slip, and to what, is a fixed function of its operands and operator (for the cellular automaton the whole row,
    for the star graph the node and the goal)."""
    often: float = 1.0
    """Systematic: the probability that mislearnt operands do slip, each time they come up. In [0, 1]; random slips have
    only the rate."""
    recover: float = 0.5
    """Probability that a slip is silently recovered: the lines after it go on from the true values, as if no line had
    slipped yet. Otherwise they carry it on. In [0, 1]."""
    seed: int = 0
    """Which operands are mislearnt (systematic); which lines slip (random), together with the caller's generator."""

    def __post_init__(self) -> None:
        check_bounds("noise ", self, rate="[0, 1]", often="[0, 1]", recover="[0, 1]", seed="[0, inf)")
        if self.kind == "random" and self.often != 1.0:
            raise ConfigError(
                f"noise often={self.often} with kind=random: give the probability of a random slip as rate"
            )


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
        The steps, and for each whether it is correct given the truth.
    """
    steps = task.solution(problem) if noise is None else _noisy_steps(task, problem, rng, noise)
    return steps, task.check_solution(problem, steps)


def _noisy_steps(task: Task, problem: TaskProblem, rng: random.Random, noise: Noise) -> list[str]:
    truth, draws = task.solution(problem), keyed_rng(noise.seed, rng.getrandbits(64))
    steps: list[str] = []
    believed: list[str] = []  # what later lines build on: `steps`, or the truth after a recovered slip
    for index, true_step in enumerate(truth):
        step = task.next_step(problem, believed)
        assert step is not None, "a slip of the task's own is well-formed, so something follows from it"
        incorrect = task.slips(problem, believed, step)
        if noise.kind == "random":
            # On a chain that carries an earlier slip, a replacement that happens to be true would be no slip.
            incorrect = [candidate for candidate in incorrect if candidate != true_step]
            slip = draws.choice(incorrect) if incorrect and draws.random() < noise.rate else None
        else:
            slip = _mislearnt(task, task.operands(problem, believed, step), incorrect, noise) if incorrect else None
            slip = slip if noise.often == 1.0 or draws.random() < noise.often else None
        steps.append(step if slip is None else slip)
        recovered = slip is not None and draws.random() < noise.recover
        believed = truth[: index + 1] if recovered else [*believed, steps[-1]]
    return steps


def _mislearnt(task: Task, operands: str, incorrect: list[str], noise: Noise) -> str | None:
    """Return the incorrect line that these operands always lead to, or None if they are among those learnt correct."""
    if keyed_fraction(noise.seed, "slips", task.name, operands) >= noise.rate:
        return None
    # The candidate of lowest hash, so that the choice hangs on the operands and not on the candidates' order.
    return min(incorrect, key=lambda line: keyed_bits(noise.seed, "to", task.name, operands, line))


Split = Literal["train", "validation", "test"]

_SHARES: dict[str, tuple[float, float]] = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
_DRAWS_WITHOUT_NEWS = 20_000  # about half a second; a problem space small enough to run dry is exhausted long before


def split_of(prompt: str) -> str:
    """Return the split a prompt belongs to: train (80%), validation (10%) or test (10%), by its hash alone."""
    place = keyed_fraction("split", prompt)
    return next(split for split, (low, high) in _SHARES.items() if low <= place < high)


def make_rows(
    task: Task | str,
    n: int,
    *,
    seed: int,
    split: Split = "train",
    noise: Noise | None = None,
) -> list[dict[str, Any]]:
    """Generate problem rows with worked solutions.

    Row ``i`` is keyed by (seed, split, i): the first rows of a longer set are the rows of a shorter one, and noise does
    not change which problems are drawn. A prompt belongs to one split whatever the seed.

    Args:
        task: the task, or its text for `get_task`.
        n: number of rows, at least 1.
        seed: seed of the problems and of the random slips, at least 0.
        split: which part of the problem space to draw from.
        noise: slips in the solutions; None for clean ones.

    Returns:
        Rows, no prompt twice, with `id`, `prompt`, `answer` (the true one), `solution` (the steps joined), `steps`,
        `step_labels` (bool per step), `outcome` (bool, whether its answer is correct), `task` (canonical text) and
        `meta`. All are JSON values.

    Raises:
        ConfigError: a setting out of range, or fewer than `n` different problems in the split.
    """
    if isinstance(task, str):
        task = get_task(task)
    if n < 1 or seed < 0:
        raise ConfigError(f"n={n}, seed={seed}: ask for at least one row, and give a seed of 0 or more")
    check_choice("split", split, get_args(Split))
    seen: set[str] = set()
    rows = []
    for index in range(n):
        problem = _draw(task, seed=seed, split=split, index=index, seen=seen)
        if problem is None:
            raise ConfigError(
                f"{n} rows asked of {task.spec} ({split} split), but only {index} different problems were found "
                f"({_DRAWS_WITHOUT_NEWS} further draws gave no new one); ask for at most {index}, or widen the task's "
                "settings"
            )
        seen.add(problem.prompt)
        steps, labels = demonstration(task, problem, keyed_rng(seed, "noise", split, index), noise)
        rows.append(
            {
                "id": f"{task.name}-{split}-{seed}-{index}-{keyed_bits(task.spec, problem.prompt) >> 32:08x}",
                "prompt": problem.prompt,
                "answer": problem.answer,
                "solution": "".join(steps),
                "steps": steps,
                "step_labels": labels,
                "outcome": labels[-1],  # the answer line is correct iff the answer is
                "task": task.spec,
                "meta": problem.meta,
            }
        )
    return rows


def _draw(task: Task, *, seed: int, split: str, index: int, seen: set[str]) -> TaskProblem | None:
    """Draw row `index`: the first problem of the split that is not in `seen`, or None if there seems to be none."""
    rng = keyed_rng(seed, "problem", split, index)
    for _ in range(_DRAWS_WITHOUT_NEWS):
        problem = task.problem(rng)
        if problem.prompt not in seen and split_of(problem.prompt) == split:
            return problem
    return None


def row_problem(row: Mapping[str, Any]) -> tuple[Task, TaskProblem]:
    """Rebuild the task and the problem of a row.

    Args:
        row: a row of `make_rows`, also after a round trip through JSON; needs `prompt`, `answer`, `task` and `meta`.

    Raises:
        DataError: a column is missing, or `meta` does not belong to the task or to the row's answer.
        ConfigError: `task` is not the text of a task.
    """
    place = f"row {row.get('id', '(without id)')}"
    try:
        task = get_task(row["task"])
        problem = TaskProblem(row["prompt"], row["answer"], row["meta"])
        closing = task.solution(problem)[-1]
    except (KeyError, TypeError, ValueError, IndexError, StopIteration) as error:
        raise DataError(
            f"not a problem of the tiny world, as stepkd.tasks.make_rows makes them ({type(error).__name__}: {error})",
            path=place,
        ) from None
    if closing != answer_line(row["answer"]):
        raise DataError(
            f"{row['answer']!r} is not the answer of the problem in the row's meta, {closing!r} is",
            path=place,
            column="answer",
        )
    return task, problem


def critique_rows(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a verifier learns of a solution, from the exact checker: to compute a line anew before it judges it.

    Args:
        row: a row of `make_rows`, or one with a model's `steps`.

    Returns:
        Per step up to the first incorrect one a row: `prompt` is the problem with the lines so far and a question mark
        (the form `task` of critiques), `solution` the line that follows from those before (where several may, the one
        that stands there if it is correct, else the first of the prompt; an answer without its mark, which is the
        verdict's), then ``#### 1`` where it is the one that stands there, else ``#### 0``; `answer` is that verdict.
        `id` and `problem_id` name the solution.

    Raises:
        DataError: the row is not a row of the tiny world.
    """
    task, problem = row_problem(row)
    steps, rows = [trim(step) for step in row["steps"]], []
    for k, correct in enumerate(task.check_solution(problem, steps)):
        verdict, line = str(int(correct)), steps[k] if correct else trim(task.next_step(problem, steps[:k]) or "")
        rows.append(
            {
                "id": f"{row['id']}/{k}",
                "problem_id": row["id"],
                "prompt": "\n".join([problem.prompt.strip(), *steps[: k + 1]]) + "?\n",
                "solution": f"{line.removeprefix(answer_line(''))}\n{answer_line(verdict)}",
                "answer": verdict,
            }
        )
        if not correct:
            break
    return rows


def is_task_row(row: Mapping[str, Any]) -> bool:
    """Whether a row is of the tiny world: its steps have an exact checker, wherever the row was read from."""
    return "task" in row and "meta" in row


def check_row(row: Mapping[str, Any], steps: Sequence[str], *, given: Given = "truth") -> list[bool]:
    """Judge a model's steps against the problem of a row.

    Args:
        row: a row of `make_rows`; see `row_problem`.
        steps: the lines of a completion, any text.
        given: as in `Task.check_solution`.

    Returns:
        One bool per step.

    Raises:
        DataError: the row is not a row of the tiny world.
    """
    task, problem = row_problem(row)
    return task.check_solution(problem, steps, given=given)
