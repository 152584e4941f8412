"""The settings of an iterated training: a YAML file with overrides, checked before anything runs.

Keys: the fields of :class:`IterateConfig`; ``label``, ``convert``, ``train`` and ``evaluation`` are mappings.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from stepkd.data.spec import parse_spec, resolve_split
from stepkd.errors import ConfigError, DataError, StepkdError, nearest
from stepkd.labels.convert import CONVERTERS
from stepkd.labels.feedback import ConvertOptions
from stepkd.labels.settings import PAIR_JOBS, JobConfig, LabelConfig
from stepkd.randomness import stream_key
from stepkd.settings import build_settings
from stepkd.yaml_files import check_keys, find_recipe, mapping, read_yaml, settings_from

OWN = frozenset({"out", "problems", "rollouts", "model", "seed"})
"""Settings of a labelling job that the iteration decides."""
HELD_OUT_OWN = frozenset({"limit", "samples", "temperature", "top_p", "top_k", "dedupe"})
"""Settings of ``label`` that say how much is drawn and how; the held-out solutions have their own."""
SHARED_WITH_PAIRS = ("device", "dtype", "template", "extractors", "stop", "max_new_tokens", "max_rows", "deadline_s")
"""Settings of the labelling job that the pair job of the same iteration shares."""
PAIRS_OWN = frozenset({"out", "model", "problems", "rollouts", "seed", "limit"})
"""Settings of a pair job that the iteration decides."""
NEEDS_RIGHT_ONLY = frozenset({"demonstrations", "clean_demonstrations"})
"""Converters after which a set without a single wrong answer can still be trained on."""
SET_BY_ITERATE = (
    *("model.init_args.policy.path", "model.init_args.reference", "data.init_args.train.path"),
    *("data.init_args.train.source", "data.init_args.train", "out", "resume", "overwrite"),
)
"""Training settings that the iteration writes itself."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a model is trained in every iteration."""

    recipes: list[str]
    """Recipe files for ``stepkd fit``, in order: method, then overlays."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Dotted training setting -> value, on top of the recipes."""


@dataclass(frozen=True, kw_only=True)
class HeldOutSettings:
    """How every model is evaluated."""

    problems: str
    """Held-out problems, a data word."""
    samples: int = 8
    """Solutions per problem, >= 2; S of maj@S."""
    temperature: float = 1.0
    """Of the sampled solutions, > 0. The divergence from M0 is estimated at temperature 1 only."""
    label: dict[str, Any] = field(default_factory=dict)
    """Settings of labelling on top of those of the training labels."""


@dataclass(frozen=True, kw_only=True)
class IterateConfig:
    """An iterated training: M0 -> M1 -> ... -> MK."""

    model: str
    """M0: run folder, checkpoint, model folder, hub id, ``.gguf`` file or tiny preset."""
    problems: str
    """Problems whose solutions are sampled and labelled for training, a data word."""
    evaluation: HeldOutSettings
    """How every model is evaluated."""
    train: TrainSettings
    """How every model is trained."""
    iterations: int = 3
    """K, >= 1. May be raised later: finished iterations are kept."""
    problems_per_iteration: int | None = None
    """Fresh problems in every iteration, that many each; None: the same ones, sampled with other noise."""
    reference: Literal["reset", "kept"] = "reset"
    """Reference model of iteration k: M_{k-1} (``reset``), or M0 throughout (``kept``)."""
    label: dict[str, Any] = field(default_factory=dict)
    """Fields of :class:`~stepkd.labels.LabelConfig`: labeller, samples, temperature, segmenter, ..."""
    convert: dict[str, Any] | None = None
    """``to`` (a converter's name) and its options; None: training reads the labelled solutions as they are."""
    pairs: dict[str, Any] | None = None
    """``to`` (a pair job's name, ``step_preference``) and its options as ``stepkd label`` has them: M_{k-1} draws pairs
    and training reads these. None: no pairs."""
    launcher: str | None = None
    """Command before ``-m stepkd`` that starts labelling and training on several GPUs; None: in this process."""
    seed: int = 0
    """Keys sampling and training of every iteration."""

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("problems_per_iteration", 1), ("seed", 0)):
            number = getattr(self, name)
            if number is not None and number < least:
                raise ConfigError(f"{name}={number}: must be at least {least}")
        if self.evaluation.samples < 2 or self.evaluation.temperature <= 0:
            raise ConfigError(
                f"evaluation: {self.evaluation.samples} samples at temperature {self.evaluation.temperature:g}: give "
                "at least 2 samples and a temperature above 0; the greedy solution is evaluated besides"
            )
        if not self.train.recipes:
            raise ConfigError("train: recipes names no file: give the recipes for `stepkd fit`")
        for key in self.train.overrides:
            if key in SET_BY_ITERATE or key.startswith("model.init_args.reference."):
                raise ConfigError(f"train: overrides: {key} is set by every iteration itself")
        for name, known in (("label", OWN), ("evaluation: label", OWN | {"samples", "temperature", "dedupe"})):
            given = self.label if name == "label" else self.evaluation.label
            if wrong := sorted(known & set(given)):
                raise ConfigError(f"{name}: {wrong[0]} is set by the iteration itself: take it out")
            check_keys(given, [item.name for item in fields(LabelConfig) if item.name not in known], name)
        self.label_spec(1, out="labels", model=self.model)
        held_out = self.held_out_spec(out="samples", model=self.model)
        if held_out.fits_threshold:
            raise ConfigError(
                f"evaluation: the segmenter {held_out.segmenter!r} would fit another threshold for every model, and "
                "steps of different models could not be compared: set evaluation.label.segmenter, say to newline"
            )
        self.convert_options(1)
        if self.pairs is not None:
            if self.convert is not None:
                raise ConfigError("convert and pairs both make the rows that are trained on: give one of them")
            self.pair_spec(1, self.label_spec(1, out="labels", model=self.model), out="pairs")
        self.evaluated_benchmark()

    @property
    def needs_wrong_answers(self) -> bool:
        """Whether training needs wrong answers beside right ones."""
        return self.convert is None or self.convert["to"] not in NEEDS_RIGHT_ONLY

    def label_spec(self, k: int, *, out: str, model: str) -> LabelConfig:
        """The labelling job of iteration k >= 1: solutions of model M_{k-1} to the training problems."""
        settings = self.label | {"out": out, "model": model, "problems": self.problem_word(k)}
        settings["seed"] = iteration_seed(self.seed, "label", k)
        return _label_spec(settings, "label")

    def problem_word(self, k: int) -> str:
        """The data word of the training problems of iteration k >= 1."""
        if self.problems_per_iteration is None:
            return self.problems
        limit = self.problems_per_iteration
        offset = parse_spec(self.problems).offset + (k - 1) * limit
        return f"{explicit_word(self.problems)},offset={offset},limit={limit}"

    def held_out_spec(self, *, out: str, model: str) -> LabelConfig:
        """The labelling job of a model's solutions to the held-out problems; the same noise for every model."""
        inherited = {name: value for name, value in self.label.items() if name not in HELD_OUT_OWN}
        settings = inherited | self.evaluation.label
        settings |= {"samples": self.evaluation.samples, "temperature": self.evaluation.temperature, "dedupe": False}
        settings |= {"out": out, "model": model, "problems": self.evaluation.problems}
        settings["seed"] = iteration_seed(self.seed, "evaluate", 0)
        return _label_spec(settings, "evaluation: label")

    def pair_spec(self, k: int, job: LabelConfig, *, out: str) -> tuple[str, JobConfig]:
        """The pair job of iteration k, and its kind.

        Args:
            k: the iteration.
            job: its labelling job, whose solutions and common settings are used.
            out: folder of the pair job.

        Raises:
            ConfigError: no such kind or setting, or a value that is none.
        """
        values = dict(self.pairs or {})
        to = values.pop("to", None)
        if to not in PAIR_JOBS:
            raise ConfigError(
                f"pairs: to={to!r} is no pair job.{nearest(str(to), PAIR_JOBS)} Known: {', '.join(PAIR_JOBS)}"
            )
        kind = PAIR_JOBS[to]
        known = _names(kind)
        check_keys(values, sorted(known - PAIRS_OWN), "pairs")
        source = "problems" if "problems" in known else "rollouts"
        common = {name: getattr(job, name) for name in SHARED_WITH_PAIRS}
        decided: dict[str, Any] = {
            source: job.problems if source == "problems" else job.out,
            "model": job.model,
            "out": out,
        }
        decided["seed"] = iteration_seed(self.seed, "pairs", k)
        return to, settings_from(kind, common | values | decided, _checked)

    def convert_options(self, k: int) -> ConvertOptions:
        """Options of the converter in iteration k."""
        values = dict(self.convert or {"to": "stepwise"})
        known = ["to", *(item.name for item in fields(ConvertOptions))]
        check_keys(values, known, "convert")
        to = values.pop("to", None)
        if to not in CONVERTERS:
            hint = nearest(str(to), CONVERTERS)
            raise ConfigError(f"convert: to={to!r} is no converter.{hint} Known: {', '.join(CONVERTERS)}")
        options: ConvertOptions = build_settings(ConvertOptions, values, "convert")
        return (
            options if "seed" in values else dataclasses.replace(options, seed=iteration_seed(self.seed, "convert", k))
        )

    def evaluated_benchmark(self) -> tuple[str, str]:
        """Name of the benchmark of the held-out problems, and their data settings as ``stepkd evaluate`` takes them.

        Raises:
            ConfigError: problems of a source that is no benchmark.
        """
        from stepkd.data.benchmarks import BENCHMARKS

        source, _, rest = explicit_word(self.evaluation.problems).partition(":")
        names = [benchmark.name for benchmark in BENCHMARKS.values() if benchmark.source == source]
        if not names:
            known = ", ".join(sorted({benchmark.source for benchmark in BENCHMARKS.values()}))
            raise ConfigError(f"evaluation: problems of source {source!r} cannot be evaluated; sources: {known}")
        return names[0], rest

    def identity(self) -> dict[str, Any]:
        """What decides the results of an iteration, as JSON values: all but how many there are and who starts them."""
        plain = asdict(self)
        for name in ("iterations", "launcher"):
            plain.pop(name)
        plain["train"] = {
            "recipes": {name: read_yaml(find_recipe(name), "recipe") for name in self.train.recipes},
            "overrides": self.train.overrides,
        }
        return dict(json.loads(json.dumps(plain)))


def _checked(kind: type, values: dict[str, Any]) -> Any:
    """Settings of a pair job with their types checked, those in it included."""
    plain = {name: asdict(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}  # type: ignore[arg-type]
    return build_settings(kind, plain, "pairs")


def _names(kind: Any) -> set[str]:
    """Names of a class's settings, those of the settings classes in it included."""
    inner = {name: hint for name, hint in get_type_hints(kind).items() if dataclasses.is_dataclass(hint)}
    own = {item.name for item in fields(kind)} - set(inner)
    return own.union(*(_names(hint) for hint in inner.values()))


def iteration_seed(seed: int, purpose: str, k: int) -> int:
    """Seed of one purpose in iteration k: a whole number below 2**31."""
    return stream_key(seed, "iterate", purpose, k) % 2**31


def explicit_word(word: str) -> str:
    """A data word with its source and split spelt out, so that further settings can follow."""
    spec = parse_spec(word)
    text = word.strip()
    if not (text == spec.source or text.startswith(f"{spec.source}:")):
        text = f"{spec.source}:path={spec.path}"  # a bare file, or the folder of a labelling job
    return f"{text}{',' if ':' in text else ':'}split={resolve_split(spec)}"


def load_spec(path: str | Path, overrides: Mapping[str, Any] | None = None) -> IterateConfig:
    """Read and check a file.

    Args:
        path: the YAML file.
        overrides: dotted key -> value on top of it, for example ``label.samples``.

    Raises:
        DataError: unreadable, or settings that cannot be; the message names the file and the key.
    """
    path = Path(path)
    raw = read_yaml(path, "settings")
    try:
        settings = mapping(raw, "the file")
        if isinstance(settings.get("model"), dict):
            raise ConfigError("this is a training recipe: run it with `stepkd fit`, or name it under train: recipes")
        for key, value in (overrides or {}).items():
            put(settings, key, value)
        return _build(settings)
    except StepkdError as error:
        raise DataError(str(error), path=path) from error


def _build(settings: dict[str, Any]) -> IterateConfig:
    check_keys(settings, [item.name for item in fields(IterateConfig)], "settings")
    needed: tuple[tuple[str, type | None, str], ...] = (
        ("model", None, ""),
        ("problems", None, ""),
        ("train", TrainSettings, "recipes"),
        ("evaluation", HeldOutSettings, "problems"),
    )
    for name, kind, key in needed:
        if settings.get(name) is None:
            raise ConfigError(f"the key {name!r} is missing")
        if kind is not None:
            check_keys(settings[name], [item.name for item in fields(kind)], name)
            if settings[name].get(key) is None:
                raise ConfigError(f"{name}: the key {key!r} is missing")
    convert = settings.get("convert")
    if convert is not None and "to" not in mapping(convert, "convert"):
        raise ConfigError(f"convert: needs `to`, the name of a converter: {', '.join(CONVERTERS)}")
    spec = build_settings(IterateConfig, settings, "settings")
    assert isinstance(spec, IterateConfig)
    return spec


def put(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings.

    Raises:
        ConfigError: a part of the key holds no mapping.
    """
    parts = key.split(".")
    if parts[:2] == ["train", "overrides"] and len(parts) > 2:
        parts = ["train", "overrides", ".".join(parts[2:])]  # a dotted key of the training recipe is one key
    *folders, last = parts
    target = settings
    for name in folders:
        inner = target.setdefault(name, {})
        if inner is None:
            inner = target[name] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {name} has no keys, it is {inner!r}")
        target = inner
    target[last] = value


def _label_spec(settings: Mapping[str, Any], where: str) -> LabelConfig:
    spec = build_settings(LabelConfig, settings, where)
    assert isinstance(spec, LabelConfig)
    return spec
