"""The stages of one iteration: label, convert or pairs, train, export; samples, greedy, judge, measure.

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
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from stepkd.data.config import LABELS_NAME, PAIRS_NAME, parse_spec
from stepkd.data.io import read_rows
from stepkd.data.load import load_rows
from stepkd.errors import ConfigError, DataError, StepkdError
from stepkd.iteration.spec import IterateConfig, iteration_seed
from stepkd.labels.convert import Demonstrations
from stepkd.labels.labellers import Outcome
from stepkd.labels.monte_carlo import MonteCarlo
from stepkd.labels.settings import PAIR_JOBS, Existing, LabelConfig, OwnSteps, PairJobConfig
from stepkd.models.policy import Policy
from stepkd.runs.files import write_file, write_jsonl
from stepkd.runs.job import RESULTS_NAME, SUMMARY_NAME, Job, JobOptions, read_settings
from stepkd.sampling.config import VLLMServer
from stepkd.yaml_files import as_yaml, find_recipe, nested, yaml_text

TRAIN_SETTINGS_NAME = "settings.yaml"
"""What an iteration adds to the training recipes."""
CONVERTED_NAME = "converted.jsonl"


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
    report: Callable[[str], None]
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
        found, exported = fingerprint(Path(self.model(k))), replace(self, k=k).facts("export")
        if exported is not None and exported["model"] != found:
            raise ConfigError(
                f"{self.model(k)} is no longer the model that iteration {k} trained (it has changed since): put it "
                "back, or start again with another --out (or --overwrite)"
            )
        return found

    def facts(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage left; None: it is not finished."""
        return self.job.facts(self.phase(self.k), stage)

    def once(
        self, stage: str, inputs: Mapping[str, Any], work: Callable[[], Mapping[str, Any]], line: str
    ) -> dict[str, Any]:
        """Do a stage, unless it is done; its facts.

        Raises:
            ConfigError: it was done from other inputs.
            DataError: it has nothing to work from; the message names iteration and stage.
        """

        def told() -> Mapping[str, Any]:
            import torch

            self.tell(line)
            try:
                facts = work()
            except DataError as error:
                raise DataError(f"iteration {self.k}, {stage}: {error}") from error
            gc.unfreeze()  # vLLM freezes what it made
            gc.collect()  # memory for the next stage, or its processes
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return facts

        return self.job.once(self.phase(self.k), stage, told, inputs=inputs)

    def tell(self, line: str) -> None:
        """Report, with the iteration's number."""
        self.report(f"iteration {self.k}/{self.spec.iterations}: {line}")


def train_next(it: Iteration) -> None:
    """Label with M_{k-1}, train and export M_k.

    Raises:
        DataError: the labels have no correct or no incorrect answer, or conversion leaves nothing.
    """
    k, spec, labels = it.k, it.spec, it.folder / "labels"
    job = spec.label_spec(k, out=str(labels), model=it.model(k - 1))
    line = f"M{k - 1} writes solutions, labeller: {type(job.labeller).__name__}"
    _check_answers(it, it.once("label", {"model": it.identity(k - 1)}, lambda: _run_job(it, job), line))
    rows = labels / LABELS_NAME
    if spec.convert is not None:
        line = f"labels to {type(spec.convert).__name__}"
        it.once("convert", {"labels": fingerprint(rows)}, lambda: _convert(it, labels), line)
        rows = it.folder / CONVERTED_NAME
    if spec.pairs is not None:
        inputs = {"model": it.identity(k - 1), "labels": fingerprint(rows)}
        it.once("pairs", inputs, lambda: _pairs(it, job), f"M{k - 1} draws {type(spec.pairs).__name__}")
        rows = it.folder / "pairs" / PAIRS_NAME
    inputs = {"model": it.identity(k - 1), "rows": fingerprint(rows)}
    trained = it.once("train", inputs, lambda: _train(it, rows), f"training M{k}")
    it.once("export", {"train": trained["created"]}, lambda: _export(it), f"exporting M{k}")


def evaluate_model(it: Iteration) -> None:
    """Evaluate M_k on the held-out problems. Rows: ``evaluation/results.jsonl``."""
    from stepkd.iteration.measure import problem_rows

    k, folder = it.k, it.folder / "evaluation"
    model, judged = {"model": it.identity(k)}, None
    drawn = it.spec.held_out_spec(out=str(folder / "samples"), model=it.model(k))
    if isinstance(drawn.labeller, MonteCarlo):
        # Continuations come from M0 for every model: the same judge for all of them. The steps stay as they were cut.
        existing = Existing(completions=drawn.out, model=it.spec.model)
        judged = replace(drawn, out=str(folder / "labels"), solutions=existing, steps=OwnSteps())
        drawn = replace(drawn, labeller=Outcome())
    line = f"M{k} samples {it.spec.evaluation.sampling.n} solutions of every held-out problem"
    it.once("samples", model, lambda: _run_job(it, drawn), line)
    line = f"M{k} solves the held-out problems, greedy"
    it.once("greedy", model, lambda: _greedy(it, drawn, folder / "greedy"), line)
    inputs = model | {"samples": fingerprint(Path(drawn.out) / LABELS_NAME)}
    if judged is not None:
        it.once("judge", inputs, partial(_run_job, it, judged), f"continuations by M0 label the steps of M{k}")
    labels = None if isinstance((judged or drawn).labeller, Outcome) else Path((judged or drawn).out)

    def measure() -> dict[str, Any]:
        rows = problem_rows(Path(drawn.out), labels, drawn, seed_model=it.spec.model)
        write_jsonl(folder / RESULTS_NAME, rows)
        return {"problems": len(rows), "samples": sum(len(row["samples"]) for row in rows)}

    it.once("measure", inputs, measure, f"comparing M{k} with M0" if k else "the results of M0")


def _run_job(it: Iteration, job: LabelConfig | PairJobConfig) -> dict[str, Any]:
    """Run a labelling or pair job to its end, under the launcher where one is given and no server is given weights; its
    summary."""
    from stepkd.labels.job import run_label_job, run_pair_job

    out, policy = Path(job.out), _given(job)
    if it.spec.launcher is not None and policy is None:
        file = out.with_name(f"{out.name}.yaml")
        write_file(file, yaml_text(as_yaml(job)).encode())
        command = next((["pairs", name] for name, kind in PAIR_JOBS.items() if type(job) is kind), ["label"])
        _launch(it, [*command, "--config", str(file)])
    elif isinstance(job, LabelConfig):
        run_label_job(job, policy=policy, options=JobOptions(report=_quarters(it)))
    else:
        run_pair_job(job, policy=policy, options=JobOptions(report=_quarters(it)))
    if not (out / SUMMARY_NAME).is_file():
        raise StepkdError(
            f"iteration {it.k}: the job in {out} ended without {SUMMARY_NAME}: its launcher must return when the work "
            "is done (sbatch needs --wait), on a disk that this process sees"
        )
    summary: dict[str, Any] = json.loads((out / SUMMARY_NAME).read_bytes())
    return {name: value for name, value in summary.items() if name != "by_position"}


def _given(job: LabelConfig | PairJobConfig) -> Policy | None:
    """The job's model, whose weights servers are given for it; None: the job loads it, or has an engine load it.

    Raises:
        ConfigError: an adapter, which a server would put on the weights of whichever iteration it got last.
    """
    if not isinstance(job.engine, VLLMServer):
        return None
    from stepkd.models.checkpoint import load_trained

    model = str(job.solutions.model if isinstance(job, LabelConfig) else job.model)
    policy = load_trained(model, dtype=job.dtype)
    if policy.has_adapter:
        raise ConfigError(
            f"{model} is an adapter, and between iterations servers hold the weights of another model than its base: "
            f"begin with what `stepkd export {model} --to FOLDER` writes"
        )
    return policy


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
            f"iteration {it.k}: `stepkd {words[0]}` under the launcher ended with exit code {code}, for the reason "
            "above. Mend it and give the same command again"
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
    lacking, remedy = ("incorrect", "harder") if correct else ("correct", "easier")
    raise DataError(
        f"iteration {it.k} has no {lacking} answer to learn from ({correct} correct, {incorrect} incorrect among "
        f"{summary['labelled']} labelled solutions of M{it.k - 1}): take {remedy} problems, another temperature or "
        "more samples, in another --out. What is done is kept",
        path=it.folder / "labels",
    )


def _convert(it: Iteration, labels: Path) -> dict[str, Any]:
    from stepkd.labels.convert import convert_rows

    converter = it.spec.converter(it.k)
    converted = convert_rows(load_rows(parse_spec(str(labels))), converter, path=labels)
    written = converter.write(converted.rows, it.folder / CONVERTED_NAME)
    return {"to": type(converter).__name__, "rows": written, "counts": converted.counts}


def _pairs(it: Iteration, job: LabelConfig) -> dict[str, Any]:
    summary = _run_job(it, it.spec.pair_spec(it.k, job, out=str(it.folder / "pairs")))
    return {"to": type(it.spec.pairs).__name__, "counts": {"pairs": summary["pairs"], **summary["dropped"]}}


def training_settings(it: Iteration, rows: Path) -> dict[str, Any]:
    """What iteration k adds to the training recipes: where it starts, what it reads, its reference and its seed."""
    # The recipe's training data may be of another source: none of its settings must stay.
    none: dict[str, Any] = {"split": None, "limit": None, "offset": 0, "options": {}, "columns": {}}
    settings: dict[str, Any] = {
        "seed_everything": iteration_seed(it.spec.seed, "train", it.k),
        **it.spec.train.overrides,
        "model.init_args.policy.path": it.model(it.k - 1),
        "data.init_args.train": {"source": "rows", "path": str(rows), **none},
    }
    if it.spec.reference == "kept":
        settings["model.init_args.reference"] = {"path": it.spec.model}
    return nested(settings)


def _train(it: Iteration, rows: Path) -> dict[str, Any]:
    from stepkd.runs.rundir import read_marker
    from stepkd.training.fit import fit

    folder, settings = it.folder / "train", training_settings(it, rows)
    recipes = [str(find_recipe(name)) for name in it.spec.train.recipes]
    text = f"# Written by stepkd iterate: what iteration {it.k} adds to the training recipes.\n"
    write_file(it.folder / TRAIN_SETTINGS_NAME, (text + yaml.safe_dump(settings, sort_keys=False)).encode())
    if (read_marker(folder) or {}).get("status") != "finished":
        if it.spec.launcher is None:
            fit(recipes, settings, out=folder, resume=True)
        else:
            words = [word for name in (*recipes, str(it.folder / TRAIN_SETTINGS_NAME)) for word in ("--config", name)]
            _launch(it, ["fit", *words, "--out", str(folder), "--resume", "true"])
    marker = read_marker(folder) or {}
    if marker.get("status") != "finished":
        raise StepkdError(f"iteration {it.k}: the training in {folder} was stopped: {marker.get('message')}")
    return {"rows": sum(1 for _ in read_rows(rows)), "created": str(marker["created"])}


def _export(it: Iteration) -> dict[str, Any]:
    from stepkd.models.checkpoint import export_model

    folder = export_model(it.folder / "train", it.model(it.k), overwrite=True)
    return {"model": fingerprint(folder)}


def _greedy(it: Iteration, drawn: LabelConfig, folder: Path) -> dict[str, Any]:
    """Evaluate one greedy solution of every held-out problem, with prompt, extractors and length of the drawn ones."""
    from stepkd.data.templates import PromptTemplate
    from stepkd.evaluation.config import EvaluateConfig
    from stepkd.evaluation.runner import evaluate
    from stepkd.sampling.engine import SamplingConfig

    benchmark, data = it.spec.evaluated_benchmark()
    how = read_settings(drawn.out)
    same = {name: how["sampling"][name] for name in ("max_new_tokens", "stop", "seed")}
    summary = evaluate(
        EvaluateConfig(
            model=str(drawn.solutions.model),
            benchmark=benchmark,
            data=data,
            out=str(folder),
            sampling=SamplingConfig(temperature=0.0, **same | {"stop": tuple(same["stop"])}),
            grading=replace(drawn.grading, extractors=tuple(how["extractors"])),
            template=PromptTemplate(**how["template"]),
            dtype=drawn.dtype,
            device=drawn.device,
            engine=drawn.engine,
        ),
        policy=_given(drawn),
    )
    return {"pass@1": summary["metrics"]["pass@1"]}


def fingerprint(path: Path) -> str:
    """Short hash of a file, or of the files in a model folder.

    Raises:
        DataError: it is gone.
    """
    digest = hashlib.sha256()
    try:
        # A tokenizer with several chat templates has them in a folder of their own.
        files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
        for file in files:
            name = str(file.relative_to(path)) if path.is_dir() else file.name
            with open(file, "rb") as stream:
                digest.update(name.encode() + hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror}), and a finished stage made it: put it back, or start again with "
            "--overwrite",
            path=path,
        ) from error
    return digest.hexdigest()[:16]
