"""Settings of the commands that evaluate models and step scorers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import stepkd.scorers.load  # noqa: F401 (choices of --scorer)
from stepkd.data.config import DataConfig, parse_spec
from stepkd.data.sources import get_benchmark
from stepkd.data.sources.problems import SUBSETS
from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, check_bounds, check_choice, nearest
from stepkd.grading.pool import GradingConfig
from stepkd.models.spec import DType
from stepkd.runs.job import JobConfig
from stepkd.sampling.config import IN_PROCESS, EngineConfig
from stepkd.sampling.engine import SamplingConfig
from stepkd.scorers.scorer import Reduction, ScorerConfig
from stepkd.search.beam import Beam, ParticleFilter
from stepkd.search.best_of_n import BestOfN, Greedy
from stepkd.search.mcts import MCTS
from stepkd.search.phi import PhiDecoding
from stepkd.search.revise import Refine, VerifyRevise
from stepkd.search.state import Search
from stepkd.search.tokens import EntropyBranching, Speculative
from stepkd.search.value_guided import ValueGuided
from stepkd.statistics import percent
from stepkd.steps.labels import check_threshold
from stepkd.steps.segment import SEGMENTERS, get_segmenter

Parity: TypeAlias = Literal["agree", "differ", "too few problems"]


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """A figure that was published, or measured by another harness, and what is accepted as the same."""

    value: float
    """That figure, in percent: pass@1 of stepkd evaluate; of evaluate-prm the mean F1 of ProcessBench's subsets."""
    low: float
    """Lower end of the accepted interval, in percent; recipes give the 95% interval of the value at the number of
    problems that it was measured on (Wilson's of pass@1)."""
    high: float
    """Upper end of the accepted interval, in percent."""
    source: str
    """Where it comes from: paper, model card or file, and the table; or harness and version."""
    settings: str
    """How it was measured, as far as the source says (prompt, examples, sampling, longest completion), and what differs
    here."""
    ran: str
    """Whether the recipe has been run, and what came out."""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.value <= self.high <= 100:
            raise ConfigError(
                f"reference {self.value} with the accepted interval {self.low} to {self.high}: low <= value <= high in "
                "percent"
            )

    def compare(self, measured: Mapping[str, Any]) -> tuple[Parity, str]:
        """Compare a figure with the published one.

        Args:
            measured: that figure of a summary: ``value``, ``low`` and ``high``, shares or None.

        Returns:
            ``differ`` where the 95% interval and the accepted one have nothing in common; ``too few problems`` where
            they have, but there is no interval or it is more than twice as wide as the accepted one; else ``agree``.
            And a line that says so with the numbers.
        """
        low, high = (math.nan if measured[end] is None else 100 * measured[end] for end in ("low", "high"))
        verdict: Parity = "too few problems"
        if low > self.high or high < self.low:
            verdict = "differ"
        elif high - low <= 2 * (self.high - self.low):
            verdict = "agree"
        return verdict, (
            f"parity: {verdict}. Measured {percent(measured)}, reference {self.value:g} (accepted {self.low:g} to "
            f"{self.high:g}; {self.source})"
        )


@dataclass(frozen=True, kw_only=True)
class ParityConfig(JobConfig):
    """A job whose result may be compared with a published one."""

    reference: ReferenceConfig | None = None
    """Published figure that the result is compared with, as recipes of parity/ hold one; by default there is none."""
    check_parity: bool = False
    """End with exit code 1 unless the result agrees with the reference (it differs, or problems are too few to tell);
    off by default, where it is said only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.check_parity and self.reference is None:
            raise ConfigError(
                "check_parity compares with a reference, and there is none: give one of the recipes parity/"
            )

    def parity(self, measured: Mapping[str, Any], say: Callable[[str], None]) -> int:
        """Say how a figure (as :meth:`ReferenceConfig.compare` takes it) compares; the exit code of the command."""
        if self.reference is None:
            return 0
        verdict, line = self.reference.compare(measured)
        say(line)
        return int(self.check_parity and verdict != "agree")


@dataclass(frozen=True, kw_only=True)
class BenchmarkJobConfig(JobConfig):
    """A job that samples solutions of a benchmark's problems and grades them."""

    model: str
    """Model that solves the problems: run folder, checkpoint, model folder, hub id, .gguf file or tiny preset."""
    benchmark: str = "gsm8k"
    """Name of the benchmark, of which stepkd benchmarks shows all; GSM8K is the most widely reported."""
    data: str | None = None
    """File, folder or data settings (key=value,...) with the problems; the default is the benchmark's hub data set."""
    limit: int | None = None
    """Only the first so many problems, at least 1; the default takes all."""
    grading: GradingConfig = field(default_factory=GradingConfig)
    """How answers are found and compared."""
    template: str | PromptTemplate | None = None
    """Prompt template: a built-in name (gsm8k, math, plain, task) or a YAML file; the default is the one that the model
    was trained with, else the benchmark's."""
    style: Literal["auto", "chat", "plain"] | None = None
    """Style of the prompt in place of the template's."""
    system: str | None = None
    """System prompt in place of the template's."""
    few_shot: int | None = None
    """Number of built-in worked examples, 0 to 4, in place of the template's."""
    dtype: DType | Literal["auto"] | None = None
    """Numeric type of the weights; the default keeps the one they are stored in, and auto takes what samples faster
    here (bfloat16 or float32), measured once for the whole job."""
    attention: str | None = None
    """Attention implementation (sdpa, eager, flash_attention_2); the default lets transformers choose."""
    engine: EngineConfig = IN_PROCESS
    """Where solutions are sampled: Transformers (in this process), VLLMServer or VLLM."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("", self, limit="[1, inf)")

    def limited(self, sampling: SamplingConfig) -> SamplingConfig:
        """Sampling settings with the benchmark's longest completion where they leave it to it."""
        longest = sampling.max_new_tokens or get_benchmark(self.benchmark).max_new_tokens
        return replace(sampling, max_new_tokens=longest)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(BenchmarkJobConfig, ParityConfig):
    """One evaluation of a model on a benchmark."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))
    """How solutions are sampled; greedy by default, where one sample is enough."""
    benchmark_samples: bool = False
    """Draw as many completions of a problem as the field does on this benchmark (64 of AIME's; stepkd benchmarks shows
    it) where sampling.n is left at 1; off by default, because greedy evaluations need one."""
    ks: tuple[int, ...] = ()
    """The k of pass@k and maj@k, each from 1 to the samples of a problem; the default takes the powers of two up to
    that."""

    def __post_init__(self) -> None:
        super().__post_init__()
        n = self.drawn.n
        self.drawn.check_noise("samples")
        if bad := [k for k in self.ks if not 1 <= k <= n]:
            raise ConfigError(f"k={bad[0]} of pass@k: must lie between 1 and the number of samples per problem, {n}")

    @property
    def drawn(self) -> SamplingConfig:
        """``sampling`` with the benchmark's longest completion and number of samples where it leaves them to it."""
        own = self.sampling
        n = get_benchmark(self.benchmark).samples if self.benchmark_samples and own.n == 1 else own.n
        return replace(self.limited(own), n=n)


METHODS: tuple[type[Search], ...] = (
    *(Greedy, BestOfN, Beam, MCTS, ParticleFilter, PhiDecoding, Refine, VerifyRevise),
    *(ValueGuided, EntropyBranching, Speculative),
)
"""The methods that settings name by class alone; one of your own is named by its import path."""


@dataclass(frozen=True, kw_only=True)
class SearchJobConfig(BenchmarkJobConfig):
    """One comparison of test-time methods on a benchmark."""

    methods: tuple[Search, ...]
    """Methods to compare, each a class with its settings, on a command line
    '[{class_path: Beam, init_args: {n: 8}}, ...]'; Greedy is always run, because the others are compared with it."""
    scorer: ScorerConfig | str | None = None
    """What scores steps: one of the classes, or a word (run folder, checkpoint, export or published PRM; judge:MODEL;
    implicit:RUN; checker; arithmetic; gain); null for methods that need none."""
    max_rows: int = 32
    """Solutions scored at once, at least 1; it belongs to what decides the result: batch shapes decide rounding."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How steps and solutions are drawn; max_new_tokens is the longest solution of every method, and the number of
    samples is a setting of the job and of its methods, not n."""
    segmenter: str = "newline"
    """Segmenter that says where a step ends, by name: newline (the default), blank_line, step_heading, sentence,
    regex:PATTERN, or adaptive_step:THRESHOLD. Only the first two end with a string at which drawing stops: with the
    others every step costs max_step_tokens."""
    max_step_tokens: int = 128
    """Longest step in tokens, at least 1; a longer one is cut off and ends its solution. With a segmenter other than
    newline and blank_line take little more than a step has, because what is drawn behind it is thrown away, and
    counts."""
    samples: int = 16
    """Solutions of a problem that are drawn once, at least 1: methods that choose among samples share them, and
    best-of-N at the token budget of every other method is read from them. 16 are a beam's solutions by default; what
    draws more tokens than all of them is compared with all of them, and the table says so."""
    difficulty_samples: int = 0
    """Solutions of a problem that no method uses, at least 0, whose pass rate says how difficult it is; 0 divides
    nothing by difficulty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("", self, max_rows="[1, inf)", samples="[1, inf)", difficulty_samples="[0, inf)")
        check_bounds("", self, max_step_tokens="[1, inf)")
        get_segmenter(self.segmenter)
        if self.sampling.n != 1:
            raise ConfigError(f"sampling.n={self.sampling.n}: a search takes its numbers of samples from samples and n")
        if self.sampling.temperature == 0:
            raise ConfigError("sampling.temperature=0: every sample would be the same; greedy is run in any case")
        if not self.methods:
            raise ConfigError("methods is empty: give at least one, such as --methods Beam; greedy is run in any case")
        names = [method.name for method in self.all_methods]
        for name in names:
            if not re.fullmatch(r"[\w@.+-]+", name) or name in ("pool", "difficulty"):
                what = "letters, digits and @.+-_, neither pool nor difficulty"
                raise ConfigError(f"methods: {name!r} is no name for a method: {what}")
            if names.count(name) > 1:
                raise ConfigError(f"methods: two are called {name}, and have the same settings: drop one")
        for method in self.all_methods:
            if method.needs_scorer and self.scorer is None:
                raise ConfigError(f"methods: {method.name} needs a step scorer and there is none: give --scorer")
            if isinstance(method, BestOfN) and method.n > self.samples:
                place = f"methods: {method.name} chooses among n={method.n} samples"
                raise ConfigError(f"{place}, and samples={self.samples} are drawn: give --samples {method.n}")

    @property
    def all_methods(self) -> tuple[Search, ...]:
        """The methods, greedy first where none has its name."""
        return self.methods if any(each.name == Greedy().name for each in self.methods) else (Greedy(), *self.methods)

    @property
    def drawn(self) -> SamplingConfig:
        """``sampling`` with the benchmark's longest completion where it leaves that to it."""
        return self.limited(self.sampling)


@dataclass(frozen=True, kw_only=True)
class _ScorerJobConfig(JobConfig):
    """A job that runs a step scorer."""

    scorer: ScorerConfig | str
    """What scores the steps: one of the classes, or a word (run folder, checkpoint, export or published PRM;
    judge:MODEL; implicit:RUN; checker; arithmetic; gain)."""
    max_rows: int = 32
    """Solutions scored at once, at least 1; it belongs to what decides the result: batch shapes decide rounding."""


@dataclass(frozen=True, kw_only=True)
class EvaluatePRMConfig(_ScorerJobConfig, ParityConfig):
    """One evaluation of a step scorer on sets of step-labelled solutions."""

    sets: tuple[str, ...] = ("gsm8k", "math")
    """Step-labelled sets: ProcessBench's subsets (gsm8k, math, olympiadbench, omnimath) or data settings
    (prmbench:path=..., prm800k:path=...); the first two are those that most papers report."""
    processbench: str | None = None
    """Folder of ProcessBench's files; the default is its hub data set."""
    threshold: float = 0.5
    """A step with a lower score is predicted incorrect; in (0, 1), and 0.5 is where a trained classifier decides."""
    tune_on: str | None = None
    """Set on which a second threshold is tuned for F1, named as in sets; the default is the first of ProcessBench's
    subsets, and no tuning without one."""
    limit: int | None = None
    """Solutions per set, of PRMBench per class, at least 1, drawn at random (always the same ones); the default takes
    all."""
    seed: int = 0
    """Seed of the intervals' resampling, at least 0."""
    figures: bool = True
    """Draw a reliability diagram and a histogram of the lowest score for every set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_threshold(self.threshold)
        if not self.sets:
            raise ConfigError(f"sets is empty: name one of {', '.join(SUBSETS)}, or data settings")
        if self.processbench is not None and not {*self.sets, self.tune_on} & {*SUBSETS}:
            raise ConfigError(
                f"processbench={self.processbench} is the folder of ProcessBench's files, and none of its subsets is "
                f"among the sets ({', '.join(self.sets)}): name one ({', '.join(SUBSETS)}), or drop it"
            )
        if self.reference is not None and (lacking := [name for name in SUBSETS if name not in self.sets]):
            raise ConfigError(
                f"reference is the mean F1 of ProcessBench's four subsets, and sets lacks {', '.join(lacking)}: name "
                "all four, or drop it"
            )
        check_bounds("", self, limit="[1, inf)", max_rows="[1, inf)", seed="[0, inf)")

    @property
    def benchmark(self) -> str:
        """``processbench``, or ``step_labels`` for sets of one's own."""
        return "processbench" if self.sets[0] in SUBSETS else "step_labels"

    def data(self) -> tuple[dict[str, DataConfig], str | None]:
        """Name -> data of every set that is scored, and the name of the one the threshold is tuned on."""
        tune_on = self.tune_on or next((name for name in self.sets if name in SUBSETS), None)
        names = dict.fromkeys((*self.sets, *([] if tune_on is None else [tune_on])))
        sets = {name: self._set(name) for name in names}
        if self.limit is not None:
            if own := [name for name, each in sets.items() if each.limit is not None]:
                raise ConfigError(f"limit={self.limit} is of every set, and {own[0]} has a limit of its own: drop one")
            # Drawn, not the first ones: ProcessBench's files begin with the solutions that have an error. PRMBench's
            # classes are limited when its rows are read.
            limits = {name: None if each.source == "prmbench" else self.limit for name, each in sets.items()}
            sets = {name: replace(each, limit=limits[name], shuffle_seed=0) for name, each in sets.items()}
        return sets, tune_on

    def _set(self, name: str) -> DataConfig:
        if name in SUBSETS:
            folder = None if self.processbench is None else str(Path(self.processbench).expanduser())
            return DataConfig(source="processbench", path=folder, split=name)
        if ":" not in name and "=" not in name and not Path(name).expanduser().exists():
            raise ConfigError(
                f"no set {name!r}.{nearest(name, SUBSETS)} ProcessBench has {', '.join(SUBSETS)}; a set of your own is "
                "a file or data settings (prm800k:path=...)"
            )
        return parse_spec(name)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(_ScorerJobConfig):
    """One set of solutions whose steps are scored."""

    completions: str
    """File or data settings of the solutions: completions, or rows with step texts."""
    reduction: Reduction | None = None
    """How step scores become one per solution; the default is product for scores of correctness, else last."""
    fit_temperature: str | None = None
    """File or data settings of held-out labelled rows on which a temperature is fitted and applied."""
    segmenter: str | None = None
    """Cuts solutions that come as one text (newline, blank_line, ...); the default is newline. Steps that a row has, or
    a segmenter that it names, stay as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("", self, max_rows="[1, inf)")
        if self.segmenter is not None:
            check_choice("segmenter", self.segmenter, SEGMENTERS)
        if self.fit_temperature is not None and getattr(self.scorer, "temperature", None) is not None:
            raise ConfigError("a fitted temperature and rows to fit one on contradict each other: give one of them")
