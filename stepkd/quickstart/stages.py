"""The stages of the quick start, in order."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.table import Table
from rich.text import Text

from stepkd.errors import ConfigError
from stepkd.grading.judge import solution_steps
from stepkd.quickstart.context import (
    Context,
    Stage,
    compare_samples,
    evaluate_task,
    percent,
    student_labels,
    train_sft,
)
from stepkd.quickstart.prm_stage import train_prm
from stepkd.runs.files import write_json
from stepkd.runs.job import SUMMARY_NAME, Job

STUDENT_NOISE = {"rate": 0.15, "kind": "random", "recover": 0.5}
"""Each line's result is replaced with probability 0.15; half of the slips are silently recovered in the next line."""
STEP_KTO: dict[str, Any] = {"beta": 0.5}
"""KTO's beta, of answers and steps."""
DIVERGENCE: dict[str, Any] = {"kind": "jsd", "beta": 0.5, "scaled": True}
KD: dict[str, Any] = {"beta": 0.05}
"""Coefficient of the reverse KL to the teacher."""


def train_teacher(context: Context) -> dict[str, Any]:
    """A teacher from clean solutions."""
    model = train_sft(context, "teacher", start="tiny-0.5m", steps=800, noise=None, lr=3e-3)
    return {"model": str(model.relative_to(context.out)), "steps": context.steps(800)}


def train_student(context: Context) -> dict[str, Any]:
    """A student that knows, but does not do reliably: the teacher's weights, then demonstrations with slips."""
    start = context.model_folder("teacher")
    model = train_sft(context, "student", start=str(start), steps=200, noise=STUDENT_NOISE, lr=1e-3)
    return {"model": str(model.relative_to(context.out)), "steps": context.steps(200), "noise": STUDENT_NOISE}


def evaluate_models(context: Context) -> dict[str, Any]:
    """Both models on held-out problems: greedy, and four samples at temperature 1."""
    section: dict[str, Any] = {}
    table = Table(title=f"held-out problems of {context.task}, 95% intervals", title_justify="left")
    for column in (
        "model",
        "right, greedy",
        "right, sampled",
        "majority of 4",
        "steps right",
        "right answer, wrong step",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in ("teacher", "student"):
        folder = context.model_folder(name)
        greedy = evaluate_task(context, f"{name}-greedy", folder, samples=1, temperature=0.0)
        sampled = evaluate_task(context, f"{name}-sampled", folder, samples=4, temperature=1.0)
        section[name] = {"greedy": greedy, "sampled": sampled}
        metrics = sampled["metrics"]
        table.add_row(
            name,
            *(
                percent(metric)
                for metric in (
                    greedy["metrics"]["pass@1"],
                    metrics["pass@1"],
                    metrics["maj@4"],
                    metrics["step_accuracy"],
                    metrics["correct_with_wrong_step"],
                )
            ),
        )
    context.console.print(table)
    return section


def show_samples(context: Context) -> dict[str, Any]:
    """Sampled solutions of the student, each step marked by the exact checker."""
    path = context.out / "evaluations" / "student-sampled" / "results.jsonl"
    if not path.is_file():
        raise ConfigError(
            "the stage 'samples' shows what stage 'evaluate' sampled: run it first (--stages evaluate samples)"
        )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    samples = [(row, sample) for row in sorted(rows, key=lambda row: row["index"]) for sample in row["samples"]]
    shown = []
    for title, wanted in (
        ("right answer, every step right", lambda right, clean: right and clean),
        (
            "right answer, but a wrong step: what step-level supervision is for",
            lambda right, clean: right and not clean,
        ),
        ("wrong answer", lambda right, clean: not right and not clean),
    ):
        for row, sample in samples:
            if wanted(sample["verdict"] == "correct", all(sample["step_labels"])):
                context.console.print(f"[bold]{title}[/bold]")
                context.console.print(marked_solution(row["prompt"], sample))
                shown.append({"id": row["id"], "kind": title, "completion": sample["completion"]})
                break
    return {"shown": shown}


def marked_solution(prompt: str, sample: dict[str, Any]) -> Text:
    """A solution with a mark before every step."""
    text = Text(f"  {prompt.strip()}\n")
    for step, right in zip(solution_steps(sample["completion"]), sample["step_labels"], strict=True):
        text.append("  ✓ " if right else "  ✗ ", style="green" if right else "bold red")
        text.append(step.strip() + "\n", style="" if right else "red")
    return text


def train_step_kto(context: Context) -> dict[str, Any]:
    """Step-KTO from the student's weights, and what it does to right answers and to the wrong steps in them."""
    from stepkd.claims.tiny_preference import train_tiny_preference

    labels, summary = student_labels(context)
    model = train_tiny_preference(
        context.out / "step_kto",
        method="step_kto",
        start=context.model_folder("student"),
        rows=labels,
        steps=context.steps(60),
        lr=1e-4,
        seed=context.seed,
        settings=STEP_KTO,
        global_batch_size=64,
        allow_one_class=context.scale < 1,
        progress=True,
    )
    sections = compare_samples(context, {"student": context.model_folder("student"), "step_kto": model})
    return {
        "model": str(model.relative_to(context.out)),
        "steps": context.steps(60),
        "labelled_solutions": summary["labelled"],
        "conflicts": summary["right_answers_with_a_wrong_step"],
        "evaluation": sections["step_kto"],
    }


def train_gkd(context: Context) -> dict[str, Any]:
    """On-policy GKD from the student's weights, and how like its teacher the student was and has become."""
    from stepkd.claims.tiny_distillation import distil_tiny, tiny_fidelity

    teacher, student = (context.model_folder(name) for name in ("teacher", "student"))
    model = distil_tiny(
        context.out / "gkd",
        start=student,
        teacher=teacher,
        task=context.task,
        demonstrations=20_000,
        steps=context.steps(50),
        lr=3e-4,
        seed=context.seed,
        divergence=DIVERGENCE,
        student=1.0,
        progress=True,
    )
    models = {"student": student, "gkd": model}
    sections = compare_samples(context, models)
    problems = context.problems(64)
    alike = {
        name: tiny_fidelity(folder, teacher, task=context.task, problems=problems, seed=context.seed)
        for name, folder in models.items()
    }
    context.console.print(
        f"reverse KL to the teacher on own samples of {problems} problems, nats a token: "
        f"{alike['student']['reverse_kl']:.3f} before, {alike['gkd']['reverse_kl']:.3f} after"
    )
    return {
        "model": str(model.relative_to(context.out)),
        "steps": context.steps(50),
        "evaluation": sections["gkd"],
        "fidelity": alike,
    }


def train_kdrl(context: Context) -> dict[str, Any]:
    """KDRL from the student's weights: one objective of rewards and distillation, on the same samples."""
    from stepkd.claims.tiny_rl import train_tiny_rl

    teacher, student = (context.model_folder(name) for name in ("teacher", "student"))
    model = train_tiny_rl(
        context.out / "kdrl",
        start=student,
        teacher=teacher,
        task=context.task,
        demonstrations=20_000,
        steps=context.steps(30),
        lr=1e-4,
        seed=context.seed,
        kd=KD,
        progress=True,
    )
    sections = compare_samples(context, {"student": student, "kdrl": model})
    return {"model": str(model.relative_to(context.out)), "steps": context.steps(30), "evaluation": sections["kdrl"]}


STAGES: list[Stage] = [
    Stage("teacher", "train a 0.5M-parameter teacher on clean step-by-step solutions", train_teacher),
    Stage("student", "make a sloppy student of it: a little more training, on solutions with slips", train_student),
    Stage("evaluate", "evaluate both on problems they have not seen", evaluate_models),
    Stage("samples", "the student's solutions, every step checked", show_samples),
    Stage("prm", "a process reward model from the student's own rollouts, and best-of-8 with it", train_prm),
    Stage("step_kto", "Step-KTO: the student learns from right and wrong answers and steps of its own", train_step_kto),
    Stage("gkd", "GKD: the student learns from its teacher, on solutions of its own", train_gkd),
    Stage("kdrl", "KDRL: rewards for right answers and the teacher's word, in one objective", train_kdrl),
]
"""All stages in order; later methods append theirs."""

PHASE = "stages"


def run_stages(context: Context, stages: Sequence[Stage], job: Job) -> None:
    """Run stages in order, each with its title and wall time; finished ones are not repeated.

    Args:
        context: the quick start.
        stages: what to run, in order.
        job: the quick start's job, begun; ``summary.json`` holds one section per finished stage.
    """
    for number, stage in enumerate(stages, start=1):
        context.console.rule(f"[bold]{number}/{len(stages)} {stage.name}[/bold]: {stage.title}", align="left")
        if not job.missing(PHASE, [stage.name]):
            context.console.print("finished earlier, not repeated")
            continue
        start = time.perf_counter()
        job.once(PHASE, stage.name, partial(stage.run, context))
        done = [each.name for each in STAGES if not job.missing(PHASE, [each.name])]
        sections = {name: job.once(PHASE, name, dict) for name in done}
        settings = {"seed": context.seed, "scale": context.scale, "task": context.task}
        write_json(job.out / SUMMARY_NAME, {"settings": settings, "stages": sections})
        context.console.print(f"{stage.name} took {time.perf_counter() - start:.0f} s\n", style="dim")
