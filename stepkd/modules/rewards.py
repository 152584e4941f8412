"""What a solution is worth: reward functions in TRL's signature, built-in ones, and their weighted sum.

A reward function takes ``prompts``, ``completions`` (texts), ``completion_ids`` and every column of the rows as keyword
arguments, one entry per completion, and returns one number per completion.
"""

from __future__ import annotations

import inspect
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from stepkd.errors import ConfigError, TrainingError, nearest
from stepkd.grading import Grader
from stepkd.grading.pool import Verdict
from stepkd.modules.step_scores import load_step_scorer, step_scores
from stepkd.safe import check_import

RewardFunction = Callable[..., Sequence[float]]
BUILT_IN = ("accuracy", "format", "length", "steps")
Option = str | bool | int | float | None
"""Text first, and not ``Any``: a command line reads text under ``Any`` once more, and ``####`` becomes nothing."""


@dataclass(frozen=True)
class RewardSpec:
    """One reward."""

    name: str = "accuracy"
    """``accuracy``: 1 for the right final answer. ``format``: 1 where ``pattern`` is found. ``length``: minus the share
    of ``limit`` by which a completion is longer than it. ``steps``: the mean (``reduce: min``: the lowest) score of its
    steps by ``scorer``. Or ``package.module:function`` in TRL's signature."""
    weight: float = 1.0
    """Factor in the sum."""
    options: dict[str, Option | list[Option] | dict[str, Option]] = field(default_factory=dict)
    """``pattern``, ``limit``, ``scorer``, ``reduce``; further keyword arguments of a function of your own."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ConfigError(f"rewards: weight={self.weight} of {self.name!r}: must be a number")
        wanted = {"accuracy": set(), "format": {"pattern"}, "length": {"limit"}, "steps": {"scorer", "reduce"}}
        if ":" not in self.name and self.name not in BUILT_IN:
            raise ConfigError(
                f"rewards: unknown reward {self.name!r}.{nearest(self.name, BUILT_IN)} Known: "
                f"{', '.join(BUILT_IN)}, or package.module:function"
            )
        if self.name in wanted:
            if unknown := sorted(set(self.options) - wanted[self.name]):
                raise ConfigError(f"rewards: {self.name!r} has no option {unknown[0]!r}")
            needed = wanted[self.name] - {"reduce"} - set(self.options)
            if needed:
                raise ConfigError(f"rewards: {self.name!r} needs the option {min(needed)!r}")


class Rewards:
    """The weighted sum of rewards, each checked and timed.

    Args:
        specs: at least one.
        grader: judges final answers.

    Raises:
        ConfigError: a function that cannot be imported or called, or a bad pattern.
    """

    def __init__(self, specs: Sequence[RewardSpec], grader: Grader) -> None:
        self.specs = tuple(specs)
        self.grader = grader
        self.functions = [self._function(spec) for spec in self.specs]
        self.seconds: dict[str, float] = {}

    def __call__(self, columns: dict[str, list[Any]], ids: Sequence[str]) -> tuple[list[float], dict[str, list[float]]]:
        """Rewards of completions.

        Args:
            columns: ``prompts``, ``completions``, ``completion_ids`` and the rows' columns, one entry per completion.
            ids: names of the completions, for messages.

        Returns:
            The sums, and the values of each reward by name.

        Raises:
            TrainingError: a function raised, returned another number of values, or a value that is no finite number;
                the message names reward and sample.
        """
        totals, parts = [0.0] * len(ids), {}
        for spec, function in zip(self.specs, self.functions, strict=True):
            start = time.perf_counter()
            try:
                values = [math.nan if value is None else float(value) for value in function(**columns)]
            except Exception as error:
                raise TrainingError(
                    f"the reward {spec.name!r} failed on the {len(ids)} completions {ids[0]!r} to {ids[-1]!r}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            self.seconds[spec.name] = time.perf_counter() - start
            if len(values) != len(ids):
                raise TrainingError(f"the reward {spec.name!r} gave {len(values)} values for {len(ids)} completions")
            wrong = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
            if wrong is not None:
                raise TrainingError(
                    f"the reward {spec.name!r} gave {values[wrong]} for {ids[wrong]!r}: "
                    f"{columns['completions'][wrong][:200]!r}"
                )
            parts[spec.name] = values
            totals = [total + spec.weight * value for total, value in zip(totals, values, strict=True)]
        return totals, parts

    def correct(self, columns: dict[str, list[Any]]) -> list[bool]:
        """Whether each final answer is right."""
        golds = [str(answer) for answer in columns["answer"]]
        return [grade.verdict is Verdict.CORRECT for grade in self.grader.grade(columns["completions"], golds)]

    def _function(self, spec: RewardSpec) -> RewardFunction:
        if spec.name == "accuracy":
            return lambda **columns: [float(right) for right in self.correct(columns)]
        if spec.name == "format":
            given = spec.options["pattern"]
            if not isinstance(given, str):
                raise ConfigError(f"rewards: pattern={given!r} of 'format': must be text, a regular expression")
            try:
                pattern = re.compile(given, re.DOTALL)
            except re.error as error:
                raise ConfigError(f"rewards: pattern {given!r}: {error}") from error
            return lambda completions, **_: [float(pattern.search(text) is not None) for text in completions]
        if spec.name == "length":
            limit = spec.options["limit"]
            if not isinstance(limit, int) or limit < 1:
                raise ConfigError(f"rewards: limit={limit} of 'length': must be at least 1 token")
            return lambda completion_ids, **_: [-max(0, len(ids) - limit) / limit for ids in completion_ids]
        if spec.name == "steps":
            return _StepScores(str(spec.options["scorer"]), str(spec.options.get("reduce", "mean")))
        return _imported(spec)


class _StepScores:
    """The scores of a completion's steps, reduced."""

    def __init__(self, scorer: str, reduce: str) -> None:
        if reduce not in ("mean", "min"):
            raise ConfigError(f"rewards: reduce={reduce!r} of 'steps': must be mean or min")
        self.scorer = load_step_scorer(scorer, "rewards: scorer of 'steps'")
        self.reduce = reduce

    def __call__(
        self, completions: Sequence[str], rows: Sequence[Any], steps: Sequence[list[str]], **_: Any
    ) -> list[float]:
        values = []
        for scores in step_scores(self.scorer, rows, steps):
            known = [value for value in scores if not math.isnan(value)]
            values.append(0.0 if not known else min(known) if self.reduce == "min" else math.fsum(known) / len(known))
        return values


def _imported(spec: RewardSpec) -> RewardFunction:
    path, _, attribute = spec.name.partition(":")
    check_import(path, "rewards: name")
    try:
        function = getattr(import_module(path), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rewards: {spec.name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ConfigError(f"rewards: {spec.name!r} is a {type(function).__name__}, not a function")
    try:
        inspect.signature(function).bind_partial(**spec.options)
    except TypeError as error:
        raise ConfigError(f"rewards: {spec.name!r} does not take its options: {error}") from error
    return lambda **columns: function(**columns, **spec.options)
