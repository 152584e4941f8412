"""Show solutions on the terminal, step by step with labels and scores: of any folder, as ``stepkd report`` has them.

stepkd samples runs/kdrl                           rollouts of a GRPO or KDRL run, those of its last entry
stepkd samples runs/kdrl --step 40 --number 3      of one optimiser step
stepkd samples runs/quickstart --show correct_with_incorrect_step    of all its stages

✓ and green: labelled correct, ✗ and red: labelled incorrect; without labels the colour is that of the score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stepkd.errors import ConfigError, check_bounds

if TYPE_CHECKING:
    from stepkd.report.solutions import Solution

Filter = Literal["correct_with_incorrect_step", "disagrees", "incorrect", "clean", "cut-off", "longest"]


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Settings of ``stepkd samples``."""

    POSITIONAL: ClassVar = ("paths",)

    paths: tuple[str, ...] = ()
    """Folders that commands left (fit, evaluate, search, label, score, ...), or that hold some."""
    show: Filter | None = None
    """Only solutions of a kind: ``correct_with_incorrect_step`` (a correct answer with one), ``disagrees`` (scores and
    labels), ``incorrect``, ``clean`` (incorrect answer, no incorrect step), ``cut-off``, ``longest``; null: all."""
    step: int | Literal["last", "all"] = "last"
    """Optimiser step of the rollouts of a training; ``last`` is each one's newest entry, ``all`` shows every one."""
    number: int = 8
    """Most solutions shown, 0 or more."""

    def __post_init__(self) -> None:
        check_bounds("", self, number="[0, inf)")
        if not self.paths:
            raise ConfigError("name at least one folder: the --out of a command")


MARKS = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("·", "dim")}
COLOURS = ("red", "dark_orange", "yellow", "cyan", "green")
"""Of a score, from 0 to 1 in fifths."""


def run(config: SamplesConfig) -> int:
    """Run ``stepkd samples``."""
    from rich.console import Console

    from stepkd.report.folders import find_folders
    from stepkd.report.solutions import merged, tags_of

    solutions = merged(each for folder in find_folders(config.paths) for each in folder.solutions)
    steps = sorted({each.step for each in solutions if each.step is not None})
    if config.step not in ("all", "last", *steps):
        raise ConfigError(f"--step {config.step}: there are no rollouts of it, but of {steps}")
    if config.step != "all":
        last = {each.run: each.step for each in sorted(solutions, key=lambda each: each.step or 0)}
        solutions = [
            each
            for each in solutions
            if each.step is None or each.step == (last[each.run] if config.step == "last" else config.step)
        ]
    if not solutions:
        raise ConfigError(f"{', '.join(config.paths)}: no solutions there")
    tags = tags_of(solutions)
    kept = [each for each, own in zip(solutions, tags, strict=True) if config.show in (None, *own)]
    if not kept:
        counts = Counter(chain.from_iterable(tags))
        others = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        print(f"none of {len(solutions)} solutions is {config.show}; they are: {others or 'of no such kind'}")
        return 0
    console = Console(highlight=False)
    print_solutions(console, kept[: config.number])
    console.print(f"\n{min(config.number, len(kept))} of {len(kept)} (of {len(solutions)} solutions)", style="dim")
    return 0


def print_solutions(console: Any, solutions: Sequence[Solution]) -> None:
    """Print solutions below their problems, step by step."""
    from rich.text import Text

    problem = None
    for each in solutions:
        if each.problem_key != problem:
            problem = each.problem_key
            answer = "" if each.answer is None else f"  (answer {each.answer})"
            console.print(Text(f"\n{each.prompt}{answer}", style="bold"))
        verdict = {True: "✓ correct", False: "✗ incorrect", None: "not graded"}[each.correct]
        if each.correct is False and each.found is not None:
            verdict += f": {each.found}"
        facts = [f"{each.run}, {each.sample}", verdict]
        facts += [f"{each.tokens} tokens"] * (each.tokens is not None) + ["cut off"] * each.cut_off
        facts += [f"{name} {'none' if value is None else format(value, '.3g')}" for name, value in each.values.items()]
        console.print(Text(", ".join(facts), style=MARKS[each.correct][1]))
        for i, step in enumerate(each.steps):
            mark, style = MARKS[each.labels[i] if each.labels else None]
            score = each.scores[i] if each.scores else None
            if score is not None and not each.labels:
                style = COLOURS[min(4, max(0, int(score * 5)))]
            line = Text("  ").append(f"{mark} {step.strip()}", style=style)
            console.print(
                line if score is None else line.append(f"  {score:.2f}" + " ≠" * (i in each.disagrees), style="dim")
            )
