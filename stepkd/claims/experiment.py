"""What an experiment is: a function from one unit of work (a seed) to per-problem metric values of every arm.

The arms of a seed often share work (the student, the rollouts, the labels), so a unit is all arms of one seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, TypeAlias

import numpy as np

from stepkd.errors import ConfigError, DataError, nearest
from stepkd.safe import check_import
from stepkd.statistics import FloatArray

Report: TypeAlias = Callable[[str], None]
"""Takes one line about what is being done now."""

Values: TypeAlias = "float | Sequence[Any]"
"""A metric of one arm and one seed: one number for the whole seed; or one entry per problem, which is a number (the
metric is their mean), a pair ``[part, whole]`` (the metric is the sum of parts over the sum of wholes), or a list of
such pairs (the metric is the mean of those ratios, for example a balanced accuracy)."""


@dataclass(frozen=True)
class Unit:
    """One unit of work: every arm of one seed (of one variant)."""

    settings: Any
    """Instance of the experiment's settings class."""
    arms: Mapping[str, Any]
    """Arm name -> instance of the experiment's arm class (None for an experiment whose arms have no settings)."""
    seed: int
    """Keys everything that is drawn, problems included: new problems for every seed make the interval over seeds cover
    the choice of problems too."""
    folder: Path
    """Where models and evaluations go. An interrupted unit finds its own files here again, and nobody else's."""
    variant: str = "main"
    """Name of the variant, for messages; its settings are in ``settings``."""


@dataclass(frozen=True)
class ArmResult:
    """What one arm gave on one seed."""

    arm: str
    """Name of the arm."""
    problems: Sequence[str]
    """Ids of the held-out problems, in the order of the metrics' entries; arms are paired by them."""
    metrics: Mapping[str, Values]
    """Metric -> values; see :data:`Values`."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """What it cost (steps, tokens, rollouts) and other numbers of the whole seed; never seconds. Statements may use
    them like metrics."""


@dataclass(frozen=True)
class Experiment:
    """An experiment that claim files can name."""

    run: Callable[[Unit, Report], Sequence[ArmResult]]
    """Does one unit; returns one result per arm of the unit. Budgets in steps, tokens or rollouts, never seconds."""
    settings: type
    """Frozen dataclass of what a claim file may set; its defaults are the experiment's."""
    metrics: Sequence[str] | Callable[[Any], Sequence[str]]
    """Names of the metrics, or a function from the settings to them. An arm may leave out those it does not have."""
    arms: Mapping[str, Mapping[str, Any]]
    """Arms that run when the claim file names none: name -> settings of that arm."""
    arm_settings: type | None = None
    """Frozen dataclass of what an arm may set; None: the arms are fixed, a claim file may only choose among them."""
    facts: Sequence[str] = ()
    """Names of the facts. An arm may leave out those it does not have."""

    def metric_names(self, settings: Any) -> tuple[str, ...]:
        """Names of the metrics under these settings."""
        return tuple(self.metrics(settings) if callable(self.metrics) else self.metrics)


def value_array(values: Values) -> FloatArray:
    """Values of a metric as (problems, ratios, 2): the metric is the mean over ratios of sum[..., 0] / sum[..., 1].

    Raises:
        ValueError: neither a number nor a regular list of numbers, of pairs, or of lists of pairs; or not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("holds a value that is not a finite number")
    if array.ndim == 0:
        array = array.reshape(1)
    if array.size == 0 or array.ndim > 3 or (array.ndim > 1 and array.shape[-1] != 2):
        raise ValueError(f"has shape {array.shape}: give numbers, [part, whole] pairs, or lists of such pairs")
    if array.ndim == 1:
        array = np.stack([array, np.ones_like(array)], axis=-1)
    if array.ndim == 2:
        array = array[:, None, :]
    if (array[..., 1] < 0).any():
        raise ValueError("holds a pair whose whole is negative")
    return np.asarray(array, dtype=np.float64)


def check_results(experiment: Experiment, unit: Unit, results: Sequence[ArmResult]) -> None:
    """Refuse results that do not keep what the experiment declares.

    Raises:
        DataError: other arms, metrics or facts than declared, a bad value, or arms with different problems.
    """
    where = f"variant {unit.variant!r}, seed {unit.seed}"
    returned = [result.arm for result in results]
    if sorted(returned) != sorted(unit.arms):
        raise DataError(f"{where}: the experiment returned the arms {returned}, asked were {list(unit.arms)}")
    for kind, declared in (("metrics", experiment.metric_names(unit.settings)), ("facts", experiment.facts)):
        returned = sorted({name for result in results for name in getattr(result, kind)})
        if returned != sorted(declared):
            raise DataError(f"{where}: the experiment declares the {kind} {sorted(declared)} and returned {returned}")
    for result in results:
        place = f"{where}, arm {result.arm!r}"
        if twice := set(result.metrics) & set(result.facts):
            raise DataError(f"{place}: {min(twice)!r} is both a metric and a fact; rename one")
        for name, number in result.facts.items():
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise DataError(f"{place}: the fact {name!r} is {number!r}, not a finite number")
        if list(result.problems) != list(results[0].problems):
            raise DataError(f"{place}: other problems than arm {results[0].arm!r}; arms are paired by problem")
        for name, values in result.metrics.items():
            try:
                array = value_array(values)
            except (ValueError, TypeError) as error:
                raise DataError(f"{place}: the metric {name!r} {error}") from error
            if not np.isscalar(values) and len(array) != len(result.problems):
                raise DataError(
                    f"{place}: the metric {name!r} has {len(array)} entries for {len(result.problems)} problems"
                )


def get_experiment(name: str) -> Experiment:
    """Find an experiment.

    Args:
        name: file name in ``stepkd/claims/experiments`` without the ending (the file's ``EXPERIMENT``), or a dotted
            path to an :class:`Experiment` in an importable module.

    Raises:
        ConfigError: there is none.
    """
    if "." not in name:
        known = experiment_names()
        if name not in known:
            raise ConfigError(
                f"no experiment {name!r}.{nearest(name, known)} Known: {', '.join(known)}; or give a dotted path"
            )
        path, attribute = f"stepkd.claims.experiments.{name}", "EXPERIMENT"
    else:
        path, _, attribute = name.rpartition(".")
        check_import(path, "experiment")
    try:
        found = getattr(import_module(path), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"experiment {name!r}: no module {error.name!r}; is it installed or on PYTHONPATH?"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"experiment {name!r}: the module {path} has no {attribute!r}") from error
    if not isinstance(found, Experiment):
        raise ConfigError(f"experiment {name!r} is a {type(found).__name__}, not a stepkd.claims.Experiment")
    return found


def experiment_names() -> list[str]:
    """Names of the experiments that come with stepkd."""
    from stepkd.claims import experiments

    return sorted(module.name for module in iter_modules(experiments.__path__))
