"""The quick start: every method of stepkd on tiny models, on this machine, with nothing to download.

It is a list of stages (:data:`STAGES`). A stage fits a recipe of ``recipes/tiny`` or runs jobs, leaves its files in a
folder of its own, and adds one section to ``summary.json``. A new method adds one stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepkd.data.config import LABELS_NAME
from stepkd.data.io import read_rows
from stepkd.errors import ConfigError, StepkdError
from stepkd.grading.judge import solution_steps
from stepkd.grading.pool import GradingConfig
from stepkd.labels.labellers import LabellerConfig, TaskChecker
from stepkd.labels.monte_carlo import MonteCarlo
from stepkd.labels.settings import Existing, LabelConfig, Sampled, SolutionsConfig
from stepkd.runs.files import write_json
from stepkd.runs.job import RESULTS_NAME, SUMMARY_NAME, Job, read_results
from stepkd.sampling.sampler import SamplingConfig

TASK = "modular:terms=4,modulus=10"
"""The tiny-world task: chains of three operations modulo 10, where an incorrect line can still end correctly."""
NOISE = {"rate": 0.15, "kind": "random", "recover": 0.5}
"""Each line's result is replaced with probability 0.15; half of the slips are silently recovered in the next line."""
NEW_TOKENS = 64
"""Longest sampled solution."""
CHOICES = 8
"""Solutions per held-out problem that the reward model chooses from."""
MAX_ROWS = 256
"""Completions decoded or scored at once."""


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
    """Factor on every stage's optimiser steps and held-out problems."""

    def problems(self, full: int) -> int:
        """Problems evaluated by a stage whose full budget is ``full``."""
        return max(8, round(full * self.scale))

    def problem_source(self, full: int, *, seed: int | None = None, split: str = "train") -> str:
        """Data word of problems of the task; the quick start's seed where no other is given."""
        seed = self.seed if seed is None else seed
        return f'task:task="{TASK}",n={self.problems(full)},seed={seed},split={split}'

    def model(self, name: str) -> str:
        """Folder of an exported model that an earlier stage left.

        Raises:
            ConfigError: that stage has not run.
        """
        folder = self.out / name / "model"
        if not folder.is_dir():
            raise ConfigError(f"this stage needs the model of stage {name!r}: run it first (--stages {name} ...)")
        return str(folder)


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


# ---- training --------------------------------------------------------------------------------------------------------


def train(
    context: Context, name: str, recipe: str, *, start: str, steps: int, lr: float, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Fit a recipe of the tiny world, without its validation, and export the model; a killed fit is resumed.

    Args:
        context: the quick start.
        name: of the stage.
        recipe: its name below ``recipes/tiny``.
        start: model that the training starts from.
        steps: optimiser steps at full scale.
        lr: peak learning rate.
        settings: further settings of the recipe, by dotted name.

    Returns:
        Where the model is, and the number of steps.
    """
    from stepkd.models.checkpoint import export_model
    from stepkd.training.fit import fit

    folder, steps = context.out / name, max(2, round(steps * context.scale))
    if not (folder / "model").is_dir():
        changes = {
            "seed_everything": context.seed,
            "trainer.max_steps": steps,
            "trainer.val_check_interval": None,
            "model.init_args.policy.path": start,
            "model.init_args.policy.init_seed": context.seed,
            "model.init_args.optimizer.lr": lr,
            "data.init_args.validation": None,
        }
        result = fit([f"tiny/{recipe}"], {**changes, **settings}, out=folder, resume=True)
        if result.status != "finished":
            raise StepkdError(f"the training in {folder} was stopped, its state is saved: the same command resumes it")
        export_model(folder, folder / "model", overwrite=True)
    return {"model": f"{name}/model", "steps": steps}


def task_options(context: Context, n: int, **more: Any) -> dict[str, Any]:
    """Settings of a recipe that trains on ``n`` generated problems: the quick start's task and seed."""
    return {"data.init_args.train.options": {"task": TASK, "n": n, "seed": context.seed, **more}}


def train_teacher(context: Context) -> dict[str, Any]:
    """A teacher from clean solutions."""
    settings = {"model.init_args.optimizer.warmup": 0.05, **task_options(context, 20_000)}
    return train(context, "teacher", "sft", start="tiny-0.5m", steps=800, lr=3e-3, settings=settings)


def train_student(context: Context) -> dict[str, Any]:
    """A student that knows, but does not do reliably: the teacher's weights, then demonstrations with slips."""
    settings = {"model.init_args.optimizer.warmup": 0.05, **task_options(context, 20_000, noise=NOISE)}
    start = context.model("teacher")
    return {**train(context, "student", "sft", start=start, steps=200, lr=1e-3, settings=settings), "noise": NOISE}


def train_prm(context: Context) -> dict[str, Any]:
    """Labels of the student's solutions, a reward model from the student's weights, best-of-8."""
    student = context.model("student")
    rows, labels = student_labels(context)
    settings = {"model.init_args.optimizer.warmup": 0.05, **rows}
    section = train(context, "prm", "prm", start=student, steps=400, lr=1e-3, settings=settings)
    section |= {"labelled_solutions": labels["labelled"], "monte_carlo": monte_carlo(context, student)}
    return section | best_of_n(context, student)


def train_step_kto(context: Context) -> dict[str, Any]:
    """Step-KTO from the student's weights, and what it does to correct answers and to the incorrect steps in them."""
    rows, labels = student_labels(context)
    section = train(context, "step_kto", "step_kto", start=context.model("student"), steps=60, lr=1e-4, settings=rows)
    conflicts = labels["correct_answers_with_an_incorrect_step"]
    return section | {
        "labelled_solutions": labels["labelled"],
        "conflicts": conflicts,
        "evaluation": compare_with_student(context, "step_kto"),
    }


def train_gkd(context: Context) -> dict[str, Any]:
    """On-policy GKD from the student's weights, and how like its teacher the student was and has become."""
    teacher, student = context.model("teacher"), context.model("student")
    settings = {
        "model.init_args.teacher.init_args.path": teacher,
        "model.init_args.source.lmbda": 1.0,
        **task_options(context, 5_000),
    }
    section = train(context, "gkd", "gkd", start=student, steps=50, lr=3e-4, settings=settings)
    evaluation = compare_with_student(context, "gkd")
    alike = {name: fidelity(context, context.model(name), teacher) for name in ("student", "gkd")}
    context.console.print(
        f"reverse KL to the teacher on own samples of {context.problems(64)} problems, nats a token: "
        f"{alike['student']['reverse_kl']:.3f} before, {alike['gkd']['reverse_kl']:.3f} after"
    )
    return {**section, "evaluation": evaluation, "fidelity": alike}


def train_kdrl(context: Context) -> dict[str, Any]:
    """KDRL from the student's weights: one objective of rewards and distillation, on the same samples."""
    settings = {"model.init_args.teacher.init_args.path": context.model("teacher"), **task_options(context, 5_000)}
    section = train(context, "kdrl", "kdrl", start=context.model("student"), steps=30, lr=1e-4, settings=settings)
    return {**section, "evaluation": compare_with_student(context, "kdrl")}


# ---- jobs ------------------------------------------------------------------------------------------------------------


def student_labels(context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """The student's own solutions, every step labelled by the exact checker; drawn once for all stages.

    Returns:
        Settings of a recipe that trains on them, and the job's summary.
    """
    solutions = sampled(context, context.problem_source(2000), samples=4)
    rows, summary = label(context.out / "labels", solutions, TaskChecker())
    train = {"source": "rows", "path": str(rows), "options": {}}
    return {"data.init_args.train": train, "data.init_args.allow_one_class": context.scale < 1}, summary


def sampled(context: Context, problems: str, *, samples: int, dedupe: bool = True) -> Sampled:
    """Solutions that a labelling job samples from the student."""
    sampling = SamplingConfig(n=samples, max_new_tokens=NEW_TOKENS, seed=context.seed)
    return Sampled(problems=problems, model=context.model("student"), sampling=sampling, dedupe=dedupe)


def label(out: Path, solutions: SolutionsConfig, labeller: LabellerConfig) -> tuple[Path, dict[str, Any]]:
    """Run (or resume) a labelling job; its rows and its summary."""
    from stepkd.labels.job import run_label_job

    config = LabelConfig(out=str(out), solutions=solutions, labeller=labeller, device="cpu", max_rows=MAX_ROWS)
    summary = run_label_job(config)
    assert summary is not None, "one rank does all the work"
    return out / LABELS_NAME, summary


def monte_carlo(context: Context, student: str) -> dict[str, Any]:
    """How true labels from 8 continuations per step are, for when there is no checker."""
    from stepkd.labels.quality import label_quality

    folder = context.out / "prm"
    solutions = sampled(context, context.problem_source(60, seed=context.seed + 1), samples=4)
    continuations = SamplingConfig(n=8, max_new_tokens=NEW_TOKENS, seed=context.seed)
    labels, _ = label(folder / "monte-carlo", solutions, MonteCarlo(sampling=continuations))
    truth, _ = label(folder / "truth", Existing(completions=str(labels), model=student), TaskChecker())
    quality = label_quality(*([row for row, _ in read_rows(path)] for path in (labels, truth))).to_dict()
    if quality["balanced_accuracy"] is not None:
        context.console.print(
            "Monte-Carlo labels (8 continuations per step) against the exact checker: balanced accuracy "
            f"{percent(quality['balanced_accuracy'], ' ')}",
            highlight=False,
        )
    return quality


def best_of_n(context: Context, student: str) -> dict[str, Any]:
    """Best-of-8 by the reward model against the majority, and how well it tells correct steps from incorrect ones."""
    from stepkd.evaluation.best_of_n import best_of_n_from_files
    from stepkd.evaluation.config import ScoreConfig
    from stepkd.evaluation.score_rows import score_file
    from stepkd.evaluation.step_metrics import labelled_steps, step_metrics

    folder = context.out / "prm"
    solutions = sampled(context, context.problem_source(150, split="test"), samples=CHOICES, dedupe=False)
    held_out, _ = label(folder / "held-out", solutions, TaskChecker())
    scores = str(folder / "scores")
    scoring = ScoreConfig(
        scorer=context.model("prm"), completions=str(held_out), out=scores, device="cpu", max_rows=MAX_ROWS
    )
    summary = score_file(scoring)
    ks = [2**i for i in range(CHOICES.bit_length())]
    grading = GradingConfig(extractors=("hash",))
    curve = best_of_n_from_files({"prm": scores}, ks=ks, grading=grading, seed=context.seed, samples=CHOICES)
    judged = [row for row in read_results(scores) if None not in row["step_scores"]]
    steps = labelled_steps(
        [row["step_scores"] for row in judged],
        [row["step_labels"] for row in judged],
        problems=[row["problem_id"] for row in judged],
        up_to_first_error=True,
    )
    metrics = step_metrics(steps, seed=context.seed).to_dict()
    table = _table(
        f"choosing among {CHOICES} of the student's solutions, 95% intervals", "choice", [f"N={k}" for k in curve.ks]
    )
    for name, text in (("majority", "majority"), ("prm", "process reward model"), ("pass", "any correct (ceiling)")):
        table.add_row(text, *(percent(each.to_dict()) for each in curve.curves[name]))
    context.console.print(table)
    if (auroc := metrics["auroc"]) is not None:
        context.console.print(
            f"correct against incorrect steps, up to the first error: AUROC {auroc['value']:.3f} "
            f"({auroc['low']:.3f} to {auroc['high']:.3f})",
            highlight=False,
        )
    return {"best_of_n": curve.to_dict(), "step_metrics": metrics, "unscored": summary["rows"] - len(judged)}


def fidelity(context: Context, model: str, teacher: str) -> dict[str, float]:
    """How like its teacher a model is on held-out problems (:mod:`stepkd.modules.fidelity`)."""
    from stepkd.training.fit import validate

    prefix = "val/fidelity/"
    found = validate(
        ["tiny/gkd"],
        {
            "seed_everything": context.seed,
            "trainer.enable_progress_bar": False,
            "model.init_args.policy.path": model,
            "model.init_args.teacher.init_args.path": teacher,
            "model.init_args.validation": None,
            "model.init_args.fidelity.sampling.max_new_tokens": NEW_TOKENS,
            "data.init_args.validation.split": "test",
            "data.init_args.validation.options": {"task": TASK, "n": context.problems(64), "seed": context.seed},
        },
    )
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


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
        ("correct answer, every step correct", True, True),
        ("correct answer, but an incorrect step: what step-level supervision is for", True, False),
        ("incorrect answer", False, False),
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
    for step, correct in zip(solution_steps(sample["completion"]), sample["step_labels"], strict=True):
        text.append("  ✓ " if correct else "  ✗ ", style="green" if correct else "bold red")
        text.append(step.strip() + "\n", style="" if correct else "red")
    return text


def evaluate_models(context: Context, names: Sequence[str], *, greedy: bool = False) -> dict[str, Any]:
    """Evaluate stages' models on held-out problems with four samples each, and show them side by side.

    Args:
        context: the quick start.
        names: of the stages.
        greedy: also with one greedy solution.

    Returns:
        Of every model and way of sampling (``greedy``, ``sampled``) the numbers of problems and samples, and metrics.
    """
    from stepkd.evaluation.config import EvaluateConfig
    from stepkd.evaluation.runner import evaluate

    ways = {"greedy": (1, 0.0)} if greedy else {}
    shown = {
        "correct, greedy": ("greedy", "pass@1"),
        "correct, sampled": ("sampled", "pass@1"),
        "majority of 4": ("sampled", "maj@4"),
        "steps correct": ("sampled", "step_accuracy"),
        "correct answer, incorrect step": ("sampled", "correct_with_incorrect_step"),
    }
    shown = {title: each for title, each in shown.items() if greedy or each[0] == "sampled"}
    table = _table(f"held-out problems of {TASK}, 95% intervals", "model", tuple(shown))
    section: dict[str, Any] = {name: {} for name in names}
    for name, found in section.items():
        for how, (samples, temperature) in (ways | {"sampled": (4, 1.0)}).items():
            config = EvaluateConfig(
                model=context.model(name),
                benchmark="task",
                data=f'task="{TASK}",n={context.problems(200)},seed={context.seed}',
                sampling=SamplingConfig(
                    n=samples, temperature=temperature, max_new_tokens=NEW_TOKENS, seed=context.seed
                ),
                max_rows=MAX_ROWS,
                device="cpu",
                out=str(context.out / "evaluations" / f"{name}-{how}"),
            )
            summary = evaluate(config)
            found[how] = {key: summary[key] for key in ("problems", "samples", "metrics")}
        table.add_row(
            name.replace("_", "-"), *(percent(found[how]["metrics"][metric]) for how, metric in shown.values())
        )
    context.console.print(table)
    return section


def compare_with_student(context: Context, name: str) -> dict[str, Any]:
    """Evaluate a stage's model beside the student; its numbers."""
    return dict(evaluate_models(context, ("student", name))[name]["sampled"])


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def percent(metric: Mapping[str, Any], gap: str = "\n") -> str:
    """``93.0%`` with ``(88.6 to 95.8)`` behind the gap; a dash where the metric is undefined."""
    if metric["value"] is None:
        return "-"
    interval = "" if metric["low"] is None else f"{gap}({100 * metric['low']:.1f} to {100 * metric['high']:.1f})"
    return f"{100 * metric['value']:.1f}%{interval}"


STAGES: list[Stage] = [
    Stage("teacher", "train a 0.5M-parameter teacher on clean step-by-step solutions", train_teacher),
    Stage("student", "make a noisy student of it: a little more training, on solutions with slips", train_student),
    Stage(
        "evaluate",
        "evaluate both on problems they have not seen",
        partial(evaluate_models, names=("teacher", "student"), greedy=True),
    ),
    Stage("samples", "the student's solutions, every step checked", show_samples),
    Stage("prm", "a process reward model from the student's own completions, and best-of-8 with it", train_prm),
    Stage(
        "step_kto",
        "Step-KTO: the student learns from its own correct and incorrect answers and steps",
        train_step_kto,
    ),
    Stage("gkd", "GKD: the student learns from its teacher, on solutions of its own", train_gkd),
    Stage("kdrl", "KDRL: rewards for correct answers and distillation, in one objective", train_kdrl),
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
        settings = {"seed": context.seed, "scale": context.scale, "task": TASK}
        write_json(job.out / SUMMARY_NAME, {"settings": settings, "stages": sections})
        context.console.print(f"{stage.name} took {time.perf_counter() - start:.0f} s\n", style="dim")
