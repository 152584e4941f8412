"""The settings of an iterated training, checked before anything runs."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import yaml

from stepkd.data.config import parse_spec, resolve_split
from stepkd.errors import ConfigError, check_bounds
from stepkd.labels.convert import ConverterConfig
from stepkd.labels.labellers import LabellerConfig
from stepkd.labels.monte_carlo import MonteCarlo
from stepkd.labels.settings import (
    Fitted,
    LabelConfig,
    LabellingConfig,
    PairJobConfig,
    PromptedConfig,
    Sampled,
    StepPairConfig,
    StepPairing,
    StepsConfig,
    TreePairConfig,
    TreePairing,
)
from stepkd.randomness import stream_key
from stepkd.runs.job import flat
from stepkd.sampling.engine import SamplingConfig
from stepkd.settings import read_value
from stepkd.yaml_files import as_yaml, find_recipe, nested, read_yaml

SET_BY_ITERATE = (
    *("model.init_args.policy.path", "model.init_args.reference", "data.init_args.train", "out", "resume", "overwrite"),
)
"""Training settings that the iteration writes itself, with what they hold."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained in every iteration."""

    recipes: list[str]
    """Recipes of ``stepkd fit``, in order: method, then overlays; files, or names of ``stepkd recipes list``."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Training settings that override the recipes', nested or with dotted names: trainer.max_steps: 100."""

    def __post_init__(self) -> None:
        if not self.recipes:
            raise ConfigError("train: recipes names no file: give the recipes for `stepkd fit`")
        for key in flat(self.overrides):
            given = f"{key.replace('.init_args', '')}."
            owned = [f"{own.replace('.init_args', '')}." for own in SET_BY_ITERATE]
            if any(given.startswith(own) or own.startswith(given) for own in owned):
                raise ConfigError(f"train: overrides: {key} is set by every iteration itself")


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """How every model is evaluated."""

    problems: str
    """Held-out problems: a file, a folder, or data settings in one word."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(n=8))
    """How solutions are drawn beside the greedy one: 2 or more of every problem (8, the S of maj@S), above temperature
    0; the divergence from M0 is estimated at temperature 1 alone. Length, stops and seed are those of ``label``."""
    steps: StepsConfig | None = None
    """How the sampled solutions are cut into steps; null cuts them as those that are trained on."""
    labeller: LabellerConfig | None = None
    """Who labels their steps; null takes who labels the training solutions. MonteCarlo continues with M0 for every
    model, so that all have one judge."""

    def __post_init__(self) -> None:
        n, temperature = self.sampling.n, self.sampling.temperature
        if n < 2 or temperature <= 0:
            raise ConfigError(
                f"evaluation: {n} samples at temperature {temperature:g}: give at least 2 samples and a temperature "
                "above 0; the greedy solution is evaluated besides"
            )


class PairsConfig(ABC):
    """What pairs an iteration makes, and how."""

    sampling: SamplingConfig
    """How what they need is sampled."""

    @abstractmethod
    def job(self, labels: LabelConfig, **settings: Any) -> PairJobConfig:
        """The job that makes them from an iteration's problems or labelled solutions."""


@dataclass(frozen=True, kw_only=True)
class StepPairs(StepPairing, PairsConfig):
    """The first incorrect step of the labelled solutions against the first step of a continuation that ends correctly
    (Step-DPO, arXiv 2406.18629)."""

    def job(self, labels: LabelConfig, **settings: Any) -> PairJobConfig:
        """Of the labelled solutions."""
        return StepPairConfig(completions=labels.out, model=labels.solutions.model, **settings)


@dataclass(frozen=True, kw_only=True)
class TreePairs(TreePairing, PairsConfig):
    """Siblings of a search tree of every problem (MCTS-DPO, arXiv 2405.00451)."""

    def job(self, labels: LabelConfig, **settings: Any) -> PairJobConfig:
        """Of the problems."""
        return TreePairConfig(problems=labels.solutions.source, model=str(labels.solutions.model), **settings)


@dataclass(frozen=True, kw_only=True)
class SampledLabels(LabellingConfig):
    """How the solutions that are trained on are sampled, cut and labelled."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(n=4))
    """How solutions are drawn, 4 of every problem by default; the seed is the iteration's."""
    dedupe: bool = True
    """Whether only one of several solutions of a problem with the same text is labelled."""
    device: str = "auto"
    """Where models compute: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``, which takes a GPU where there is one."""


@dataclass(frozen=True, kw_only=True)
class IterateConfig:
    """An iterated training: M0 -> M1 -> ... -> MK."""

    model: str
    """M0, with which all begins: run folder, checkpoint, model folder, hub id, .gguf file or tiny preset."""
    problems: str
    """Problems whose solutions are sampled and labelled for training: a file, a folder, or data settings in one word
    (gsm8k:split=train,limit=500)."""
    evaluation: HeldOutConfig
    """How every model is evaluated."""
    train: TrainConfig
    """How every model is trained."""
    iterations: int = 3
    """How many models are trained, 1 or more; it may be raised later, since finished iterations are kept."""
    problems_per_iteration: int | None = None
    """Fresh problems that every iteration gets, 1 or more; null gives all of them the same ones, sampled with other
    noise."""
    reference: Literal["reset", "kept"] = "reset"
    """Reference model of iteration k: M_{k-1} (``reset``), or M0 throughout (``kept``)."""
    label: SampledLabels = field(default_factory=SampledLabels)
    """How solutions are sampled and labelled for training."""
    convert: ConverterConfig | None = None
    """What the labelled solutions are converted to, as ``stepkd convert --to`` takes it; null: training reads them as
    they are."""
    pairs: PairsConfig | None = None
    """Pairs that M_{k-1} draws and training reads: StepPairs of the labelled solutions, or TreePairs of search trees of
    the problems; prompt, grading and precision are those of ``label``. Null draws none."""
    launcher: str | None = None
    """Command before ``-m stepkd`` that starts labelling and training on several GPUs, for instance 'accelerate launch
    --multi_gpu'; null runs them in this process. Labelling through VLLMServer is always this process's, which gives the
    servers every model's weights."""
    seed: int = 0
    """Seed of sampling and training in every iteration, 0 or more."""

    def __post_init__(self) -> None:
        check_bounds("", self, iterations="[1, inf)", problems_per_iteration="[1, inf)", seed="[0, inf)")
        if self.label.dtype == "auto":
            raise ConfigError(
                "label.dtype=auto: every job would measure its own, and models would be compared in two types"
            )
        job = self.label_spec(1, out="labels", model=self.model)
        held_out = self.held_out_spec(out="samples", model=self.model)
        if isinstance(held_out.steps, Fitted):
            raise ConfigError(
                f"evaluation: {held_out.steps.segmenter} steps would be Fitted with another threshold for every model, "
                "and steps of different models could not be compared: set evaluation.steps, say to Cut"
            )
        if self.pairs is not None:
            if self.convert is not None:
                raise ConfigError("convert and pairs both make the rows that are trained on: give one of them")
            self.pair_spec(1, job, out="pairs")
        self.evaluated_benchmark()

    def label_spec(self, k: int, *, out: str, model: str) -> LabelConfig:
        """The labelling job of iteration k >= 1: solutions of model M_{k-1} to the training problems."""
        sampling = replace(self.label.sampling, seed=iteration_seed(self.seed, "label", k))
        solutions = Sampled(problems=self.problem_word(k), model=model, sampling=sampling, dedupe=self.label.dedupe)
        return self._job(self.label, out, solutions)

    def _job(self, how: LabellingConfig, out: str, solutions: Sampled) -> LabelConfig:
        """A labelling job with everything that it draws keyed by the seed of its solutions."""
        labeller = how.labeller
        if isinstance(labeller, MonteCarlo):
            labeller = replace(labeller, sampling=replace(labeller.sampling, seed=solutions.sampling.seed))
        same = {item.name: getattr(how, item.name) for item in fields(LabellingConfig)}
        return LabelConfig(out=out, solutions=solutions, device=self.label.device, **same | {"labeller": labeller})

    def problem_word(self, k: int) -> str:
        """The data word of the training problems of iteration k >= 1."""
        if self.problems_per_iteration is None:
            return self.problems
        limit = self.problems_per_iteration
        offset = parse_spec(self.problems).offset + (k - 1) * limit
        return f"{explicit_word(self.problems)},offset={offset},limit={limit}"

    def held_out_spec(self, *, out: str, model: str) -> LabelConfig:
        """The labelling job of a model's solutions to the held-out problems; the same noise for every model."""
        drawn, held_out = self.label.sampling, self.evaluation
        sampling = replace(
            held_out.sampling,
            max_new_tokens=drawn.max_new_tokens,
            stop=drawn.stop,
            seed=iteration_seed(self.seed, "evaluate", 0),
        )
        how = replace(
            self.label,
            steps=held_out.steps or self.label.steps,
            labeller=held_out.labeller or self.label.labeller,
        )
        return self._job(how, out, Sampled(problems=held_out.problems, model=model, sampling=sampling, dedupe=False))

    def converter(self, k: int) -> ConverterConfig:
        """The converter of iteration k; what it draws has a seed of its own in every iteration unless one was given."""
        assert self.convert is not None
        if getattr(self.convert, "seed", None) != 0:
            return self.convert
        return replace(self.convert, seed=iteration_seed(self.seed, "convert", k))  # type: ignore[type-var]

    def pair_spec(self, k: int, job: LabelConfig, *, out: str) -> PairJobConfig:
        """The pair job of iteration k.

        Args:
            k: the iteration.
            job: its labelling job, whose solutions and common settings are used.
            out: folder of the pair job.
        """
        assert isinstance(job.solutions, Sampled)
        assert self.pairs is not None
        drawn, own = job.solutions.sampling, self.pairs.sampling
        sampling = replace(
            own,
            max_new_tokens=own.max_new_tokens or drawn.max_new_tokens,
            stop=own.stop or drawn.stop,
            seed=iteration_seed(self.seed, "pairs", k),
        )
        shared = {item.name: getattr(job, item.name) for item in fields(PromptedConfig)} | {"device": job.device}
        return self.pairs.job(job, **shared | vars(self.pairs) | {"sampling": sampling, "out": out})

    def evaluated_benchmark(self) -> tuple[str, str]:
        """Name of the benchmark of the held-out problems, and their data settings as ``stepkd evaluate`` takes them.

        Raises:
            ConfigError: problems of a source that is no benchmark.
        """
        from stepkd.data.sources import BENCHMARKS

        source, _, rest = explicit_word(self.evaluation.problems).partition(":")
        if source not in BENCHMARKS:
            known = ", ".join(BENCHMARKS)
            raise ConfigError(f"evaluation: problems of source {source!r} cannot be evaluated; sources: {known}")
        return source, rest

    def identity(self) -> dict[str, Any]:
        """What decides the results of an iteration, as JSON values: all but how many there are and who starts them."""
        plain = as_yaml(self)
        for name in ("iterations", "launcher", "out", "overwrite"):
            plain.pop(name, None)
        plain["label"]["engine"] = {
            type(self.label.engine).__name__: self.label.engine.at_once
        }  # wherever its servers are
        plain["train"] = {
            "recipes": {name: read_yaml(find_recipe(name), "recipe") for name in self.train.recipes},
            "overrides": _read(nested(self.train.overrides)),
        }
        return dict(json.loads(json.dumps(plain)))


def _read(value: Any) -> Any:
    """Settings in which texts, as a command line has them, are what they are in a file."""
    if isinstance(value, Mapping):
        return {name: _read(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_read(each) for each in value]
    try:
        return read_value(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value


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
