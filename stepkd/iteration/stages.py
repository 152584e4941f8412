"""The stages of one iteration: label, convert or pairs, train, export; greedy, samples, judge, measure.

Every stage is a unit of the run's job, done once from inputs that are checked; an interrupted one is resumed by the job
or run that it stands for. Labelling and training run under the launcher where one is given, the rest in this process.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from stepkd.data.config import LABELS_NAME, PAIRS_NAME, parse_spec
from stepkd.data.load import load_rows
from stepkd.errors import ConfigError, DataError, StepkdError
from stepkd.iteration.spec import IterateConfig, iteration_seed
from stepkd.labels.convert import Demonstrations
from stepkd.labels.labellers import Outcome
from stepkd.labels.monte_carlo import MonteCarlo
from stepkd.labels.settings import PAIR_JOBS, Existing, LabelConfig, OwnSteps, PairJobConfig, Sampled
from stepkd.runs.files import write_file, write_jsonl
from stepkd.runs.job import RESULTS_NAME, SUMMARY_NAME, Job, JobOptions
from stepkd.yaml_files import as_yaml, find_recipe, nested, yaml_text

Report = Callable[[str], None]

SETTINGS_NAME = "settings.yaml"
"""What an iteration adds to the training recipes."""
CONVERTED_NAME = "converted.jsonl"
BLOCK = 1 << 12
"""Bytes read at once from a large file."""


@dataclass(frozen=True)
class Iteration:
    """One iteration k: M_{k-1} labels, M_k is trained (k >= 1) and evaluated (k >= 0)."""

    spec: IterateConfig
    """Settings."""
    job: Job
    """The whole run; its folder holds those of the iterations."""
    k: int
    """Number; 0 only evaluates M0."""
    seed_weights: str
    """Fingerprint of M0."""
    report: Report
    """Told what goes on, one line at a time."""

    @property
    def folder(self) -> Path:
        """Folder of this iteration."""
        return self.job.out / self.phase(self.k)

    @staticmethod
    def phase(k: int) -> str:
        """Name of iteration k in the run's job, and of its folder."""
        return f"iteration-{k}"

    def model(self, k: int) -> str:
        """Path of M_k."""
        return self.spec.model if k == 0 else str(self.job.out / self.phase(k) / "model")

    def identity(self, k: int) -> str:
        """Fingerprint of M_k."""
        if k == 0:
            return self.seed_weights
        found, trained = folder_fingerprint(Path(self.model(k))), replace(self, k=k)
        if trained.is_done("export") and trained.facts("export")["model"] != found:
            raise ConfigError(
                f"{self.model(k)} is no longer the model that iteration {k} trained (it has changed since): put it "
                "back, or start again with another --out (or --overwrite)"
            )
        return found

    def is_done(self, stage: str) -> bool:
        """Whether a stage is finished."""
        return not self.job.missing(self.phase(self.k), [stage])

    def facts(self, stage: str) -> dict[str, Any]:
        """What a finished stage left."""
        return self.job.once(self.phase(self.k), stage, dict)

    def run(
        self, stage: str, inputs: Mapping[str, Any], work: Callable[[], Mapping[str, Any]], line: str
    ) -> dict[str, Any]:
        """Do a stage, unless it is done; its facts.

        Raises:
            ConfigError: it was done from other inputs.
        """

        def told() -> Mapping[str, Any]:
            import torch

            self.tell(line)
            facts = work()
            if torch.cuda.is_available():  # memory for the next stage, or its processes
                gc.collect()
                torch.cuda.empty_cache()
            return facts

        return self.job.once(self.phase(self.k), stage, told, inputs=inputs)

    def tell(self, line: str) -> None:
        """Report, with the iteration's number."""
        self.report(f"iteration {self.k}/{self.spec.iterations}: {line}")


def train_next(it: Iteration) -> dict[str, dict[str, Any]]:
    """Label with M_{k-1}, train and export M_k; returns the facts of every stage.

    Raises:
        DataError: the labels have no correct or no incorrect answer, or conversion leaves nothing.
    """
    k, labels, facts = it.k, it.folder / "labels", {}

    def run(name: str, inputs: Mapping[str, Any], work: Callable[[], Mapping[str, Any]], line: str) -> None:
        facts[name] = it.run(name, inputs, work, line)

    job = it.spec.label_spec(k, out=str(labels), model=it.model(k - 1))
    line = f"M{k - 1} writes solutions, labeller: {type(job.labeller).__name__}"
    run("label", {"model": it.identity(k - 1)}, lambda: _run_job(it, job, LABELS_NAME), line)
    _check_answers(it, facts["label"])
    rows = labels / LABELS_NAME
    if it.spec.convert is not None:
        inputs = {"labels": file_fingerprint(rows)}
        run("convert", inputs, lambda: _convert(it, labels), f"labels to {type(it.spec.convert).__name__}")
        rows = it.folder / CONVERTED_NAME
    if it.spec.pairs is not None:
        inputs = {"model": it.identity(k - 1), "labels": file_fingerprint(rows)}
        run("pairs", inputs, lambda: _pairs(it, job), f"M{k - 1} draws {type(it.spec.pairs).__name__}")
        rows = it.folder / "pairs" / PAIRS_NAME
    inputs = {"model": it.identity(k - 1), "rows": file_fingerprint(rows)}
    run("train", inputs, lambda: _train(it, rows), f"training M{k}")
    run("export", {"train": facts["train"]["run"]}, lambda: _export(it), f"exporting M{k}")
    return facts


def evaluate_model(it: Iteration) -> dict[str, dict[str, Any]]:
    """Evaluate M_k on the held-out problems; returns the facts of every stage. Rows: ``evaluation/results.jsonl``."""
    from stepkd.iteration.measure import problem_rows

    k, folder = it.k, it.folder / "evaluation"
    inputs = {"model": it.identity(k)}
    facts = {}

    def run(name: str, work: Callable[[], Mapping[str, Any]], line: str, **more: str) -> None:
        facts[name] = it.run(name, inputs | more, work, line)

    run("greedy", lambda: _greedy(it, folder / "greedy"), f"M{k} solves the held-out problems, greedy")
    drawn = it.spec.held_out_spec(out=str(folder / "samples"), model=it.model(k))
    judged: LabelConfig | None = None
    assert isinstance(drawn.solutions, Sampled)
    if isinstance(drawn.labeller, MonteCarlo):
        # Continuations come from M0 for every model: the same judge for all of them. The steps stay as they were cut.
        existing = Existing(completions=drawn.out, model=it.spec.model)
        judged = replace(drawn, out=str(folder / "labels"), solutions=existing, steps=OwnSteps())
        drawn = replace(drawn, labeller=Outcome())
    n = it.spec.evaluation.sampling.n
    run("samples", lambda: _run_job(it, drawn, LABELS_NAME), f"M{k} samples {n} solutions of every held-out problem")
    samples = file_fingerprint(Path(drawn.out) / LABELS_NAME)
    if judged is not None:
        job = judged
        run(
            "judge",
            lambda: _run_job(it, job, LABELS_NAME),
            f"continuations by M0 label the steps of M{k}",
            samples=samples,
        )
    folders = [
        Path(each.out) for each in (judged, drawn) if each is not None and not isinstance(each.labeller, Outcome)
    ]

    def measure() -> dict[str, Any]:
        rows = problem_rows(Path(drawn.out), folders[0] if folders else None, drawn, seed_model=it.spec.model)
        write_jsonl(folder / RESULTS_NAME, rows)
        return {"problems": len(rows), "samples": sum(len(row["samples"]) for row in rows)}

    run("measure", measure, f"comparing M{k} with M0" if k else "the results of M0", samples=samples)
    return facts


def _run_job(it: Iteration, job: LabelConfig | PairJobConfig, rows: str) -> dict[str, Any]:
    """Run a labelling or pair job to its end, under the launcher where one is given; its summary."""
    from stepkd.labels.job import run_label_job, run_pair_job

    out = Path(job.out)
    if it.spec.launcher is not None:
        file = out.with_name(f"{out.name}.yaml")
        write_file(file, yaml_text(as_yaml(job)).encode())
        command = next((["pairs", name] for name, kind in PAIR_JOBS.items() if type(job) is kind), ["label"])
        _launch(it, [*command, "--config", str(file)])
    elif isinstance(job, LabelConfig):
        run_label_job(job, options=JobOptions(report=_quarters(it)))
    else:
        run_pair_job(job, options=JobOptions(report=_quarters(it)))
    if not (out / rows).is_file():
        raise StepkdError(f"iteration {it.k}: the job in {out} ended without {rows}")
    summary: dict[str, Any] = json.loads((out / SUMMARY_NAME).read_bytes())
    return {name: value for name, value in summary.items() if name != "by_position"}


def _launch(it: Iteration, words: Sequence[str]) -> None:
    """Run a command of stepkd under the launcher.

    Raises:
        StepkdError: it failed; it has said why.
    """
    command = [*shlex.split(str(it.spec.launcher)), "-m", "stepkd", *words]
    it.tell(f"  {shlex.join(command)}")
    code = subprocess.run(command, check=False).returncode
    if code:
        raise StepkdError(
            f"iteration {it.k}: `stepkd {words[0]}` under the launcher ended with exit code {code}; its messages are "
            "above. Mend that and give the same command again"
        )


def _quarters(it: Iteration) -> Callable[[str, int, int, Mapping[str, float]], None]:
    """A line per quarter of a phase's work."""
    seen: dict[str, int] = {}

    def report(phase: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        part = done * 4 // total
        if part > seen.get(phase, 0):
            seen[phase] = part
            shown = "".join(f"  {name} {value:.1%}" for name, value in figures.items())
            it.tell(f"  {phase} {done}/{total}{shown}")

    return report


def _check_answers(it: Iteration, summary: Mapping[str, Any]) -> None:
    """Stop where the labels cannot teach anything: every answer is incorrect, or none is and training needs some."""
    correct, incorrect = summary["correct_answers"], summary["incorrect_answers"]
    if correct and (incorrect or isinstance(it.spec.convert, Demonstrations)):
        return
    lacking, remedy = (
        ("incorrect", "harder problems or a higher temperature")
        if correct
        else ("correct", "easier problems or a better M0")
    )
    raise DataError(
        f"iteration {it.k} has no {lacking} answer to learn from ({correct} correct, {incorrect} incorrect among "
        f"{summary['labelled']} labelled solutions of M{it.k - 1}): take {remedy}, or more samples, in another --out. "
        "What is done is kept",
        path=it.folder / "labels",
    )


def _convert(it: Iteration, labels: Path) -> dict[str, Any]:
    from stepkd.labels.convert import convert_rows

    converter = it.spec.converter(it.k)
    to = type(converter).__name__
    try:
        converted = convert_rows(load_rows(parse_spec(str(labels))), converter)
    except DataError as error:
        raise DataError(f"iteration {it.k}, conversion to {to}: {error}", path=labels) from error
    written = converter.write(converted.rows, it.folder / CONVERTED_NAME)
    return {"to": to, "rows": written, "counts": converted.counts}


def _pairs(it: Iteration, job: LabelConfig) -> dict[str, Any]:
    """Run the pair job to its end."""
    try:
        summary = _run_job(it, it.spec.pair_spec(it.k, job, out=str(it.folder / "pairs")), PAIRS_NAME)
    except DataError as error:
        raise DataError(f"iteration {it.k}, pairs: {error}") from error
    return {"to": type(it.spec.pairs).__name__, "counts": {"pairs": summary["pairs"], **summary["dropped"]}}


def training_settings(it: Iteration, rows: Path) -> dict[str, Any]:
    """What iteration k adds to the training recipes: where it starts, what it reads, its reference and its seed."""
    # The recipe's training data may be of another source: none of its settings must stay.
    none: dict[str, Any] = {"split": None, "limit": None, "offset": 0, "options": {}, "columns": {}}
    settings: dict[str, Any] = {
        "seed_everything": iteration_seed(it.spec.seed, "train", it.k),
        **it.spec.train.dotted(),
        "model.init_args.policy.path": it.model(it.k - 1),
        "data.init_args.train": {"source": "rows", "path": str(rows), **none},
    }
    if it.spec.reference == "kept":
        settings["model.init_args.reference"] = {"path": it.spec.model}
    return nested(settings)


def _train(it: Iteration, rows: Path) -> dict[str, Any]:
    from stepkd.runs.rundir import read_marker
    from stepkd.training.fit import fit

    run, settings = it.folder / "train", training_settings(it, rows)
    recipes = [str(find_recipe(name)) for name in it.spec.train.recipes]
    text = f"# Written by stepkd iterate: what iteration {it.k} adds to the training recipes.\n"
    write_file(it.folder / SETTINGS_NAME, (text + yaml.safe_dump(settings, sort_keys=False)).encode())
    if (read_marker(run) or {}).get("status") != "finished":
        if it.spec.launcher is None:
            fit(recipes, settings, out=run, resume=True)
        else:
            words = [word for name in (*recipes, str(it.folder / SETTINGS_NAME)) for word in ("--config", name)]
            _launch(it, ["fit", *words, "--out", str(run), "--resume", "true"])
    marker = read_marker(run) or {}
    if marker.get("status") != "finished":
        raise StepkdError(
            f"iteration {it.k}: the training in {run} ended without being finished: {marker.get('message')}"
        )
    with open(rows, encoding="utf-8") as file:
        count = sum(1 for line in file if line.strip())
    return {"rows": count, "run": str(marker["created"])}


def _export(it: Iteration) -> dict[str, Any]:
    from stepkd.models.checkpoint import export_model

    folder = export_model(it.folder / "train", it.model(it.k), overwrite=True)
    return {"model": folder_fingerprint(folder)}


def _greedy(it: Iteration, folder: Path) -> dict[str, Any]:
    from stepkd.data.rows import PROBLEM
    from stepkd.data.sources import asking
    from stepkd.evaluation.config import EvaluateConfig
    from stepkd.evaluation.runner import evaluate
    from stepkd.models.source import template_for
    from stepkd.sampling.sampler import SamplingConfig
    from stepkd.tasks.rows import is_task_row

    job = it.spec.held_out_spec(out=str(folder), model=it.model(it.k))
    benchmark, data = it.spec.evaluated_benchmark()
    problems = parse_spec(it.spec.evaluation.problems)
    is_task = all(map(is_task_row, load_rows(problems, contract=PROBLEM)))
    how = asking(problems.source, is_task=is_task)  # prompt, extractors and length are those of the sampled solutions
    solutions = job.solutions
    assert isinstance(solutions, Sampled)
    summary = evaluate(
        EvaluateConfig(
            model=solutions.model,
            benchmark=benchmark,
            data=data,
            out=str(folder),
            sampling=SamplingConfig(
                temperature=0.0,
                max_new_tokens=solutions.sampling.max_new_tokens or how.max_new_tokens,
                stop=solutions.sampling.stop,
                seed=solutions.sampling.seed,
            ),
            grading=replace(job.grading, extractors=job.grading.extractors or how.extractors),
            template=template_for(solutions.model, how.template, job.template),
            dtype=job.dtype,
            device=job.device,
            max_rows=job.max_rows,
        )
    )
    return {"pass@1": summary["metrics"]["pass@1"]}


def file_fingerprint(path: Path) -> str:
    """Short hash of a file's content.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror}), and a finished stage made it: put it back, or start again with "
            "--overwrite",
            path=path,
        ) from error


def folder_fingerprint(folder: Path) -> str:
    """Short hash of a model folder: names, sizes, and 64 blocks of each file, evenly spaced.

    Enough to recognise a changed model in milliseconds, not a proof.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(
            "the model that a finished stage left is gone: put it back, or start again with --overwrite", path=folder
        )
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for start in sorted({max(0, size - BLOCK) * i // 63 for i in range(64)}):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]
