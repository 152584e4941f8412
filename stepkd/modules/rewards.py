"""What a solution is worth: reward functions in TRL's signature, built-in ones, and their weighted sum.

A reward function takes ``prompts``, ``completions``, ``completion_ids`` and every column of the rows as keyword
arguments, one entry per completion, and returns one number per completion, or None where it has none to give. As in
TRL, prompts and completions are texts, or message lists where the row's prompt is one; ``solution`` is the gold answer
where the rows have no column of that name; ``log_metric``, ``log_extra`` and ``trainer_state`` are given; functions may
be async. TRL's own functions read message lists only: they are always given these, and the ``answer`` as ``solution``.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import re
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch

from stepkd.errors import ConfigError, TrainingError, nearest
from stepkd.grading.pool import Grader, Verdict
from stepkd.modules.distributed import all_reduce, union
from stepkd.modules.step_scores import load_step_scorer, step_scores
from stepkd.safe import imported

RewardFunction = Callable[..., Any]
"""In TRL's signature; an async one gives a coroutine."""
BUILT_IN = {"accuracy": (), "format": ("pattern",), "length": ("limit",), "steps": ("scorer", "reduce")}
"""Built-in rewards with their options, all needed but ``reduce``."""
Option = str | bool | int | float | None
"""Text first, and not ``Any``: a command line reads text under ``Any`` once more, and ``####`` becomes nothing."""


@dataclass(frozen=True)
class RewardConfig:
    """One reward."""

    name: str = "accuracy"
    """``accuracy``: 1 for the correct final answer. ``format``: 1 where ``pattern`` is found. ``length``: minus the
    share of ``limit`` by which a completion is longer than it. ``steps``: the mean (``reduce: min``: the lowest) score
    of its steps by ``scorer``, 0 where none of them could be scored. Or a function in TRL's signature, or a factory of
    one: ``package.module:function``, ``trl.rewards.accuracy_reward``; in Python also the function itself."""
    weight: float = 1.0
    """Factor in the sum."""
    options: dict[str, Option | list[Option] | dict[str, Option]] = field(default_factory=dict)
    """``pattern``, ``limit``, ``scorer``, ``reduce``; further keyword arguments of a function or factory."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ConfigError(f"rewards: weight={self.weight} of {self.name!r}: must be a number")
        if callable(self.name):
            object.__setattr__(self, "own", _OwnFunction(self.name, self.options))
            object.__setattr__(self, "name", getattr(self.name, "__name__", type(self.name).__name__))
            if self.name in BUILT_IN:
                raise ConfigError(f"rewards: a function named {self.name!r}, like a built-in reward: rename it")
            return
        if self.name in BUILT_IN:
            options = BUILT_IN[self.name]
            if unknown := sorted(set(self.options) - set(options)):
                raise ConfigError(f"rewards: {self.name!r} has no option {unknown[0]!r}")
            if missing := set(options) - {"reduce", *self.options}:
                raise ConfigError(f"rewards: {self.name!r} needs the option {min(missing)!r}")
        elif not {":", "."} & set(self.name):
            raise ConfigError(
                f"rewards: unknown reward {self.name!r}.{nearest(self.name, BUILT_IN)} Known: "
                f"{', '.join(BUILT_IN)}, or package.module:function (or with a dot)"
            )

    @cached_property
    def own(self) -> _OwnFunction | None:
        """The function that the name stands for, imported once; None for a built-in reward.

        Raises:
            ConfigError: it cannot be imported, is no function, or does not take its options.
        """
        return None if self.name in BUILT_IN else _imported(self)

    def reads(self) -> tuple[str, ...]:
        """Columns of which a row must have one for this reward; empty where it needs none."""
        if self.own is None:
            return ("answer",) if self.name == "accuracy" else ()
        return ("answer",) if "answer" in self.own.needs else ("answer", "solution") if self.own.needs else ()


class Rewards:
    """The weighted sum of rewards, each checked and timed.

    Args:
        specs: at least one.
        grader: judges final answers.

    Raises:
        ConfigError: a function that cannot be imported or called, or a bad pattern.
    """

    def __init__(self, specs: Sequence[RewardConfig], grader: Grader) -> None:
        self.specs = tuple(specs)
        self.grader = grader
        self.functions = [spec.own or self._function(spec) for spec in self.specs]
        self.seconds: dict[str, float] = {}
        self.trainer_state: Any = None
        """What functions are told of the run: a ``transformers.TrainerState``."""
        self.metrics: dict[str, list[float]] = {}
        """What functions have logged by ``log_metric``, see :meth:`logged`."""
        self.extra: dict[str, list[Any]] = {}
        """What functions said of the last completions by ``log_extra``, an entry each."""

    def __call__(
        self, columns: dict[str, list[Any]], ids: Sequence[str]
    ) -> tuple[list[float], dict[str, list[float | None]]]:
        """Rewards of completions.

        Args:
            columns: ``prompts``, ``completions``, ``completion_ids`` and the rows' columns, one entry per completion.
            ids: names of the completions, for messages.

        Returns:
            The sums, and the values of each reward by name. A None is left out of the sum; where every reward gives
            None it is NaN.

        Raises:
            TrainingError: a function raised, returned another number of values, or a value that is no finite number;
                the message names reward and sample.
        """
        totals: list[float] = [math.nan] * len(ids)
        parts: dict[str, list[float | None]] = {}
        self.extra = {}
        arguments: dict[str, Any] = {
            **columns,
            "trainer_state": self.trainer_state,
            "log_extra": self.extra.__setitem__,
            "log_metric": lambda name, value: self.metrics.setdefault(name, []).append(float(value)),
        }
        for spec, function in zip(self.specs, self.functions, strict=True):
            start = time.perf_counter()
            try:
                values = [None if value is None else float(value) for value in function(**arguments)]
            except Exception as error:
                raise TrainingError(
                    f"the reward {spec.name!r} failed on the {len(ids)} completions {ids[0]!r} to {ids[-1]!r}: "
                    f"{type(error).__name__}: {error}{_failing_line(error, spec.own)}"
                ) from error
            self.seconds[spec.name] = time.perf_counter() - start
            if len(values) != len(ids):
                raise TrainingError(f"the reward {spec.name!r} gave {len(values)} values for {len(ids)} completions")
            invalid = next(
                (i for i, value in enumerate(values) if value is not None and not math.isfinite(value)), None
            )
            if invalid is not None:
                raise TrainingError(
                    f"the reward {spec.name!r} gave {values[invalid]} for {ids[invalid]!r}: "
                    f"{columns['completions'][invalid][:200]!r}; it may give None to pass a completion over"
                )
            for i, value in enumerate(values):
                if value is not None:
                    totals[i] = spec.weight * value + (0.0 if math.isnan(totals[i]) else totals[i])
            parts[spec.name] = values
        return totals, parts

    def correct(self, columns: dict[str, list[Any]]) -> list[bool]:
        """Whether each final answer is correct; of a completion that was cut off (``cut_off``), only a finished one."""
        golds = [str(answer) for answer in columns["answer"]]
        known = {name: columns.get(name) for name in ("cut_off", "rows")}
        grades = self.grader.grade(columns["completions"], golds, **known)
        return [grade.verdict is Verdict.CORRECT for grade in grades]

    def logged(self, device: torch.device) -> dict[str, float]:
        """Means, over calls and ranks, of what functions have logged since the last time; every rank calls it."""
        if all(spec.own is None for spec in self.specs):
            return {}
        found, self.metrics = self.metrics, {}
        names = union(found)
        sums = all_reduce({name: sum(found.get(name, [])) for name in names}, device)
        counts = all_reduce({name: len(found.get(name, [])) for name in names}, device)
        return {name: sums[name] / counts[name] for name in names}

    def _function(self, spec: RewardConfig) -> RewardFunction:
        if spec.name == "accuracy":
            return lambda **columns: [float(correct) for correct in self.correct(columns)]
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
        how = spec.options.get("reduce", "mean")
        if how not in ("mean", "min"):
            raise ConfigError(f"rewards: reduce={how!r} of 'steps': must be mean or min")
        scorer = load_step_scorer(str(spec.options["scorer"]), "rewards: scorer of 'steps'")

        def reduced(scores: Sequence[float]) -> float:
            known = [value for value in scores if not math.isnan(value)]
            return 0.0 if not known else min(known) if how == "min" else math.fsum(known) / len(known)

        return lambda rows, steps, **_: [reduced(scores) for scores in step_scores(scorer, rows, steps)]


class _OwnFunction:
    """A function in TRL's signature, called as TRL calls it, with no more arguments than it takes.

    Args:
        function: sync or async; a callable object will do.
        options: further keyword arguments.
    """

    def __init__(self, function: Any, options: Mapping[str, Any]) -> None:
        self.function, self.options = function, options
        self.is_trl = str(getattr(function, "__module__", "")).startswith("trl.")
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
        self.names = {each.name for each in parameters}
        self.needs = {each.name for each in parameters if each.default is each.empty} & {"answer", "solution"}

    def __call__(self, **columns: Any) -> Any:
        chat = [self.is_trl or isinstance(prompt, list) for prompt in columns["prompts"]]
        for column, role in (("prompts", "user"), ("completions", "assistant")):
            columns[column] = [
                [{"role": role, "content": text}] if talks and isinstance(text, str) else text
                for text, talks in zip(columns[column], chat, strict=True)
            ]
        if "answer" in columns and (self.is_trl or "solution" not in columns):
            columns["solution"] = columns["answer"]
        given = {name: values for name, values in columns.items() if self.takes_all or name in self.names}
        found = self.function(**{**given, **self.options})
        return asyncio.run_coroutine_threadsafe(found, _event_loop()).result() if asyncio.iscoroutine(found) else found


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for all async rewards, because their clients outlive a call; a notebook's own loop is another one."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def _failing_line(error: BaseException, own: _OwnFunction | None) -> str:
    """`` (file, line 7)``: the innermost line of the function's own file, else of all; empty for a built-in reward."""
    function = getattr(own, "function", None)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    theirs = [frame for frame in frames if code is not None and frame.filename == code.co_filename] or frames
    return f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if own is not None and theirs else ""


def _imported(spec: RewardConfig) -> _OwnFunction:
    function = imported(spec.name, "rewards")
    try:
        own, options = _OwnFunction(function, spec.options), spec.options
        if not own.takes_all and not own.names & {"prompts", "completions", "completion_ids", "steps", "rows"}:
            own, options = _OwnFunction(function(**options), {}), {}  # a factory
        inspect.signature(own.function).bind_partial(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"rewards: {spec.name!r} does not take its options: {error}") from error
    return own
