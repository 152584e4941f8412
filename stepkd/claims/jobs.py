"""Jobs by name, of claims and of the quick start: functions that users call, each in a folder, and what they leave.

A kind takes the settings that its command takes (``label`` those of ``stepkd label``); a text in them that begins with
``$`` is a setting, or the folder of another job. The columns of a kind are what metrics of a claim name: one number for
the whole job; or one entry per problem, which is a number or a pair ``[part, whole]``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import pydantic

import stepkd.labels.curriculum
import stepkd.labels.selection  # noqa: F401 (choices of convert)
from stepkd.errors import ConfigError, DataError, StepkdError, nearest
from stepkd.evaluation.config import EvaluateConfig, EvaluatePRMConfig, ScoreConfig, SearchJobConfig
from stepkd.iteration.spec import IterateConfig
from stepkd.labels.convert import ConverterConfig, convert_rows
from stepkd.labels.labellers import outcome_of
from stepkd.labels.settings import PAIR_JOBS, LabelConfig, PairJobConfig
from stepkd.runs.job import JobConfig, flat
from stepkd.safe import check_import
from stepkd.settings import build_settings
from stepkd.yaml_files import overlaid, read_yaml

Row = Mapping[str, Any]
REFERENCE = re.compile(r"\$(\w+)")
Do = Callable[[str, str, Mapping[str, Any]], str]
"""Job, kind and settings to the job's folder."""
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


class References:
    """Settings and jobs by name, and texts with what they refer to in its place.

    Args:
        named: settings.
        jobs: job -> its kind with its settings.
        do: runs a job that a text refers to, once.
    """

    def __init__(self, named: Mapping[str, Any], jobs: Mapping[str, Mapping[str, Any]], do: Do) -> None:
        self.named, self.jobs, self.do = named, jobs, do
        self._folders: dict[str, str] = {}
        self._way: list[str] = []

    def value(self, raw: Any) -> Any:
        """A value with every ``$name`` replaced: a text that is one reference becomes what it refers to."""
        if isinstance(raw, Mapping):
            return {key: self.value(each) for key, each in raw.items()}
        if isinstance(raw, list):
            return [self.value(each) for each in raw]
        if not isinstance(raw, str):
            return raw
        if (whole := REFERENCE.fullmatch(raw)) is not None:
            return self.of(whole[1])
        return REFERENCE.sub(lambda found: str(self.of(found[1])), raw)

    def of(self, name: str) -> Any:
        """A setting, or the folder of a job, which is run first.

        Raises:
            ConfigError: there is neither, or it refers to itself; the names on the way are shown.
        """
        way = " -> ".join([*self._way, name])
        if name in self._way:
            raise ConfigError(f"{way} refers to itself")
        known = [*self.named, *self.jobs]
        if name not in known:
            raise ConfigError(f"{way}: no setting or job {name!r}.{nearest(name, known)} Known: {', '.join(known)}")
        self._way.append(name)
        if name in self.named:
            found = self.value(self.named[name])
        else:
            if name not in self._folders:
                ((kind, settings),) = self.jobs[name].items()
                self._folders[name] = self.do(name, kind, self.value(settings or {}))
            found = self._folders[name]
        self._way.pop()
        return found


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
    run = KINDS[kind]
    if "config" in signature(run).parameters:
        found = run(out, job_config(kind, settings, out))
    else:
        check_arguments(kind, settings)
        found = run(out, **settings)
    kept = {name: each for name, each in found.columns.items() if not isinstance(each, float) or math.isfinite(each)}
    return Measured(kept, found.problems)


def check_arguments(kind: str, settings: Mapping[str, Any]) -> None:
    """Check the settings of a kind that takes them one by one.

    Raises:
        ConfigError: unknown or missing settings, or one of another type.
    """
    hints = get_type_hints(KINDS[kind])
    try:
        given = signature(KINDS[kind]).bind(Path(), **settings).arguments
    except TypeError as error:
        raise ConfigError(f"{kind}: {error}") from error
    for name in given.keys() & settings.keys():
        try:
            pydantic.TypeAdapter(hints[name]).validate_python(settings[name], strict=True)
        except pydantic.ValidationError as error:
            raise ConfigError(f"{kind}: {name}: {error.errors()[0]['msg']}, got {settings[name]!r}") from None


def job_config(kind: str, settings: Mapping[str, Any], out: Path) -> Any:
    """The settings object of a kind that takes one.

    Raises:
        ConfigError: unknown, missing or impossible settings, or those that the claim sets itself.
    """
    if own := {"out", "overwrite"} & set(settings):
        raise ConfigError(f"{kind}: {min(own)} is set by the claim itself: a job has its own folder, and is resumed")
    given = dict(settings)
    made = get_type_hints(KINDS[kind])["config"]
    if made is PairJobConfig and (made := PAIR_JOBS.get(given.pop("to", ""))) is None:
        raise ConfigError(f"pairs: to must be one of {', '.join(PAIR_JOBS)}")
    return build_settings(made, given | ({"out": str(out)} if issubclass(made, JobConfig) else {}), kind)


@dataclass(frozen=True)
class ConvertJob:
    """Settings of ``convert``."""

    rows: str
    """Labelled rows: a file, or the folder of a labelling job."""
    to: ConverterConfig
    """Kind of the new rows."""


def training_settings(recipes: Sequence[str] = (), **settings: Any) -> tuple[list[str], dict[str, Any]]:
    """Recipes of a job that trains, and its settings on top of them."""
    return list(recipes), overlaid(TRAINING_ONLY, settings)


def _fit(out: Path, **settings: Any) -> Measured:
    """``recipes``, and training settings on top. Columns: the mean of every ``train/NAME`` over the run's log as
    ``NAME``, over its last 20 steps as ``last.NAME``, ``steps``, and ``completions``, those trained on."""
    from stepkd.runs.logger import read_metrics
    from stepkd.training.fit import fit

    result = fit(*training_settings(**settings), out=out, resume=True)
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
    means |= {f"last.{name}": math.fsum(values[-20:]) / len(values[-20:]) for name, values in logged.items()}
    return Measured(means | {"steps": result.steps, "completions": completions})


def _validate(out: Path, **settings: Any) -> Measured:
    """``recipes``, and training settings on top, validated as ``stepkd validate`` does. Columns: every
    ``val/.../NAME`` as ``NAME``."""
    from stepkd.training.fit import validate

    found = validate(*training_settings(**settings))
    return Measured({name.rpartition("/")[2]: value for name, value in found.items()})


def _cache_teacher(out: Path, *, top_k: int, **settings: Any) -> Measured:
    """``recipes``, ``top_k``, and training settings on top: the cache that ``stepkd cache-teacher`` writes."""
    from stepkd.modules.gkd import cache_teacher
    from stepkd.training.fit import check_fit

    checked = check_fit(*training_settings(**settings))
    written = cache_teacher(checked.module, checked.data, out, top_k=top_k)
    return Measured({"completions": written["completions"]})


def _iterate(out: Path, config: IterateConfig) -> Measured:
    """As ``stepkd iterate``. Columns: those of an evaluation for every model, ``m0.pass@1``, and ``m0.greedy``."""
    from stepkd.iteration.loop import run_iterations
    from stepkd.runs.job import read_results

    run_iterations(config, out, report=lambda line: None)
    columns: dict[str, Any] = {}
    problems: list[str] = []
    for k in range(config.iterations + 1):
        folder = out / f"iteration-{k}" / "evaluation"
        rows, greedy = (read_results(each) for each in (folder, folder / "greedy"))
        problems = [str(row["id"]) for row in rows]
        correct = dict(zip((str(row["id"]) for row in greedy), problem_columns(greedy)["pass@1"], strict=True))
        found = problem_columns(rows) | {"greedy": [correct[problem] for problem in problems]}
        columns |= {f"m{k}.{name}": values for name, values in found.items()}
    return Measured(columns, problems)


def _label(out: Path, config: LabelConfig) -> Measured:
    """As ``stepkd label``. Columns: the numbers of its summary, ``labelling.generated_tokens`` for instance,
    ``steps_per_solution``, and ``one_step_share`` (solutions that are one step)."""
    from stepkd.labels.job import run_label_job

    summary = run_label_job(config)
    assert summary is not None, "one process does all the work"
    steps = [len(row.get("steps") or row["completions"]) for row in _load(out)]
    shares = {"steps_per_solution": sum(steps) / len(steps), "one_step_share": steps.count(1) / len(steps)}
    return Measured(_numbers(summary) | shares)


def _pairs(out: Path, config: PairJobConfig) -> Measured:
    """As ``stepkd pairs``, with ``to: step`` or ``tree``. Columns: the numbers of its summary."""
    from stepkd.labels.job import run_pair_job

    summary = run_pair_job(config)
    assert summary is not None, "one process does all the work"
    return Measured(_numbers(summary))


def _numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in flat(summary).items() if isinstance(value, int | float)}


def _load(word: str | Path) -> list[Any]:
    from stepkd.data.config import parse_spec
    from stepkd.data.load import load_rows

    return load_rows(parse_spec(str(word)))


def _convert(out: Path, config: ConvertJob) -> Measured:
    """As ``stepkd convert``: ``rows`` and ``to``. Columns: its counts, and ``rows``."""
    converted = convert_rows(_load(config.rows), config.to, path=config.rows)
    return Measured(converted.counts | {"rows": config.to.write(converted.rows, out / ROWS_NAME)})


def _draw(out: Path, *, rows: str, count: int, seed: int, key: str, correct: bool | None = None) -> Measured:
    """``count`` of a file's ``rows``, without replacement, or of those whose answers are ``correct`` (true) or are not
    (false); ``key`` tells draws of one ``seed`` apart. Columns: ``rows``, and ``available``."""
    from stepkd.data.io import read_rows
    from stepkd.randomness import generator
    from stepkd.runs.files import write_jsonl

    found = [row for row, _ in read_rows(Path(rows)) if correct is None or outcome_of(row) is correct]
    if len(found) < count:
        raise DataError(f"{count} rows are wanted, and there are {len(found)}: lower count", path=rows)
    picked = sorted(generator(seed, "step pairs", key).permutation(len(found))[:count])
    write_jsonl(out / ROWS_NAME, [found[i] for i in picked])
    return Measured({"rows": count, "available": len(found)})


def _consensus(out: Path, *, first: str, second: str) -> Measured:
    """As ``stepkd consensus``: ``first`` and ``second``. Columns: its counts."""
    from stepkd.labels.convert import consensus_filter
    from stepkd.runs.files import write_jsonl

    agreed = consensus_filter(_load(first), _load(second))
    write_jsonl(out / ROWS_NAME, agreed.rows)
    return Measured(agreed.counts)


def _quality(out: Path, *, rows: str, truth: str) -> Measured:
    """``rows`` against the true labels of ``truth``, up to the first error. Columns: the shares of
    :class:`~stepkd.labels.quality.LabelQuality`, and ``rows``."""
    from stepkd.labels.quality import label_quality

    labelled = _load(rows)
    found = label_quality(labelled, _load(truth)).to_dict()
    shares = {name: value["value"] for name, value in found.items() if isinstance(value, Mapping)}
    return Measured(shares | {"rows": len(labelled)})


def _evaluate(out: Path, config: EvaluateConfig) -> Measured:
    """As ``stepkd evaluate``. Columns: :func:`problem_columns`."""
    from stepkd.evaluation.runner import evaluate
    from stepkd.runs.job import read_results

    evaluate(config)
    rows = read_results(out)
    return Measured(problem_columns(rows), [str(row["id"]) for row in rows])


def _search(out: Path, config: SearchJobConfig) -> Measured:
    """As ``stepkd search``. Columns: :func:`~stepkd.evaluation.search_summary.search_columns`."""
    from stepkd.evaluation.search import search_benchmark
    from stepkd.evaluation.search_summary import POOL, search_columns
    from stepkd.runs.job import read_results

    reduction = search_benchmark(config)["pool"]["reduction"]
    rows, names = read_results(out), [method.name for method in config.all_methods]
    columns = search_columns(rows, names, reduction=reduction, seed=config.sampling.seed)
    pool = sorted((row for row in rows if row["method"] == POOL), key=lambda row: row["index"])
    return Measured(columns, [str(row["id"]) for row in pool])


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
            "correct_with_incorrect_step": [counts["correct_with_incorrect_step"], counts["correct_labelled"]],
            "clean@1": (counts["correct"] - counts["correct_with_incorrect_step"]) / n,
            "distinct": len({sample.get("completion") for sample in row["samples"]}) / n,
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return columns


def _score(out: Path, config: ScoreConfig) -> Measured:
    """As ``stepkd score``. Columns: the numbers of its summary."""
    from stepkd.evaluation.score_rows import score_file

    return Measured(_numbers(score_file(config)))


def _evaluate_prm(out: Path, config: EvaluatePRMConfig) -> Measured:
    """As ``stepkd evaluate-prm``. Columns: the numbers of the first of its sets, ``steps.auroc.value`` for instance."""
    from stepkd.evaluation.score_rows import evaluate_process

    return Measured(_numbers(evaluate_process(config)["sets"][config.sets[0]]))


def _best_of_n(
    out: Path, *, scores: Mapping[str, str], ks: Sequence[int], extractors: Sequence[str], seed: int
) -> Measured:
    """As ``stepkd best-of-n``: ``scores`` (name -> folder), ``ks``, ``extractors`` and ``seed``. Columns: for every
    method (``majority``, ``pass``, every score, and the vote that it weights) ``METHOD@k`` and ``METHOD.growth``, from
    the smallest k above 1 to the largest; and ``pass@1``, the share of correct solutions, where 1 is among the ks. A
    solution that is missing, since nothing could score it, counts as an incorrect one."""
    from stepkd.evaluation.best_of_n import best_of_n_from_files
    from stepkd.grading.pool import GradingConfig
    from stepkd.runs.job import read_results
    from stepkd.scorers.scorer import problem_key

    grading = GradingConfig(extractors=tuple(extractors))
    curve = best_of_n_from_files(scores, ks=ks, grading=grading, seed=seed, samples=max(ks, default=None))
    first = read_results(next(iter(scores.values())))
    columns: dict[str, list[float]] = {}
    for method, values in curve.per_problem.items():
        columns |= {f"{method}@{k}": values[:, i].tolist() for i, k in enumerate(curve.ks)}
        columns[f"{method}.growth"] = (values[:, -1] - values[:, int(curve.ks[0] == 1 < len(curve.ks))]).tolist()
    return Measured(columns, list(dict.fromkeys(map(problem_key, first))))


def _call(out: Path, *, function: str, **settings: Any) -> Measured:
    """``function``, a dotted path to a function of one's own, called with the other settings and ``out``, the job's
    folder; it returns a :class:`Measured`."""
    module, _, name = function.rpartition(".")
    check_import(module, "a claim")
    try:
        called = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"no function {function} ({error}): is it on PYTHONPATH?") from error
    found = called(**settings, out=out)
    if not isinstance(found, Measured):
        raise ConfigError(f"{function} returned a {type(found).__name__}, not a stepkd.claims.Measured")
    return found


_KINDS = (
    *(_fit, _validate, _cache_teacher, _iterate),
    *(_label, _pairs, _convert, _draw, _consensus, _quality),
    *(_evaluate, _evaluate_prm, _search, _score, _best_of_n, _call),
)
KINDS: Mapping[str, Callable[..., Measured]] = {run.__name__.removeprefix("_"): run for run in _KINDS}
"""Kinds of jobs by name; the one setting of some is ``config``, a settings class."""
