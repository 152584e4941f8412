"""The settings of the jobs of ``stepkd label``: what all have in common, labelling, and the builders of pairs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from stepkd.data.benchmarks import BENCHMARKS, Benchmark, get_benchmark
from stepkd.errors import ConfigError, check_bounds, check_choice
from stepkd.labels.labellers import check_reduction
from stepkd.sampling.sampler import SamplingConfig
from stepkd.scorers.scorer import Reduction
from stepkd.search.mcts import SearchConfig
from stepkd.search.pairs import PairConfig
from stepkd.steps.labels import Neutral, check_threshold
from stepkd.steps.segment import get_segmenter
from stepkd.tasks.base import Given

LABELLERS = ("monte_carlo", "checker", "arithmetic", "outcome", "judge", "prm")
"""Labellers by name: continuations of every step prefix, the tiny world's exact checker, the sums that a step writes
out (steps without one have no label), whether the final answer is right, a prompted language model, a trained process
reward model."""

SCORER_LABELLERS = ("judge", "prm")
"""Labellers that ask a second model."""

FITTED = ("adaptive_step", "entropy")
"""Segmenters whose threshold the job fits on its own pool when none is given."""

_SIGNALS = {
    "adaptive_step": frozenset({"logprobs"}),
    "entropy": frozenset({"entropies"}),
    "reject": frozenset({"logprobs", "teacher_logprobs"}),
}

Take = Literal["wrong", "all"]
ValueKind = Literal["rollout", "scorer", "self_evaluation"]


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What every job of ``stepkd label`` has settings for: the policy, how it samples, how answers are graded."""

    out: str
    """Folder for the job's settings, parts, rows and summary."""
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
        check_bounds("", self, max_rows="[1, inf)", limit="[1, inf)")

    def drawing(self, n: int, max_new_tokens: int, *, temperature: float | None = None) -> SamplingConfig:
        """How ``n`` completions of a prompt or prefix are drawn; ``temperature`` in place of the job's."""
        return SamplingConfig(
            n=n,
            temperature=self.temperature if temperature is None else temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=max_new_tokens,
            stop=self.stop,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class LabelConfig(JobConfig):
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
        check_bounds("", self, samples="[1, inf)", rollouts_per_step="[1, inf)", quantile="(0, 1)")
        if self.samples > 1 and self.temperature == 0 and self.problems is not None:
            raise ConfigError(f"{self.samples} samples at temperature 0 would all be the same: set --temperature")
        if self.labeller == "monte_carlo" and self.rollouts_per_step > 1 and self.continuation_temperature == 0:
            raise ConfigError(
                f"{self.rollouts_per_step} continuations at temperature 0 would all be the same: set "
                "--label-temperature, or --rollouts-per-step 1"
            )
        check_threshold(self.threshold)
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
        return self.segmenter is not None and self.segmenter.removesuffix(":auto") in FITTED

    @property
    def signals(self) -> frozenset[str]:
        """Per-token signals the segmenter reads, as named in :class:`~stepkd.steps.TokenizedText`."""
        return _SIGNALS.get(self.segmenter_kind or "", frozenset())


@dataclass(frozen=True, kw_only=True)
class StepPairConfig(JobConfig):
    """One Step-DPO pair job. The sampling defaults are those of the paper (arXiv 2406.18629)."""

    rollouts: str
    """Labelled rollout rows: a file, the folder of a labelling job, or data settings in one word."""
    take: Take = "wrong"
    """``wrong``: solutions with a wrong answer; ``all``: also those with a right answer and a wrong step."""
    continuations: int = 20
    """Continuations of every correct prefix, >= 1."""
    temperature: float = 0.8
    """Temperature of the continuations; 0 is greedy, and then there is one."""
    top_p: float = 0.95
    """Nucleus of the continuations, in (0, 1]; 1 is off."""
    max_pairs: int = 1
    """Most pairs per solution, >= 1; they share the wrong step."""
    neutral: Neutral = "right"
    """What a step rated 0 is. The paper's script has ``wrong``; with ``mask`` a solution is dropped whose first wrong
    step comes behind one."""
    check_step: bool = False
    """Whether the better step must itself be right: by ``judge``, else by the tiny world's exact checker."""
    judge: str | None = None
    """Scorer of the better step, as :func:`stepkd.scorers.load.load_scorer` reads it."""
    reference: bool = False
    """Show the row's gold solution (else its answer) to the judge."""
    threshold: float = 0.5
    """A soft step label, and a step that is checked, is right from this chance or score on; in (0, 1)."""
    segmenter: str | None = None
    """What cuts continuations into steps; None: what cut the row (its ``labelling``), else ``newline``."""

    def __post_init__(self) -> None:
        check_choice("--from", self.take, get_args(Take))  # before the others' checks: it has another name there
        super().__post_init__()
        check_bounds("", self, continuations="[1, inf)", max_pairs="[1, inf)")
        check_threshold(self.threshold)
        if self.temperature == 0 and self.continuations > 1:
            raise ConfigError(
                f"{self.continuations} continuations at temperature 0 would all be the same: set --temperature, or "
                "--continuations 1"
            )
        if self.judge is not None and not self.check_step:
            raise ConfigError("--judge goes with --check-step: it checks the better step of every pair")
        if self.reference and self.judge is None:
            raise ConfigError("--reference goes with --judge, the model that checks steps")
        if self.segmenter is not None:
            if self.segmenter.partition(":")[0] == "reject":
                raise ConfigError("segmenter 'reject' needs a teacher's signals, which continuations do not have")
            get_segmenter(self.segmenter)


@dataclass(frozen=True, kw_only=True)
class TreePairConfig(JobConfig):
    """One job of tree-search pairs, after arXiv 2405.00451; :mod:`stepkd.search.mcts` says what differs. The paper's
    value is ``self_evaluation``, not the default."""

    problems: str
    """Problems with answers: file, folder or data settings in one word."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """How trees are searched."""
    pairs: PairConfig = field(default_factory=PairConfig)
    """Which pairs a tree gives."""
    value: ValueKind = "rollout"
    """What estimates a state: the share of right answers among simulated continuations (``rollout``); what a step
    scorer says of it (``scorer``); what the policy itself, or ``judge``, answers when asked whether each step is right,
    with the reference before it (``self_evaluation``)."""
    rollouts_per_step: int = 8
    """``rollout``: continuations per state, >= 1."""
    judge: str | None = None
    """``scorer``: what scores, as :func:`stepkd.scorers.load.load_scorer` reads it. ``self_evaluation``: the model that
    is asked; None: the policy itself."""
    judge_template: str | None = None
    """``scorer``: prompt template of the scoring model, a name or a YAML file; None: its own."""
    reduction: Reduction | None = None
    """``scorer`` and ``self_evaluation``: from the scores of all steps to one; None: ``product`` where they say whether
    a step is right, ``last`` (the newest step's) where they estimate the future."""
    segmenter: str = "newline"
    """What a step is."""
    max_step_tokens: int = 128
    """Longest step in tokens, >= 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("", self, rollouts_per_step="[1, inf)", max_step_tokens="[1, inf)")
        if self.temperature == 0:
            raise ConfigError("a tree needs different steps from one state: set --temperature above 0")
        if self.model is None:
            raise ConfigError("searching trees for --problems needs --model")
        if self.value == "scorer" and self.judge is None:
            raise ConfigError("--value scorer needs the model that scores the steps: --judge MODEL (or checker)")
        if self.value == "rollout" and self.judge is not None:
            raise ConfigError("--judge goes with --value scorer or self_evaluation, not with rollout")
        if self.reduction is not None and self.value == "rollout":
            raise ConfigError("--reduction goes with --value scorer or self_evaluation, not with rollout")
        if self.judge_template is not None and self.value != "scorer":
            raise ConfigError(f"--judge-template goes with --value scorer, not with {self.value}")
        get_segmenter(self.segmenter)  # a wrong name is said before anything is loaded

    def settings(self) -> dict[str, Any]:
        """What decides the pairs beside model, data and sampling, as JSON values."""
        return {"search": asdict(self.search), **asdict(self.pairs)}


PAIR_JOBS: dict[str, type[JobConfig]] = {"step_preference": StepPairConfig, "tree_preference": TreePairConfig}
"""Jobs that make preference pairs and sample for it: what ``--to`` calls them, and their settings."""


def asking(source: str, *, is_task: bool) -> Benchmark:
    """The benchmark whose template, extractors and length suit a data source.

    Args:
        source: name of the data source.
        is_task: whether the rows are of the tiny world, wherever they were read from.
    """
    if is_task:
        return get_benchmark("task")
    return next((each for each in BENCHMARKS.values() if each.source == source), get_benchmark("rows"))
