"""Show what a policy wrote while GRPO or KDRL trained it: its completions with coloured steps, and their lengths.

stepkd samples runs/kdrl                       the last entry
stepkd samples runs/kdrl --step 40 --number 3  of one optimiser step
stepkd samples runs/kdrl --all --html samples.html

Steps are green to red by the score that the run gave them (step_credit); without scores, a completion is green or red
as a whole, by its answer.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepkd.runs.files import write_file

BARS = " ▁▂▃▄▅▆▇█"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``stepkd samples``."""
    parser.add_argument("run", help="run folder, or its samples.jsonl")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="optimiser step (default: the last entry)")
    which.add_argument("--all", action="store_true", help="every entry")
    parser.add_argument("--number", type=int, metavar="N", help="completions of an entry (default: all there are)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page that stands alone")


def run(arguments: argparse.Namespace) -> int:
    """Run ``stepkd samples``."""
    from rich.console import Console

    from stepkd.errors import ConfigError
    from stepkd.modules.rollouts import read_samples

    entries = read_samples(arguments.run)
    if arguments.number is not None and arguments.number < 0:
        raise ConfigError(f"--number {arguments.number}: must not be negative")
    if arguments.step is not None:
        known = [entry["step"] for entry in entries]
        if arguments.step not in known:
            raise ConfigError(f"--step {arguments.step}: there is no entry of it; there are {known}")
        entries = [entry for entry in entries if entry["step"] == arguments.step]
    elif not arguments.all:
        entries = entries[-1:]
    console = Console(record=arguments.html is not None, highlight=False)
    for entry in entries:
        _show(console, entry, arguments.number)
    if arguments.html is not None:
        write_file(arguments.html, lambda temporary: console.save_html(temporary, inline_styles=True))
        print(f"wrote {arguments.html}")
    return 0


def _show(console: Any, entry: Mapping[str, Any], number: int | None) -> None:
    from rich.rule import Rule
    from rich.text import Text

    counts, edges = entry["lengths"]["counts"], entry["lengths"]["edges"]
    console.print(Rule(Text(f"step {entry['step']}")))
    console.print(f"{sum(counts)} completions of {edges[0]:g} to {edges[-1]:g} tokens: [{bars(counts)}]", markup=False)
    for sample in entry["samples"][:number]:
        prompt = sample["prompt"]
        if isinstance(prompt, list) and prompt:  # a chat
            prompt = prompt[-1].get("content", "")
        console.print()
        console.print(Text(str(prompt).strip(), style="bold"))
        scores, correct = sample["step_scores"], sample["correct"]
        whole = {True: "green", False: "red"}.get(correct, "")
        for step, score in zip(sample["steps"], scores or [None] * len(sample["steps"]), strict=False):
            line = Text(step.strip("\n"), style=colour(score) if scores else whole)
            console.print(line if score is None else line.append(f"  {score:.2f}", style="dim"))
        values = {"reward": sample["reward"]} | (sample["rewards"] if len(sample["rewards"]) > 1 else {})
        facts = [f"{name} {'none' if value is None else format(value, '.3g')}" for name, value in values.items()]
        if correct is not None:
            facts.insert(1, "correct" if correct else f"incorrect (answer {sample['answer']})")
        facts += [f"{sample['tokens']} tokens"] + ["cut off"] * bool(sample["cut_off"])
        console.print(Text(", ".join(facts), style="dim"))


def bars(counts: list[int]) -> str:
    """A histogram in one line; a bar that is not empty is never blank."""
    most = max(counts, default=0) or 1
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in counts)


def colour(score: float | None) -> str:
    """Red for 0, yellow for a half, green for 1 (and beyond them); none without a score."""
    if score is None:
        return "default"
    score = min(max(score, 0.0), 1.0)
    red, green = round(200 * min(1.0, 2 - 2 * score)), round(170 * min(1.0, 2 * score))
    return f"#{red:02x}{green:02x}00"
