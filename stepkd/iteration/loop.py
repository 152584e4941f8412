"""``stepkd iterate``: M0 -> M1 -> ... -> MK, resumable at every stage.

The folder holds ``iterate.json`` (settings, packages, M0), one folder per iteration with its record, and
``summary.json``. Whatever is finished is never done again: not a solution, not a label, not a training.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepkd.data.rows import PROBLEM
from stepkd.data.spec import check_training_use, load_rows, parse_spec
from stepkd.errors import ConfigError, DataError, StepkdError
from stepkd.evaluation.manifest import manifest_differences, package_versions
from stepkd.iteration.spec import IterateSpec
from stepkd.iteration.stages import Iteration, Report, evaluate_model, train_next, training_settings
from stepkd.iteration.table import summarise_run
from stepkd.runs import RunDir
from stepkd.runs.files import write_json

MANIFEST_NAME = "iterate.json"
SUMMARY_NAME = "summary.json"
FORMAT = 1


def run_iterations(spec: IterateSpec, out: str | Path, *, report: Report, overwrite: bool = False) -> dict[str, Any]:
    """Run what is missing of an iterated training.

    Args:
        spec: the settings.
        out: the folder; begun, or gone on with.
        report: called with one line about progress.
        overwrite: delete an earlier run in the folder first.

    Returns:
        The summary, also in ``summary.json``: :func:`~stepkd.iteration.table.summarise_run`.

    Raises:
        ConfigError: the folder holds a run under other settings (they are named), or settings cannot work.
        DataError: an iteration has nothing to learn from, or held-out problems are training problems.
        StepkdError: a stage failed; what is done is kept.
    """
    out = Path(out).expanduser()
    earlier = None if overwrite else read_manifest(out)
    manifest = {"format": FORMAT, "packages": package_versions(), "settings": spec.identity()}
    unfinished = earlier is None or not _is_finished(spec, out)
    if earlier is not None:
        _check_same(earlier, manifest if unfinished else manifest | {"packages": earlier["packages"]}, out)
    if not unfinished:
        assert earlier is not None
        return _summarise(spec, out, earlier["model"]["weights"], report)
    _check(spec, out)
    weights = _seed_weights(spec)
    if earlier is not None and earlier["model"]["weights"] != weights:
        raise ConfigError(
            f"{spec.model} is not the model that the run in {out} started from (weights {earlier['model']['weights']} "
            f"then, {weights} now): put it back, or start again with another --out"
        )
    run_dir = RunDir.open(out, resume=not overwrite, overwrite=overwrite, kind="iterate")
    with run_dir.recorded():
        with contextlib.suppress(OSError):
            run_dir.checkpoints.rmdir()  # every iteration's training has its own
        if earlier is None:
            manifest |= {"model": {"name": spec.model, "weights": weights}}
            write_json(out / MANIFEST_NAME, manifest)
        summary = _summarise(spec, out, weights, report)
    return summary


def _summarise(spec: IterateSpec, out: Path, weights: str, report: Report) -> dict[str, Any]:
    """Do every stage that is not done, in order, and sum up after each model."""
    iterations = [Iteration(spec, out, k, weights, report) for k in range(spec.iterations + 1)]
    facts: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for it in iterations:
        stages = it.record().stages
        if "measure" in stages:  # nothing of a finished iteration is read again but its rows: models may be deleted
            facts.append({name: stage["facts"] for name, stage in stages.items()})
        else:
            facts.append((train_next(it) if it.k else {}) | evaluate_model(it))
        summary = summarise_run(spec, [each.folder for each in iterations[: it.k + 1]], facts)
        write_json(out / SUMMARY_NAME, summary)
    return summary


def _is_finished(spec: IterateSpec, out: Path) -> bool:
    """Whether the last stage of the last iteration is done."""
    last = Iteration(spec, out, spec.iterations, "", lambda _: None)
    return all("measure" in Iteration(spec, out, k, "", lambda _: None).record().stages for k in range(last.k + 1))


def _check(spec: IterateSpec, out: Path) -> None:
    """Refuse what would fail hours later: a launcher, recipes, settings or problems that cannot be used."""
    if spec.launcher is not None:
        words = shlex.split(spec.launcher)
        if not words or shutil.which(words[0]) is None:
            raise ConfigError(f"launcher: no command {words[0] if words else ''!r} here: install it, or mend the name")
    _check_training(spec, out)
    _check_problems(spec)


def _check_training(spec: IterateSpec, out: Path) -> None:
    """Parse the training settings of the first iteration as ``stepkd fit`` will."""
    from stepkd.training.fit import check_fit

    first = Iteration(spec, out, 1, "", lambda _: None)
    try:
        check_fit(spec.train.recipes, training_settings(first, out / "rows.jsonl"))
    except StepkdError as error:
        hint = ""
        if spec.reference == "kept" and "reference" in str(error):
            hint = " (reference: kept is for methods with a reference model)"
        raise ConfigError(f"train: `stepkd fit` would refuse these recipes and overrides{hint}: {error}") from error


def _check_problems(spec: IterateSpec) -> None:
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


def _seed_weights(spec: IterateSpec) -> str:
    """Fingerprint of M0; a model that cannot be loaded is refused here."""
    from stepkd.models.checkpoint import load_trained, weights_fingerprint

    return weights_fingerprint(load_trained(spec.model))


def read_manifest(out: Path) -> dict[str, Any] | None:
    """``iterate.json`` of a run; None where there is none.

    Raises:
        DataError: it cannot be read.
    """
    path = out / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"not a readable manifest: {error}; --overwrite starts again", path=path) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"not a manifest of format {FORMAT}; --overwrite starts again", path=path)
    return manifest


def _check_same(earlier: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    settled = {name: value for name, value in earlier.items() if name not in ("model", "created")}
    if differences := manifest_differences(settled, now):
        lines = [f"  {key}: {then!r} then, {today!r} now" for key, (then, today) in differences.items()]
        raise ConfigError(
            f"{out} was begun under other settings, so it cannot be gone on with:\n"
            + "\n".join(lines)
            + "\nGive the old settings again, another --out, or --overwrite to start again."
        )
