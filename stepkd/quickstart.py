"""The quick start: every method of stepkd on tiny models, on this machine, with nothing to download.

It is a list of stages (:data:`STAGES`). A stage trains or measures something, leaves its files in a folder of its own,
and adds one section to ``summary.json``. A new method adds one stage.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepkd.errors import ConfigError, DataError
from stepkd.grading.judge import solution_steps
from stepkd.runs.files import write_json
from stepkd.runs.job import RESULTS_NAME, SUMMARY_NAME, Job, read_results

STUDENT_NOISE = {"rate": 0.15, "kind": "random", "recover": 0.5}
"""Each line's result is replaced with probability 0.15; half of the slips are silently recovered in the next line."""
CHOICES = 8
"""Solutions per held-out problem that the reward model chooses from."""


@dataclass
class Context:
    """State of one quick start."""

    out: Path
    """Run folder."""
    console: Console
    """Where to print."""
    seed: int = 0
    """Seed of data, weights and sampling."""
    scale: float = 1.0
    """Factor on every stage's number of optimiser steps and problems."""
    task: str = "modular:terms=4,modulus=10"
    """The tiny-world task: chains of three operations modulo 10, where a wrong line can still end right."""

    def steps(self, full: int) -> int:
        """Optimiser steps of a stage whose full budget is ``full``."""
        return max(2, round(full * self.scale))

    def problems(self, full: int) -> int:
        """Problems evaluated by a stage whose full budget is ``full``."""
        return max(8, round(full * self.scale))

    def problem_source(self, full: int, *, seed: int | None = None, split: str = "train") -> str:
        """Data word of problems of the task; the quick start's seed where no other is given."""
        seed = self.seed if seed is None else seed
        return f'task:task="{self.task}",n={self.problems(full)},seed={seed},split={split}'

    def model_folder(self, name: str) -> Path:
        """Folder of an exported model that an earlier stage left.

        Raises:
            ConfigError: that stage has not run.
        """
        folder = self.out / name / "model"
        if not folder.is_dir():
            raise ConfigError(f"this stage needs the model of stage {name!r}: run it first (--stages {name} ...)")
        return folder


StageName = Literal["teacher", "student", "evaluate", "samples", "prm", "step_kto", "gkd", "kdrl"]
"""Names of :data:`STAGES`, in order."""


@dataclass(frozen=True)
class Stage:
    """One step of the quick start."""

    name: StageName
    """Name on the command line, and of its folder."""
    title: str
    """What it does, one line for the terminal."""
    run: Callable[[Context], dict[str, Any]]
    """Does it; returns its section of the summary."""


def train_teacher(context: Context) -> dict[str, Any]:
    """A teacher from clean solutions."""
    return _train(context, "teacher", "tiny_sft", start="tiny-0.5m", task=context.task, steps=800, lr=3e-3)


def train_student(context: Context) -> dict[str, Any]:
    """A student that knows, but does not do reliably: the teacher's weights, then demonstrations with slips."""
    start = context.model_folder("teacher")
    section = _train(
        context, "student", "tiny_sft", start=start, task=context.task, steps=200, lr=1e-3, noise=STUDENT_NOISE
    )
    return {**section, "noise": STUDENT_NOISE}


def evaluate_models(context: Context) -> dict[str, Any]:
    """Both models on held-out problems: greedy, and four samples at temperature 1."""
    section: dict[str, Any] = {}
    columns = ("right, greedy", "right, sampled", "majority of 4", "steps right", "right answer, wrong step")
    table = _table(f"held-out problems of {context.task}, 95% intervals", "model", columns)
    for name in ("teacher", "student"):
        folder = context.model_folder(name)
        greedy = _evaluate(context, f"{name}-greedy", folder, samples=1, temperature=0.0)
        sampled = _evaluate(context, f"{name}-sampled", folder, samples=4, temperature=1.0)
        section[name] = {"greedy": greedy, "sampled": sampled}
        shown = ("pass@1", "maj@4", "step_accuracy", "correct_with_wrong_step")
        metrics = [greedy["metrics"]["pass@1"], *(sampled["metrics"][metric] for metric in shown)]
        table.add_row(name, *map(percent, metrics))
    context.console.print(table)
    return section


def show_samples(context: Context) -> dict[str, Any]:
    """Sampled solutions of the student, each step marked by the exact checker."""
    folder = context.out / "evaluations" / "student-sampled"
    if not (folder / RESULTS_NAME).is_file():
        raise ConfigError(
            "the stage 'samples' shows what stage 'evaluate' sampled: run it first (--stages evaluate samples)"
        )
    rows = sorted(read_results(folder), key=lambda row: row["index"])
    samples = [(row, sample) for row in rows for sample in row["samples"]]
    shown = []
    for title, *wanted in (
        ("right answer, every step right", True, True),
        ("right answer, but a wrong step: what step-level supervision is for", True, False),
        ("wrong answer", False, False),
    ):
        for row, sample in samples:
            if [sample["verdict"] == "correct", all(sample["step_labels"])] == wanted:
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


def train_prm(context: Context) -> dict[str, Any]:
    """Labels of the student's solutions, a reward model from the student's weights, best-of-8."""
    student = context.model_folder("student")
    labels, summary = student_labels(context)
    section = _train(
        context, "prm", "tiny_prm", start=student, labels=labels, steps=400, lr=1e-3, allow_one_class=context.scale < 1
    )
    section |= {"labelled_solutions": summary["labelled"], "monte_carlo": _monte_carlo(context, student)}
    return section | _choose(context, context.model_folder("prm"), student)


def _monte_carlo(context: Context, student: Path) -> dict[str, Any]:
    """How true labels from 8 continuations per step are, for when there is no checker."""
    from stepkd.claims.tiny_samples import label_tiny, read_labels, sampled, sampling
    from stepkd.labels.labellers import MonteCarlo, TaskChecker
    from stepkd.labels.quality import label_quality
    from stepkd.labels.settings import Existing

    folder, seed = context.out / "prm", context.seed
    problems = context.problem_source(60, seed=seed + 1)
    solutions = sampled(student, problems, samples=4, seed=seed)
    labels, _ = label_tiny(folder / "monte-carlo", solutions, MonteCarlo(sampling=sampling(seed, 8)))
    existing = Existing(rollouts=str(labels), model=str(student))
    truth, _ = label_tiny(folder / "truth", existing, TaskChecker())
    quality = label_quality(read_labels(labels), read_labels(truth)).to_dict()
    accuracy = quality["balanced_accuracy"]
    if accuracy is not None:
        context.console.print(
            f"Monte-Carlo labels (8 continuations per step) against the exact checker: balanced accuracy "
            f"{percent(accuracy)}".replace("\n", " "),
            highlight=False,
        )
    return quality


def _choose(context: Context, model: Path, student: Path) -> dict[str, Any]:
    """Best-of-8 by the reward model against the majority, and how well it tells correct steps from incorrect ones."""
    from stepkd.claims.tiny_samples import by_problem, curves_tiny, label_tiny, read_labels, sampled, score_tiny
    from stepkd.evaluation.step_metrics import labelled_steps, step_metrics
    from stepkd.labels.labellers import TaskChecker
    from stepkd.scorers.scorer import reduce_solutions

    problems = context.problem_source(150, split="test")
    solutions = sampled(student, problems, samples=CHOICES, seed=context.seed, dedupe=False)
    held_out, _ = label_tiny(context.out / "prm" / "held-out", solutions, TaskChecker())
    rows = read_labels(held_out)
    scores = score_tiny(model, rows)
    reduced = {"prm": reduce_solutions(scores, "product", meaning="correctness")}
    curve = curves_tiny(rows, reduced, (1, 2, 4, CHOICES), seed=context.seed)
    judged = [
        (found, row["step_labels"], name)
        for solutions, (name, group) in zip(scores, by_problem(rows).items(), strict=True)
        for found, row in zip(solutions, group, strict=True)
        if not any(math.isnan(score) for score in found)
    ]
    if not judged:
        raise DataError("the reward model scored no solution: every one holds the step marker or has no text")
    found, labels, names = zip(*judged, strict=True)
    steps = labelled_steps(found, labels, problems=names, up_to_first_error=True)
    metrics = step_metrics(steps, seed=context.seed).to_dict()
    title = f"choosing among {CHOICES} of the student's solutions, 95% intervals"
    table = _table(title, "choice", [f"N={k}" for k in curve.ks])
    for name, text in (("majority", "majority"), ("prm", "process reward model"), ("pass", "any right (ceiling)")):
        table.add_row(text, *(percent(each.to_dict()) for each in curve.curves[name]))
    context.console.print(table)
    auroc = metrics["auroc"]
    if auroc is not None:
        context.console.print(
            f"right against wrong steps, up to the first error: AUROC {auroc['value']:.3f} "
            f"({auroc['low']:.3f} to {auroc['high']:.3f})",
            highlight=False,
        )
    return {"best_of_n": curve.to_dict(), "step_metrics": metrics, "unscored": len(rows) - len(judged)}


def train_step_kto(context: Context) -> dict[str, Any]:
    """Step-KTO from the student's weights, and what it does to correct answers and to the incorrect steps in them."""
    student = context.model_folder("student")
    labels, summary = student_labels(context)
    section = _train(
        context,
        "step_kto",
        "tiny_preference",
        method="step_kto",
        start=student,
        rows=labels,
        steps=60,
        lr=1e-4,
        beta=0.5,
        global_batch_size=64,
        allow_one_class=context.scale < 1,
    )
    return {
        **section,
        "labelled_solutions": summary["labelled"],
        "conflicts": summary["right_answers_with_a_wrong_step"],
        "evaluation": _compare(context, "step_kto"),
    }


def train_gkd(context: Context) -> dict[str, Any]:
    """On-policy GKD from the student's weights, and how like its teacher the student was and has become."""
    from stepkd.claims.tiny import tiny_fidelity
    from stepkd.modules.distillation_settings import JSD

    teacher, student = (context.model_folder(name) for name in ("teacher", "student"))
    section = _train(
        context,
        "gkd",
        "tiny_gkd",
        start=student,
        teacher=teacher,
        task=context.task,
        steps=50,
        lr=3e-4,
        divergence=JSD(beta=0.5, scaled=True),
    )
    evaluation = _compare(context, "gkd")
    problems = context.problems(64)
    alike = {
        name: tiny_fidelity(
            context.model_folder(name), teacher, task=context.task, problems=problems, seed=context.seed
        )
        for name in ("student", "gkd")
    }
    context.console.print(
        f"reverse KL to the teacher on own samples of {problems} problems, nats a token: "
        f"{alike['student']['reverse_kl']:.3f} before, {alike['gkd']['reverse_kl']:.3f} after"
    )
    return {**section, "evaluation": evaluation, "fidelity": alike}


def train_kdrl(context: Context) -> dict[str, Any]:
    """KDRL from the student's weights: one objective of rewards and distillation, on the same samples."""
    from stepkd.modules.settings import Sampled

    teacher, student = (context.model_folder(name) for name in ("teacher", "student"))
    section = _train(
        context,
        "kdrl",
        "tiny_kdrl",
        start=student,
        teacher=teacher,
        task=context.task,
        steps=30,
        lr=1e-4,
        kd=Sampled(beta=0.05),  # coefficient of the reverse KL to the teacher
    )
    return {**section, "evaluation": _compare(context, "kdrl")}


def student_labels(context: Context) -> tuple[Path, dict[str, Any]]:
    """The student's own solutions, every step labelled by the exact checker; drawn once for all stages."""
    from stepkd.claims.tiny_samples import label_tiny, sampled
    from stepkd.labels.labellers import TaskChecker

    student, problems = context.model_folder("student"), context.problem_source(2000)
    solutions = sampled(student, problems, samples=4, seed=context.seed)
    return label_tiny(context.out / "labels", solutions, TaskChecker())


def _train(context: Context, name: str, builder: str, *, steps: int, **settings: Any) -> dict[str, Any]:
    """Train the model of a stage with a builder of :mod:`stepkd.claims.tiny`, and say where it is."""
    from stepkd.claims import tiny

    model = tiny.train_tiny(
        context.out / name,
        getattr(tiny, builder),
        steps=context.steps(steps),
        progress=True,
        seed=context.seed,
        **settings,
    )
    return {"model": str(model.relative_to(context.out)), "steps": context.steps(steps)}


def _evaluate(context: Context, name: str, model: Path, *, samples: int, temperature: float) -> dict[str, Any]:
    """Evaluate a model on held-out problems of the task; returns the summary's metrics."""
    from stepkd.claims.tiny_samples import evaluate_tiny

    summary = evaluate_tiny(
        context.out / "evaluations" / name,
        model,
        task=context.task,
        problems=context.problems(200),
        samples=samples,
        temperature=temperature,
        seed=context.seed,
    )
    return {key: summary[key] for key in ("problems", "samples", "metrics")}


def _compare(context: Context, stage: str) -> dict[str, Any]:
    """Show samples of the student and of a stage's model side by side; returns the metrics of the latter."""
    columns = ("right, sampled", "steps right", "right answer, wrong step")
    table = _table("held-out problems, 4 samples each, 95% intervals", "model", columns)
    section: dict[str, Any] = {}
    for name in ("student", stage):
        section = _evaluate(context, f"{name}-sampled", context.model_folder(name), samples=4, temperature=1.0)
        shown = ("pass@1", "step_accuracy", "correct_with_wrong_step")
        table.add_row(name.replace("_", "-"), *(percent(section["metrics"][metric]) for metric in shown))
    context.console.print(table)
    return section


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def percent(metric: Mapping[str, Any]) -> str:
    """``93.0%`` with ``(88.6 to 95.8)`` below it; a dash where the metric is undefined."""
    if metric["value"] is None:
        return "-"
    interval = "" if metric["low"] is None else f"\n({100 * metric['low']:.1f} to {100 * metric['high']:.1f})"
    return f"{100 * metric['value']:.1f}%{interval}"


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
