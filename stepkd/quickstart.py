"""The quick start: every method of stepkd on tiny models, on this machine, with nothing to download.

``quickstart.yaml`` names its jobs. A stage (:data:`STAGES`) runs some of them, shows what they say, and adds one
section to ``summary.json``. A new method adds a job and a stage.
"""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from stepkd.claims.jobs import Measured, References, run_job
from stepkd.data.config import LABELS_NAME
from stepkd.data.io import read_rows
from stepkd.errors import ConfigError
from stepkd.grading.judge import solution_steps
from stepkd.grading.pool import GradingConfig
from stepkd.runs.files import write_json
from stepkd.runs.job import RESULTS_NAME, SUMMARY_NAME, Job, read_results
from stepkd.runs.progress import Pace, duration
from stepkd.statistics import cluster_bootstrap, shown
from stepkd.yaml_files import read_yaml

StageName = Literal["teacher", "student", "evaluate", "samples", "prm", "step_kto", "gkd", "kdrl"]
"""Names of :data:`STAGES`, in order."""
FILE: Mapping[str, Any] = read_yaml(Path(__file__).with_suffix(".yaml"), "quick start")
JOBS: Mapping[str, Any] = FILE["jobs"]
"""Job -> its kind with its settings."""
FIGURES = "figures"
"""Folder of the pictures, below the run folder."""
ROUNDING = 1e-9
"""A difference of shares up to here is none."""


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
    stage: StageName | None = None
    """The stage that runs: the only one whose model may be trained."""
    _measured: dict[str, Measured] = field(default_factory=dict, init=False, repr=False)  # by folder and settings

    @cached_property
    def named(self) -> dict[str, Any]:
        """The settings that jobs refer to."""
        steps = {name: max(2, round(full * self.scale)) for name, full in FILE["steps"].items()}
        problems = {name: max(8, round(full * self.scale)) for name, full in FILE["problems"].items()}
        own = {"seed": self.seed, "next_seed": self.seed + 1, "small": self.scale < 1}
        return {**FILE["settings"], **steps, **problems, **own}

    def run(self, name: str, folder: str = "", **named: Any) -> tuple[Path, Measured]:
        """Run, or resume, a job and those that it refers to.

        Args:
            name: of the job.
            folder: where, below the run folder; the job's name by default.
            **named: further settings.

        Returns:
            The job's folder (of a fit that of its exported model), and its numbers.

        Raises:
            ConfigError: it needs the model of a stage that has not run.
        """
        found: dict[str, Measured] = {}

        def do(job: str, kind: str, settings: Mapping[str, Any]) -> str:
            out = self.out / (folder if folder and job == name else job)
            if kind != "fit":
                key = f"{out} {settings}"
                if key not in self._measured:  # a job in several stages is not read and summed up again
                    self._measured[key] = run_job(kind, settings, out)
                found[job] = self._measured[key]
                return str(out)
            if not (out / "model").is_dir():
                if job != self.stage:
                    raise ConfigError(f"this stage needs the model of stage {job!r}: run it first (--stages {job} ...)")
                from stepkd.models.checkpoint import export_model

                run_job(kind, settings, out)
                export_model(out, out / "model", overwrite=True)
            return str(out / "model")

        place = References(self.named | named, JOBS, do).of(name)
        return Path(place), found.get(name, Measured())


@dataclass(frozen=True)
class Stage:
    """One step of the quick start."""

    name: StageName
    """Name on the command line, and of its folder."""
    title: str
    """What it does, one line for the terminal."""
    run: Callable[[Context], dict[str, Any]]
    """Does it; returns its section of the summary."""


def _summary_of(folder: Path) -> dict[str, Any]:
    """What a job summed up."""
    return dict(json.loads((folder / SUMMARY_NAME).read_bytes()))


# ---- stages ----------------------------------------------------------------------------------------------------------


def train(context: Context, name: str) -> dict[str, Any]:
    """Fit the recipe of a stage and export the model; a killed fit is resumed. Where the model is, and its steps."""
    context.run(name)
    return {"model": f"{name}/model", "steps": context.named[f"{name}_steps"]}


def _train_teacher(context: Context) -> dict[str, Any]:
    """A teacher that has seen no mistake."""
    section = train(context, "teacher")
    _tell(context, "teacher")
    return section


def _train_student(context: Context) -> dict[str, Any]:
    """A student that knows, but does not do reliably."""
    section = train(context, "student") | {"noise": context.named["noise"]}
    _tell(context, "student")
    return section


def _train_prm(context: Context) -> dict[str, Any]:
    """Labels of the student's solutions, a reward model from the student's weights, best-of-8."""
    section, labels = train(context, "prm"), _summary_of(context.run("labels")[0])
    section |= {"labelled_solutions": labels["labelled"], "monte_carlo": monte_carlo(context)}
    return section | best_of_n(context, section["labelled_solutions"])


def _train_step_kto(context: Context) -> dict[str, Any]:
    """Step-KTO from the student's weights, and what it does to correct answers and to the incorrect steps in them."""
    section, labels = train(context, "step_kto"), _summary_of(context.run("labels")[0])
    section |= {
        "labelled_solutions": labels["labelled"],
        "correct_with_incorrect_step": labels["correct_with_incorrect_step"],
    }
    section["evaluation"] = _compare_with_student(context, "step_kto")
    _tell(context, "step_kto", _differences(context, "step_kto"), **section)
    return section


def _train_gkd(context: Context) -> dict[str, Any]:
    """On-policy GKD from the student's weights, and how like its teacher the student was and has become."""
    section = train(context, "gkd")
    evaluation = _compare_with_student(context, "gkd")
    alike = {name: dict(context.run("alike", evaluated=f"${name}")[1].columns) for name in ("student", "gkd")}
    context.console.print(
        f"reverse KL to the teacher on own samples of {context.named['fidelity_problems']} problems, nats a token: "
        f"{alike['student']['reverse_kl']:.3f} before, {alike['gkd']['reverse_kl']:.3f} after"
    )
    _tell(context, "gkd", _differences(context, "gkd"))
    return {**section, "evaluation": evaluation, "fidelity": alike}


def _train_kdrl(context: Context) -> dict[str, Any]:
    """KDRL from the student's weights: one objective of rewards and distillation, on the same samples."""
    section = train(context, "kdrl") | {"evaluation": _compare_with_student(context, "kdrl")}
    _tell(context, "kdrl", _differences(context, "kdrl"))
    return section


def monte_carlo(context: Context) -> dict[str, Any]:
    """How true labels from 8 continuations per step are, for when there is no checker."""
    from stepkd.labels.quality import label_quality

    folders = [context.run(name)[0] for name in ("monte_carlo", "truth")]
    quality = label_quality(*([row for row, _ in read_rows(each / LABELS_NAME)] for each in folders)).to_dict()
    if quality["balanced_accuracy"] is not None:
        context.console.print(
            "Monte-Carlo labels (8 continuations per step) against the exact checker: balanced accuracy "
            f"{shown(quality['balanced_accuracy'], '.1%')}",
            highlight=False,
        )
    return quality


def best_of_n(context: Context, labelled: int) -> dict[str, Any]:
    """Best-of-8 by the reward model against the majority, and how well it tells correct steps from incorrect ones.

    Args:
        context: the quick start; the figures go to its folder.
        labelled: solutions that the reward model was trained on.

    Returns:
        The curves, the metrics of its step scores, and the number of solutions without scores.
    """
    from stepkd.evaluation.best_of_n import best_of_n_from_files
    from stepkd.evaluation.figures import best_of_n_figure, reliability_diagram
    from stepkd.evaluation.step_metrics import calibration_report, labelled_steps, step_metrics

    scores, choices = str(context.run("scores")[0]), context.named["choices"]
    ks = [2**i for i in range(choices.bit_length())]
    grading = GradingConfig(extractors=("hash",))
    curve = best_of_n_from_files({"prm": scores}, ks=ks, grading=grading, seed=context.seed, samples=choices)
    rows = read_results(scores)
    judged = [row for row in rows if None not in row["step_scores"]]
    steps = labelled_steps(
        [row["step_scores"] for row in judged],
        [row["step_labels"] for row in judged],
        problems=[row["problem_id"] for row in judged],
        up_to_first_error=True,
    )
    metrics = step_metrics(steps, seed=context.seed).to_dict()
    table = Table("choice", *(Column(f"N={k}", justify="right") for k in curve.ks), title_justify="left")
    table.title = f"choosing among {choices} of the student's solutions, 95% intervals"
    named = {"majority": "majority", "prm": "process reward model", "prm_vote": "weighted vote"}
    for name, text in (named | {"pass": "any correct (ceiling)"}).items():
        table.add_row(text, *(shown(each.to_dict(), ".1%", gap="\n") for each in curve.curves[name]))
    context.console.print(table)
    if (auroc := metrics["auroc"]) is not None:
        context.console.print(
            f"correct against incorrect steps, up to the first error: AUROC {shown(auroc)}",
            highlight=False,
        )
    own, best = curve.per_problem["prm"], int(curve.per_problem["prm"].mean(axis=0).argmax())
    before = {"one": own[:, 0], "majority": curve.per_problem["majority"][:, -1], "best": own[:, best]}
    found = {name: cluster_bootstrap(own[:, -1] - each, seed=context.seed).to_dict() for name, each in before.items()}
    if curve.ks[best] in (curve.ks[0], curve.ks[-1]):  # the other two say that
        del found["best"]
    _tell(context, "prm", found, labelled_solutions=labelled, best=curve.ks[best])
    # The figure shows no interval: one resample.
    calibration = calibration_report(steps.scores, steps.labels, problems=steps.problems, n_resamples=1).to_dict()
    for path in (
        best_of_n_figure(curve.to_dict(), context.out / FIGURES / "best_of_n.png"),
        reliability_diagram(calibration, context.out / FIGURES / "reliability.png"),
    ):
        context.console.print(f"figure: {path}", markup=False, highlight=False, soft_wrap=True)
    return {"best_of_n": curve.to_dict(), "step_metrics": metrics, "unscored": len(rows) - len(judged)}


def _show_samples(context: Context) -> dict[str, Any]:
    """Sampled solutions of the student, each step marked by the exact checker."""
    from stepkd.evaluation.metrics import problem_counts

    folder = context.out / "evaluations" / "student-sampled"
    if not (folder / RESULTS_NAME).is_file():
        raise ConfigError(
            "the stage 'samples' shows what stage 'evaluate' sampled: run it first (--stages evaluate samples)"
        )
    rows = sorted(read_results(folder), key=lambda row: row["index"])
    samples = [(row, sample) for row in rows for sample in row["samples"]]
    examples = []
    for title, *wanted in (
        ("correct answer, every step correct", True, True),
        ("correct answer, but an incorrect step: what step-level supervision is for", True, False),
        ("incorrect answer", False, False),
    ):
        for row, sample in samples:
            if [sample["verdict"] == "correct", all(sample["step_labels"])] == wanted:
                context.console.print(f"[bold]{title}[/bold]")
                context.console.print(marked_solution(row["prompt"], sample))
                examples.append({"id": row["id"], "kind": title, "completion": sample["completion"]})
                break
    counts: Mapping[str, Any] = sum((problem_counts(row).counts for row in rows), Counter())
    _tell(context, "samples", **{"correct": 0, "correct_with_incorrect_step": 0, **counts})
    return {"shown": examples}


def marked_solution(prompt: str, sample: dict[str, Any]) -> Text:
    """A solution with a mark before every step."""
    text = Text(f"  {prompt.strip()}\n")
    for step, correct in zip(solution_steps(sample["completion"]), sample["step_labels"], strict=True):
        text.append("  ✓ " if correct else "  ✗ ", style="green" if correct else "bold red")
        text.append(step.strip() + "\n", style="" if correct else "red")
    return text


def _evaluate_models(context: Context, names: Sequence[str], *, greedy: bool = False) -> dict[str, Any]:
    """Evaluate stages' models on held-out problems with four samples each, and show them side by side.

    Args:
        context: the quick start.
        names: of the stages.
        greedy: also with one greedy solution.

    Returns:
        Of every model and way of sampling (``greedy``, ``sampled``) the numbers of problems and samples, and metrics.
    """
    columns = {
        "correct, greedy": ("greedy", "pass@1"),
        "correct, sampled": ("sampled", "pass@1"),
        "majority of 4": ("sampled", "maj@4"),
        "steps correct": ("sampled", "step_accuracy"),
        "correct with an incorrect step": ("sampled", "correct_with_incorrect_step"),
    }
    columns = {title: each for title, each in columns.items() if greedy or each[0] == "sampled"}
    table = Table("model", *(Column(title, justify="right") for title in columns), title_justify="left")
    table.title = f"held-out problems of {context.named['task']}, 95% intervals"
    section: dict[str, Any] = {name: {} for name in names}
    for name, found in section.items():
        for how in ("greedy", "sampled") if greedy else ("sampled",):
            folder, _ = context.run(how, f"evaluations/{name}-{how}", evaluated=f"${name}")
            found[how] = {key: _summary_of(folder)[key] for key in ("problems", "samples", "metrics")}
        cells = (shown(found[how]["metrics"][metric], ".1%", gap="\n") for how, metric in columns.values())
        table.add_row(name.replace("_", "-"), *cells)
    context.console.print(table)
    return section


def _compare_with_student(context: Context, name: str) -> dict[str, Any]:
    """Evaluate a stage's model beside the student; its numbers."""
    return dict(_evaluate_models(context, ("student", name))[name]["sampled"])


def _evaluate(context: Context) -> dict[str, Any]:
    """Teacher and student side by side, and what the slips in the student's demonstrations did."""
    section = _evaluate_models(context, ("teacher", "student"), greedy=True)
    _tell(context, "evaluate", _differences(context, "student", "teacher"))
    return section


# ---- words -----------------------------------------------------------------------------------------------------------


def _differences(context: Context, name: str, base: str = "student") -> dict[str, Any]:
    """A stage's model minus another one on the same problems, sampled, with the report's intervals."""
    from stepkd.evaluation.metrics import paired_differences
    from stepkd.report.content import RESAMPLES

    rows, before = (read_results(context.out / "evaluations" / f"{each}-sampled") for each in (name, base))
    found = paired_differences(rows, before, n_resamples=RESAMPLES)
    return {"correct": found["pass@1"], "correct_with_incorrect_step": found["correct_with_incorrect_step"]}


def paragraph(stage: str, facts: Mapping[str, Any], differences: Mapping[str, Mapping[str, Any] | None]) -> str:
    """What a stage trained on what, how its numbers moved, and why: the figures choose the words.

    Args:
        stage: name of the stage, or of a part of ``paragraphs`` in ``quickstart.yaml``.
        facts: what these words name.
        differences: a number there -> its paired difference (:meth:`~stepkd.statistics.Interval.to_dict`), a share; one
            that is undefined is left out.
    """
    words = FILE["paragraphs"][stage]
    sentences = [words["trained"].format_map(facts)]
    for name, difference in differences.items():
        if difference is not None and difference["low"] is not None:
            rose, fell = difference["low"] > ROUNDING, difference["high"] < -ROUNDING
            verdict = "rose" if rose else "fell" if fell else "no clear change"
            number = shown(difference, "+.1f", scale=100.0)
            sentences.append(f"{words[name]['what'].format_map(facts)}: {verdict}, {number} points.")
            sentences.append(words[name].get(verdict, ""))
    return " ".join(filter(None, sentences))


def _tell(
    context: Context, stage: StageName, differences: Mapping[str, Mapping[str, Any] | None] | None = None, **facts: Any
) -> None:
    """Print the paragraph of a stage."""
    text = paragraph(stage, context.named | facts, differences or {})
    context.console.print(text, style="italic", markup=False, highlight=False)


def next_commands(out: Path) -> list[str]:
    """Commands that look closer at a quick start, or train from its models: those whose folders are there."""
    from stepkd.runs.rundir import free_path

    names = {"out": shlex.quote(str(out)), "new": free_path(Path("runs/tiny-gkd"))}
    commands = [line.format_map(names) for line in FILE["next"]]
    named = {
        line: [word for word in shlex.split(line) if word.startswith(f"{out}/") and word != str(names["new"])]
        for line in commands
    }
    return [line for line, words in named.items() if all(Path(word).exists() for word in words)]


STAGES: list[Stage] = [
    Stage("teacher", "train a 0.5M-parameter teacher on clean step-by-step solutions", _train_teacher),
    Stage("student", "make a noisy student of it: a little more training, on solutions with slips", _train_student),
    Stage("evaluate", "evaluate both on problems they have not seen", _evaluate),
    Stage("samples", "the student's solutions, every step checked", _show_samples),
    Stage("prm", "a process reward model from the student's own completions, and best-of-8 with it", _train_prm),
    Stage(
        "step_kto",
        "Step-KTO: the student learns from its own correct and incorrect answers and steps",
        _train_step_kto,
    ),
    Stage("gkd", "GKD: the student learns from its teacher, on solutions of its own", _train_gkd),
    Stage("kdrl", "KDRL: rewards for correct answers and distillation, in one objective", _train_kdrl),
]
"""All stages in order; later methods append theirs."""

PHASE = "stages"


def run_stages(context: Context, stages: Sequence[Stage], job: Job) -> None:
    """Run stages in order, each with its title, its wall time and the time left; finished ones are not repeated.

    Args:
        context: the quick start.
        stages: what to run, in order.
        job: the quick start's job, begun; ``summary.json`` holds one section per finished stage.
    """
    seconds, pace, done_seconds = FILE["seconds"], Pace(0), 0
    total = seconds["report"] + sum(seconds[each.name] for each in stages if job.missing(PHASE, [each.name]))
    context.console.print(
        f"at --scale 1 on two CPU cores this takes about {duration(total)} (minutes:seconds)\n", style="dim"
    )
    for number, stage in enumerate(stages, start=1):
        context.console.rule(f"[bold]{number}/{len(stages)} {stage.name}[/bold]: {stage.title}", align="left")
        if not job.missing(PHASE, [stage.name]):
            context.console.print("finished earlier, not repeated")
            continue
        start = time.perf_counter()
        context.stage = stage.name
        job.once(PHASE, stage.name, partial(stage.run, context))
        sections = {each.name: facts for each in STAGES if (facts := job.facts(PHASE, each.name)) is not None}
        settings = {"seed": context.seed, "scale": context.scale, "task": context.named["task"]}
        write_json(job.out / SUMMARY_NAME, {"settings": settings, "stages": sections})
        done_seconds += seconds[stage.name]
        left = pace.left(done_seconds, total).strip()
        left = left and f"; all stages and the report: about {left}"
        context.console.print(f"{stage.name} took {time.perf_counter() - start:.0f} s{left}\n", style="dim")
