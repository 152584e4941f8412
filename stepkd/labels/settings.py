"""The settings of the jobs of ``stepkd label``: what all have in common, and those of a labelling job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from stepkd.data.benchmarks import BENCHMARKS, Benchmark, get_benchmark
from stepkd.errors import ConfigError, check_bounds, check_choice
from stepkd.labels.labellers import check_reduction
from stepkd.rollout import SamplingSpec
from stepkd.steps import get_segmenter
from stepkd.steps.labels import check_threshold
from stepkd.steps.threshold import SIGNAL_SEGMENTERS
from stepkd.tasks import Given

LABELLERS = ("monte_carlo", "checker", "arithmetic", "outcome", "judge", "prm")
"""Labellers by name: continuations of every step prefix, the tiny world's exact checker, the sums that a step writes
out (steps without one have no label), whether the final answer is right, a prompted language model, a trained process
reward model."""

SCORER_LABELLERS = ("judge", "prm")
"""Labellers that ask a second model."""

FITTED = ("adaptive_step", "entropy")
"""Segmenters whose threshold the job fits on its own pool when none is given."""


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What every job of ``stepkd label`` has settings for: the policy, how it samples, how answers are graded."""

    out: str
    """Folder for shards, rows, summary and manifest."""
    model: str | None = None
    """Policy that samples, continues and tokenises; None: the one the rollout rows name."""
    limit: int | None = None
    """Only the first rows, >= 1; None: all."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus, in (0, 1]; 1 is off."""
    top_k: int = 0
    """Only the k most likely tokens; 0 is off."""
    max_new_tokens: int | None = None
    """Longest solution, and longest continuation, in tokens; None: what the data's benchmark has."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion."""
    template: str | None = None
    """Prompt template, a name or a YAML file; None: the one that the model was trained with, else what the data's
    benchmark has."""
    extractors: tuple[str, ...] | None = None
    """How answers are found; None: what the data's benchmark has."""
    deadline_s: float = 2.0
    """Hard limit per graded answer (s)."""
    dtype: str | None = None
    """Weights' dtype; None: as stored."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:1``; ``auto`` takes a GPU when there is one."""
    max_rows: int = 64
    """Completions decoded at once, >= 1; also the size of a unit of work, which a kill can lose."""
    seed: int = 0
    """Keys everything that is drawn."""

    def __post_init__(self) -> None:
        self._check_counts("max_rows", "limit")

    def _check_counts(self, *names: str) -> None:
        check_bounds("", self, **dict.fromkeys(names, "[1, inf)"))

    def drawing(self, n: int, max_new_tokens: int, *, temperature: float | None = None) -> SamplingSpec:
        """How ``n`` completions of a prompt or prefix are drawn; ``temperature`` in place of the job's."""
        return SamplingSpec(
            n=n,
            temperature=self.temperature if temperature is None else temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=max_new_tokens,
            stop=self.stop,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class LabelSpec(JobSpec):
    """One labelling job: what is labelled, by whom, and where it is written."""

    problems: str | None = None
    """Problems to sample solutions of: file, folder or data settings in one word. This or ``rollouts``."""
    rollouts: str | None = None
    """Solutions that are there already: rollout rows, step-labelled rows or worked solutions (a file, the folder of an
    earlier job, or data settings in one word)."""

    labeller: str = "monte_carlo"
    """One of :data:`LABELLERS`."""
    rollouts_per_step: int = 8
    """Monte-Carlo: continuations of every step prefix, >= 1."""
    reduce: str = "any"
    """Monte-Carlo: ``any``, ``mean`` or ``first_error``."""
    early_stop: bool = False
    """Monte-Carlo: stop at the first success of a step."""
    propagate_positive: bool = False
    """Monte-Carlo: steps before a right one are right too."""
    label_temperature: float | None = None
    """Monte-Carlo: temperature of the continuations; None: that of the solutions."""
    given: Given = "truth"
    """Checker: right iff true (``truth``), or iff it follows from what the steps before claim (``claims``)."""
    outcome_scope: Literal["last", "all"] = "last"
    """Outcome: label the last step only, or every step."""
    judge: str | None = None
    """Judge and PRM: the model that scores, as :func:`stepkd.scorers.load.load_scorer` reads it."""
    judge_template: str | None = None
    """PRM: prompt template of the scoring model, a name or a YAML file; None: its own."""
    reference: bool = False
    """Judge: show the row's gold solution (else its answer) to the model."""
    threshold: float = 0.5
    """Judge and PRM: a step is right when its score is not below it, in (0, 1)."""
    soft: bool = False
    """Judge and PRM: keep the scores as soft labels."""

    samples: int = 4
    """Solutions per problem, >= 1."""
    dedupe: bool = True
    """Label only one of several sampled solutions of a problem with the same text."""

    segmenter: str | None = None
    """How solutions are cut; ``adaptive_step`` and ``entropy`` without a threshold fit one on this job's solutions.
    None: the steps a row comes with, else ``newline``."""
    quantile: float = 0.02
    """Share of tokens that a fitted threshold is to divide, in (0, 1)."""
    teacher: str | None = None
    """Second model with the same vocabulary, for the ``reject`` segmenter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("labeller", self.labeller, LABELLERS)
        check_reduction(self.reduce, propagate_positive=self.propagate_positive)
        check_choice("given", self.given, get_args(Given))
        check_choice("outcome_scope", self.outcome_scope, ("last", "all"))
        if (self.problems is None) == (self.rollouts is None):
            raise ConfigError("give either --problems (to sample solutions of) or --rollouts (solutions to label)")
        if self.labeller in SCORER_LABELLERS and self.judge is None:
            raise ConfigError(f"--labeller {self.labeller} needs the model that scores the steps: --judge MODEL")
        if self.labeller not in SCORER_LABELLERS and (self.judge is not None or self.judge_template is not None):
            raise ConfigError(f"--judge goes with --labeller judge or prm, not with {self.labeller}")
        if self.judge_template is not None and self.labeller != "prm":
            raise ConfigError("--judge-template goes with --labeller prm: a prompted judge asks in its own words")
        if self.labeller == "arithmetic" and (self.soft or self.threshold != 0.5):
            raise ConfigError("--soft and --threshold go with a model's scores: a sum is right or wrong")
        if self.reference and self.labeller != "judge":
            raise ConfigError(f"--reference goes with --labeller judge, not with {self.labeller}")
        if self.problems is not None and self.model is None:
            raise ConfigError("sampling solutions of --problems needs --model")
        self._check_counts("samples", "rollouts_per_step")
        if self.samples > 1 and self.temperature == 0 and self.problems is not None:
            raise ConfigError(f"{self.samples} samples at temperature 0 would all be the same: set --temperature")
        if self.labeller == "monte_carlo" and self.rollouts_per_step > 1 and self.continuation_temperature == 0:
            raise ConfigError(
                f"{self.rollouts_per_step} continuations at temperature 0 would all be the same: set "
                "--label-temperature, or --rollouts-per-step 1"
            )
        check_threshold(self.threshold)
        check_bounds("", self, quantile="(0, 1)")
        if (self.segmenter_kind == "reject") != (self.teacher is not None):
            raise ConfigError("segmenter 'reject' and --teacher go together: give both or neither")
        if self.segmenter is not None and not self.fits_threshold:
            get_segmenter(self.segmenter)  # a wrong name is said before anything is loaded

    @property
    def continuation_temperature(self) -> float:
        """Temperature of Monte-Carlo continuations."""
        return self.temperature if self.label_temperature is None else self.label_temperature

    @property
    def segmenter_kind(self) -> str | None:
        """Name of the segmenter without its argument."""
        return None if self.segmenter is None else self.segmenter.partition(":")[0]

    @property
    def fits_threshold(self) -> bool:
        """Whether the job fits the segmenter's threshold on its own solutions."""
        return self.segmenter is not None and (
            self.segmenter in FITTED or self.segmenter in {f"{name}:auto" for name in FITTED}
        )

    @property
    def signals(self) -> frozenset[str]:
        """Per-token signals the segmenter reads, as named in :class:`~stepkd.steps.TokenizedText`."""
        if self.segmenter_kind not in SIGNAL_SEGMENTERS:
            return frozenset()
        return {
            "adaptive_step": frozenset({"logprobs"}),
            "entropy": frozenset({"entropies"}),
            "reject": frozenset({"logprobs", "teacher_logprobs"}),
        }[str(self.segmenter_kind)]

    def sampling(self, max_new_tokens: int) -> SamplingSpec:
        """How solutions are drawn."""
        return self.drawing(self.samples, max_new_tokens)

    def continuation(self, max_new_tokens: int) -> SamplingSpec:
        """How Monte-Carlo continuations are drawn."""
        return self.drawing(self.rollouts_per_step, max_new_tokens, temperature=self.continuation_temperature)


def asking(source: str, *, is_task: bool) -> Benchmark:
    """The benchmark whose template, extractors and length suit a data source.

    Args:
        source: name of the data source.
        is_task: whether the rows are of the tiny world, wherever they were read from.
    """
    if is_task:
        return get_benchmark("task")
    return next((each for each in BENCHMARKS.values() if each.source == source), get_benchmark("rows"))
