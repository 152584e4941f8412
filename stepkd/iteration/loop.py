"""``stepkd iterate``: M0 -> M1 -> ... -> MK, resumable at every stage.

The run is a job whose units are the stages of its iterations. Its folder holds ``settings.json`` (settings, packages,
M0), one folder per iteration and ``summary.json``. Whatever is finished is never done again: not a solution, not a
label, not a training.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepkd.data.config import check_training_use, parse_spec
from stepkd.data.load import load_rows
from stepkd.data.rows import PROBLEM
from stepkd.errors import ConfigError, DataError, StepkdError
from stepkd.iteration.measure import summarise_run
from stepkd.iteration.spec import IterateConfig
from stepkd.iteration.stages import Iteration, evaluate_model, train_next, training_settings
from stepkd.runs.files import write_json
from stepkd.runs.job import SUMMARY_NAME, Job, JobOptions, package_versions
from stepkd.yaml_files import as_yaml, find_recipe


def run_iterations(
    spec: IterateConfig, out: str | Path, *, report: Callable[[str], None], overwrite: bool = False
) -> dict[str, Any]:
    """Run what is missing of an iterated training.

    Args:
        spec: the settings.
        out: the folder; begun, or resumed.
        report: called with one line about progress.
        overwrite: delete an earlier run in the folder first.

    Returns:
        The summary, also in ``summary.json``: :func:`~stepkd.iteration.measure.summarise_run`.

    Raises:
        ConfigError: the folder holds a run under other settings (they are named), or settings cannot work.
        DataError: an iteration has nothing to learn from, or held-out problems are training problems.
        StepkdError: a stage failed; what is done is kept.
    """
    out = Path(out).expanduser()
    options = JobOptions(overwrite=overwrite, config=as_yaml(spec))
    job = Job(out, "iterated training", [SUMMARY_NAME, *(path.name for path in out.glob("iteration-*"))], options)
    job.check()
    settings: dict[str, Any] = {"packages": package_versions(), "settings": spec.identity()}
    iterations = range(spec.iterations + 1)
    finished = not overwrite and not any(job.missing(Iteration.phase(k), ["measure"]) for k in iterations)
    if not finished:
        _check(spec, job)
        settings["model"] = {"name": spec.model, "weights": _seed_weights(spec)}
    free = ("model", "packages") if finished else ()  # it is only looked at: its models may be gone
    weights = job.begin(settings, free=free)["model"]["weights"]
    with job.alone():
        runs = [Iteration(spec, job, k, weights, report) for k in iterations]
        facts: list[dict[str, Any]] = []
        summary: dict[str, Any] = {}
        for it in runs:
            if it.facts("measure") is None:  # nothing of a finished iteration is read again but its rows
                if it.k:
                    train_next(it)
                evaluate_model(it)
            facts.append({name: left for name in ("label", "convert", "pairs", "train") if (left := it.facts(name))})
            summary = summarise_run(spec, [each.folder for each in runs[: it.k + 1]], facts)
            write_json(out / SUMMARY_NAME, summary)
    return summary


def _check(spec: IterateConfig, job: Job) -> None:
    """Refuse what would fail hours later: a launcher, recipes, settings or problems that cannot be used."""
    from stepkd.training.fit import check_fit

    if spec.launcher is not None:
        words = shlex.split(spec.launcher)
        if not words or shutil.which(words[0]) is None:
            raise ConfigError(f"launcher: no command {words[0] if words else ''!r} here: install it, or mend the name")
    first = Iteration(spec, job, 1, "", lambda _: None)
    try:
        recipes = [find_recipe(name) for name in spec.train.recipes]
        check_fit(recipes, training_settings(first, job.out / "rows.jsonl"))
    except StepkdError as error:
        raise ConfigError(f"train: `stepkd fit` would refuse these recipes and overrides: {error}") from error
    _check_problems(spec)


def _check_problems(spec: IterateConfig) -> None:
    """Held-out problems are none of the training problems, and there are enough of these."""
    word = parse_spec(spec.problems)
    check_training_use(word)
    training = load_rows(word, contract=PROBLEM)
    held_out = load_rows(parse_spec(spec.evaluation.problems), contract=PROBLEM)
    seen = {str(row["prompt"]).strip() for row in training}
    shared = [row["id"] for row in held_out if str(row["prompt"]).strip() in seen]
    if shared:
        raise DataError(
            f"{len(shared)} of {len(held_out)} held-out problems are training problems too (the first: {shared[0]!r}): "
            "evaluate on another split",
            path=spec.evaluation.problems,
        )
    needed = (spec.problems_per_iteration or 0) * spec.iterations
    if needed > len(training):
        raise ConfigError(
            f"{spec.iterations} iterations of {spec.problems_per_iteration} fresh problems need {needed}, and "
            f"{spec.problems} has {len(training)}: lower problems_per_iteration or iterations"
        )


def _seed_weights(spec: IterateConfig) -> str:
    """Fingerprint of M0; a model that cannot be loaded is refused here."""
    from stepkd.models.checkpoint import load_trained, weights_fingerprint

    return weights_fingerprint(load_trained(spec.model))
