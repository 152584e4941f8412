"""What a claim's jobs are: the functions that users call, each in a folder, and the numbers that it leaves.

A kind takes the settings that its command takes (``label`` those of ``stepkd label``). Its columns are what metrics of
the claim name: one number for the whole job; or one entry per problem, which is a number or a pair ``[part, whole]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from stepkd.errors import ConfigError, DataError, StepkdError
from stepkd.labels.convert import ConverterConfig, convert_rows
from stepkd.safe import check_import
from stepkd.settings import build_settings
from stepkd.yaml_files import overlaid, read_yaml

Row = Mapping[str, Any]
ROWS_NAME = "rows.jsonl"
"""What jobs leave that make rows of rows."""
TRAINING_ONLY: Mapping[str, Any] = {
    "trainer": {"val_check_interval": None, "enable_progress_bar": False},
    "data": {"init_args": {"validation": None}},
}
"""Training settings that go between a fit's recipes and its own: models are evaluated by jobs of their own."""


@dataclass(frozen=True)
class Measured:
    """The numbers that a job leaves."""

    columns: Mapping[str, Any] = field(default_factory=dict)
    """Column -> one number, or one entry per problem."""
    problems: Sequence[str] = ()
    """Ids of the problems, in the order of the entries."""


def run_job(kind: str, settings: Mapping[str, Any], out: Path) -> Measured:
    """Run a job, or resume it in the folder where it was interrupted; numbers that are not finite are left out.

    Args:
        kind: one of :data:`KINDS`.
        settings: those of the kind.
        out: its folder.

    Raises:
        StepkdError: what the kind's function refuses.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = KINDS[kind](dict(settings), out)
    kept = {name: each for name, each in found.columns.items() if not isinstance(each, float) or math.isfinite(each)}
    return Measured(kept, found.problems)


def job_config(kind: str, settings: Mapping[str, Any], out: Path) -> Any:
    """The settings object of a kind that has one (:data:`KINDS_WITH_SETTINGS`).

    Raises:
        ConfigError: unknown, missing or impossible settings, or those that the claim sets itself.
    """
    from stepkd.evaluation.config import EvaluateConfig, ScoreConfig
    from stepkd.iteration.spec import IterateConfig
    from stepkd.labels.settings import PAIR_JOBS, LabelConfig

    if own := {"out", "overwrite"} & set(settings):
        raise ConfigError(f"{kind}: {min(own)} is set by the claim itself: a job has its own folder, and is resumed")
    given = dict(settings)
    classes: dict[str, type[Any]] = {"label": LabelConfig, "score": ScoreConfig, "evaluate": EvaluateConfig}
    classes |= {"iterate": IterateConfig, "convert": ConvertJob, "draw": DrawJob, "best_of_n": BestOfNJob}
    made = classes.get(kind) or PAIR_JOBS.get(given.pop("to", None))
    if made is None:
        raise ConfigError(f"pairs: to must be one of {', '.join(PAIR_JOBS)}")
    has_folder = kind in ("label", "pairs", "score", "evaluate")
    return build_settings(made, given | ({"out": str(out)} if has_folder else {}), kind)


KINDS_WITH_SETTINGS = ("label", "pairs", "score", "evaluate", "iterate", "convert", "draw", "best_of_n")
"""Kinds whose settings are checked as a whole, by :func:`job_config`."""


# ---- training ------------------------------------------------------------------------------------------------------


def training_settings(settings: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Recipes of a job that trains, and its settings on top of them."""
    return list(settings.pop("recipes", ())), overlaid(TRAINING_ONLY, settings)


def _fit(settings: dict[str, Any], out: Path) -> Measured:
    """``recipes``, and training settings on top. Columns: the mean of every ``train/NAME`` over the run's log as
    ``NAME``, ``steps``, and ``completions``, those trained on."""
    from stepkd.runs.logger import read_metrics
    from stepkd.training.fit import fit

    result = fit(*training_settings(settings), out=out, resume=True)
    if result.status == "stopped":
        raise StepkdError(f"{out} was stopped after {result.steps} steps; give the same command again to resume")
    logged: dict[str, list[float]] = {}
    for row in read_metrics(out):
        for name, value in row.items():
            if name.startswith("train/") and isinstance(value, int | float):
                logged.setdefault(name.removeprefix("train/"), []).append(value)
    used = read_yaml(out / "config.yaml", "run's settings")
    group = (used["model"]["init_args"].get("rollout") or {"sampling": {"n": 1}})["sampling"]["n"]
    completions = result.steps * used["data"]["init_args"]["global_batch_size"] * group
    means = {name: math.fsum(values) / len(values) for name, values in logged.items()}
    return Measured(means | {"steps": result.steps, "completions": completions})


def _validate(settings: dict[str, Any], out: Path) -> Measured:
    """``recipes``, and training settings on top, validated as ``stepkd validate`` does. Columns: every
    ``val/.../NAME`` as ``NAME``."""
    from stepkd.training.fit import validate

    found = validate(*training_settings(settings))
    return Measured({name.rpartition("/")[2]: value for name, value in found.items()})


def _cache_teacher(settings: dict[str, Any], out: Path) -> Measured:
    """``recipes``, ``top_k``, and training settings on top: the cache that ``stepkd cache-teacher`` writes."""
    from stepkd.modules.distillation import cache_teacher
    from stepkd.training.fit import check_fit

    top_k = settings.pop("top_k")
    checked = check_fit(*training_settings(settings))
    written = cache_teacher(checked.module, checked.data, out, top_k=top_k)
    return Measured({"completions": written["completions"]})


def _iterate(settings: dict[str, Any], out: Path) -> Measured:
    """As ``stepkd iterate``. Columns: those of an evaluation for every model, ``m0.pass@1``, and ``m0.greedy``."""
    from stepkd.iteration.loop import run_iterations
    from stepkd.runs.job import read_results

    spec = job_config("iterate", settings, out)
    run_iterations(spec, out, report=lambda line: None)
    columns: dict[str, Any] = {}
    problems: list[str] = []
    for k in range(spec.iterations + 1):
        folder = out / f"iteration-{k}" / "evaluation"
        rows, greedy = (read_results(each) for each in (folder, folder / "greedy"))
        problems = [str(row["id"]) for row in rows]
        correct = dict(zip((str(row["id"]) for row in greedy), problem_columns(greedy)["pass@1"], strict=True))
        found = problem_columns(rows) | {"greedy": [correct[problem] for problem in problems]}
        columns |= {f"m{k}.{name}": values for name, values in found.items()}
    return Measured(columns, problems)


# ---- labels and rows -----------------------------------------------------------------------------------------------


def _label(settings: dict[str, Any], out: Path) -> Measured:
    """As ``stepkd label``. Columns: the numbers of its summary, ``labelling.generated_tokens`` for instance,
    ``steps_per_solution``, and ``one_step_share`` (solutions that are one step)."""
    from stepkd.labels.job import run_label_job

    summary = run_label_job(job_config("label", settings, out))
    assert summary is not None, "one process does all the work"
    steps = [len(row["steps"]) for row in _load(out)]
    shares = {"steps_per_solution": sum(steps) / len(steps), "one_step_share": steps.count(1) / len(steps)}
    return Measured(_numbers(summary) | shares)


def _pairs(settings: dict[str, Any], out: Path) -> Measured:
    """As ``stepkd pairs``, with ``to: step`` or ``tree``. Columns: the numbers of its summary."""
    from stepkd.labels.job import run_pair_job

    summary = run_pair_job(job_config("pairs", settings, out))
    assert summary is not None, "one process does all the work"
    return Measured(_numbers(summary))


def _numbers(summary: Mapping[str, Any], place: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in summary.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{place}{name}.")
        elif isinstance(value, int | float):
            found[f"{place}{name}"] = float(value)
    return found


def _load(word: str | Path) -> list[Any]:
    from stepkd.data.config import parse_spec
    from stepkd.data.load import load_rows

    return load_rows(parse_spec(str(word)))


@dataclass(frozen=True)
class ConvertJob:
    """Settings of ``convert``."""

    rows: str
    """Labelled rows: a file, or the folder of a labelling job."""
    to: ConverterConfig
    """Kind of the new rows."""


def _convert(settings: dict[str, Any], out: Path) -> Measured:
    """As ``stepkd convert``: ``rows`` and ``to``. Columns: its counts, and ``rows``."""
    config = job_config("convert", settings, out)
    converted = convert_rows(_load(config.rows), config.to)
    return Measured(converted.counts | {"rows": config.to.write(converted.rows, out / ROWS_NAME)})


@dataclass(frozen=True)
class DrawJob:
    """Settings of ``draw``."""

    rows: str
    """A file of rows."""
    count: int
    """How many are drawn, without replacement; there must be as many."""
    seed: int
    """Seed of the draw."""
    key: str
    """Tells draws of the same seed apart."""


def _draw(settings: dict[str, Any], out: Path) -> Measured:
    """``count`` of ``rows``, keyed by ``seed`` and ``key``. Columns: ``rows``, and ``available``."""
    config = job_config("draw", settings, out)
    from stepkd.data.io import read_rows
    from stepkd.randomness import generator
    from stepkd.runs.files import write_jsonl

    rows = [row for row, _ in read_rows(Path(config.rows))]
    if len(rows) < config.count:
        raise DataError(f"{config.count} rows are wanted, and there are {len(rows)}: lower count", path=config.rows)
    picked = sorted(generator(config.seed, "step pairs", config.key).permutation(len(rows))[: config.count])
    write_jsonl(out / ROWS_NAME, [rows[i] for i in picked])
    return Measured({"rows": config.count, "available": len(rows)})


def _consensus(settings: dict[str, Any], out: Path) -> Measured:
    """As ``stepkd consensus``: ``first`` and ``second``. Columns: its counts."""
    from stepkd.labels.convert import consensus_filter
    from stepkd.runs.files import write_jsonl

    first, second = (_load(settings.pop(name)) for name in ("first", "second"))
    agreed = consensus_filter(first, second)
    write_jsonl(out / ROWS_NAME, agreed.rows)
    return Measured(agreed.counts)


def _quality(settings: dict[str, Any], out: Path) -> Measured:
    """``rows`` against the true labels of ``truth``, up to the first error. Columns: the shares of
    :class:`~stepkd.labels.quality.LabelQuality`, and ``rows``."""
    from stepkd.labels.quality import label_quality

    rows = _load(settings["rows"])
    found = label_quality(rows, _load(settings["truth"])).to_dict()
    shares = {name: value["value"] for name, value in found.items() if isinstance(value, Mapping)}
    return Measured(shares | {"rows": len(rows)})


# ---- evaluation ----------------------------------------------------------------------------------------------------


def _evaluate(settings: dict[str, Any], out: Path) -> Measured:
    """As ``stepkd evaluate``. Columns: :func:`problem_columns`."""
    from stepkd.evaluation.runner import evaluate
    from stepkd.runs.job import read_results

    evaluate(job_config("evaluate", settings, out))
    rows = read_results(out)
    return Measured(problem_columns(rows), [str(row["id"]) for row in rows])


def problem_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Per-problem values of what an evaluation's metrics are made of.

    Args:
        rows: result rows of an evaluation; a sample whose step labels are None counts for its answer only.

    Returns:
        ``pass@1`` (share of correct samples), ``mean_tokens``, ``step_accuracy`` (pairs: correct steps, steps),
        ``correct_with_incorrect_step`` (pairs: correct samples with an incorrect step, those whose steps are labelled),
        ``clean@1`` (share of correct samples without an incorrect step) and ``distinct`` (share of different solutions,
        1 / samples to 1); one entry per problem each.
    """
    from stepkd.evaluation.metrics import problem_counts

    columns: dict[str, list[Any]] = {}
    for row in rows:
        n, counts = len(row["samples"]), problem_counts(row).counts
        values = {
            "pass@1": counts["correct"] / n,
            "mean_tokens": counts["tokens"] / n,
            "step_accuracy": [counts["correct_steps"], counts["steps"]],
            "correct_with_incorrect_step": [counts["correct_flawed"], counts["correct_labelled"]],
            "clean@1": (counts["correct"] - counts["correct_flawed"]) / n,
            "distinct": len({sample.get("completion") for sample in row["samples"]}) / n,
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return columns


def _score(settings: dict[str, Any], out: Path) -> Measured:
    """As ``stepkd score``. Columns: the numbers of its summary."""
    from stepkd.evaluation.score_rows import score_file

    return Measured(_numbers(score_file(job_config("score", settings, out))))


@dataclass(frozen=True)
class BestOfNJob:
    """Settings of ``best_of_n``."""

    scores: dict[str, str]
    """Name of a score -> folder of the job."""
    ks: list[int]
    """Numbers of samples to choose from; the largest is how many were drawn."""
    extractors: list[str]
    """How answers are found for the vote."""
    seed: int
    """Seed of intervals and drawn subsets."""


def _best_of_n(settings: dict[str, Any], out: Path) -> Measured:
    """As ``stepkd best-of-n``: ``scores`` (name -> folder), ``ks``, ``extractors`` and ``seed``. Columns: for every
    method (``majority``, ``pass``, every score) ``METHOD@k`` and ``METHOD.growth``, from the smallest k to the
    largest. A solution that is missing, since nothing could score it, counts as an incorrect one."""
    from stepkd.evaluation.best_of_n import best_of_n_from_files
    from stepkd.grading.pool import GradingConfig
    from stepkd.runs.job import read_results
    from stepkd.scorers.scorer import problem_key

    config = job_config("best_of_n", settings, out)
    grading = GradingConfig(extractors=tuple(config.extractors))
    curve = best_of_n_from_files(config.scores, ks=config.ks, grading=grading, seed=config.seed, samples=max(config.ks))
    first = read_results(next(iter(config.scores.values())))
    columns: dict[str, list[float]] = {}
    for method, values in curve.per_problem.items():
        columns |= {f"{method}@{k}": values[:, i].tolist() for i, k in enumerate(curve.ks)}
        columns[f"{method}.growth"] = (values[:, -1] - values[:, 0]).tolist()
    return Measured(columns, list(dict.fromkeys(map(problem_key, first))))


def _call(settings: dict[str, Any], out: Path) -> Measured:
    """``function``, a dotted path to a function of one's own, called with the other settings and ``out``, the job's
    folder; it returns a :class:`Measured`."""
    module, _, name = str(settings.pop("function")).rpartition(".")
    check_import(module, "a claim")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"no function {module}.{name} ({error}): is it on PYTHONPATH?") from error
    found = function(**settings, out=out)
    if not isinstance(found, Measured):
        raise ConfigError(f"{module}.{name} returned a {type(found).__name__}, not a stepkd.claims.Measured")
    return found


KINDS: Mapping[str, Callable[[dict[str, Any], Path], Measured]] = {
    "fit": _fit,
    "validate": _validate,
    "cache_teacher": _cache_teacher,
    "iterate": _iterate,
    "label": _label,
    "pairs": _pairs,
    "convert": _convert,
    "draw": _draw,
    "consensus": _consensus,
    "quality": _quality,
    "evaluate": _evaluate,
    "score": _score,
    "best_of_n": _best_of_n,
    "call": _call,
}
"""Kinds of jobs by name."""
