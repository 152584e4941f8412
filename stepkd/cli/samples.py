"""Show what a policy wrote while GRPO or KDRL trained it: its completions with coloured steps, and their lengths.

stepkd samples runs/kdrl                       the last entry
stepkd samples runs/kdrl --step 40 --number 3  of one optimiser step
stepkd samples runs/kdrl --step all --html samples.html

Steps are green to red by the score that the run gave them (step_credit); without scores, a completion is green or red
as a whole, by its answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from stepkd.errors import ConfigError, check_bounds
from stepkd.runs.files import write_file

BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Settings of ``stepkd samples``."""

    POSITIONAL: ClassVar = ("run",)

    run: str
    """Run folder, or its samples.jsonl."""
    step: int | Literal["last", "all"] = "last"
    """Optimiser step whose completions are shown; ``last`` is the newest entry, ``all`` shows every one."""
    number: int | None = None
    """Most completions shown of an entry, 0 or more; null: all there are."""
    html: str | None = None
    """File to which a page that stands alone is written, too; null: none."""

    def __post_init__(self) -> None:
        check_bounds("", self, number="[0, inf)")


def run(config: SamplesConfig) -> int:
    """Run ``stepkd samples``."""
    from rich.console import Console

    from stepkd.modules.rollouts import read_samples

    entries = read_samples(config.run)
    if config.step == "last":
        entries = entries[-1:]
    elif config.step != "all":
        known = [entry["step"] for entry in entries]
        if config.step not in known:
            raise ConfigError(f"--step {config.step}: there is no entry of it; there are {known}")
        entries = [entry for entry in entries if entry["step"] == config.step]
    console = Console(record=config.html is not None, highlight=False)
    for entry in entries:
        _show(console, entry, config.number)
    if config.html is not None:
        write_file(config.html, lambda temporary: console.save_html(temporary, inline_styles=True))
        print(f"wrote {config.html}")
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
