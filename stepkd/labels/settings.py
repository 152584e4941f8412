"""The settings of ``stepkd label`` and ``stepkd pairs``: what is labelled, how it is cut, and by whom.

Whatever brings settings of its own is a class with only these: :class:`SolutionsConfig`, :class:`StepsConfig`,
:class:`LabellerConfig` and :class:`ValueConfig`, each with its members.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

from stepkd.errors import ConfigError, check_bounds
from stepkd.grading.pool import GradingConfig
from stepkd.labels.labellers import LabellerConfig
from stepkd.labels.monte_carlo import MonteCarlo
from stepkd.models.spec import DType
from stepkd.runs.job import JobConfig
from stepkd.sampling.config import IN_PROCESS, EngineConfig
from stepkd.sampling.engine import SamplingConfig
from stepkd.scorers.load import load_scorer
from stepkd.scorers.scorer import Reduction, ScorerConfig, StepScorer
from stepkd.search.mcts import PairTreeConfig
from stepkd.search.tree import PairConfig
from stepkd.steps.confidence import SIGNALS
from stepkd.steps.labels import Neutral, check_threshold
from stepkd.steps.segment import get_segmenter, segmenter_settings


@dataclass(frozen=True, kw_only=True)
class PromptedConfig:
    """What everything that samples for labels or pairs has settings for: the prompt, the answers, the models."""

    template: str | None = None
    """Prompt template, a name (gsm8k, math, plain, task) or a YAML file; null takes the one that the model was trained
    with, else the one of the data's benchmark."""
    grading: GradingConfig = field(default_factory=GradingConfig)
    """How final answers are found and compared."""
    dtype: DType | Literal["auto"] | None = None
    """Weights' dtype of the policy, and of a teacher; null leaves them as stored, and auto takes what the policy
    samples faster in here (bfloat16 or float32), measured once for the whole job."""
    engine: EngineConfig = IN_PROCESS
    """Where the policy is sampled: Transformers (in this process), VLLMServer or VLLM."""


@dataclass(frozen=True, kw_only=True)
class LabelJobConfig(PromptedConfig, JobConfig):
    """A job that samples for labels or pairs."""


# ---- what is labelled ----------------------------------------------------------------------------------------------


class SolutionsConfig(ABC):
    """Where the solutions come from that are labelled."""

    model: str | None
    """The policy."""

    @property
    @abstractmethod
    def source(self) -> str:
        """The rows that it starts from: a file, a folder, or data settings in one word."""


@dataclass(frozen=True, kw_only=True)
class Sampled(SolutionsConfig):
    """Solutions of problems, sampled from the policy."""

    problems: str
    """Problems with answers: a file, a folder, or data settings in one word (gsm8k:split=train,limit=100)."""
    model: str
    """Policy that samples, continues and tokenises: a run, a checkpoint, a model folder, a hub id or a tiny preset."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(n=4))
    """How solutions are drawn, 4 of every problem by default."""
    dedupe: bool = True
    """Whether only one of several solutions of a problem with the same text is labelled."""

    def __post_init__(self) -> None:
        self.sampling.check_noise("solutions of a problem")

    @property
    def source(self) -> str:
        """The problems."""
        return self.problems


@dataclass(frozen=True, kw_only=True)
class Existing(SolutionsConfig):
    """Solutions that are there already."""

    completions: str
    """Completion rows, step-labelled rows or worked solutions: a file, the folder of an earlier labelling job, or data
    settings in one word."""
    model: str | None = None
    """Policy whose tokenizer reads the solutions, and that continues them where the labeller does; null takes the one
    that the rows name."""

    @property
    def source(self) -> str:
        """The solutions."""
        return self.completions


# ---- how it is cut -------------------------------------------------------------------------------------------------


class StepsConfig(ABC):
    """How solutions are cut into steps."""

    segmenter: str = "newline"
    """Segmenter by name, with its argument behind a colon."""
    teacher: str | None = None
    """Second model, for signals under a teacher."""

    @property
    def kind(self) -> str:
        """Name of the segmenter without its argument."""
        return self.segmenter.partition(":")[0]

    @property
    def signals(self) -> tuple[str, ...]:
        """Per-token signals that it reads, as named in :class:`~stepkd.steps.text.TokenizedText`."""
        return SIGNALS.get(self.kind, ())

    @abstractmethod
    def settings(self) -> dict[str, Any] | None:
        """What decides where a solution is cut, as JSON values: a threshold file counts by what it says."""
        return {"name": self.kind, **segmenter_settings(get_segmenter(self.segmenter))}


@dataclass(frozen=True)
class OwnSteps(StepsConfig):
    """The steps that a row comes with; a line is a step where it comes with none."""

    def settings(self) -> None:
        """None: the rows decide."""


@dataclass(frozen=True, kw_only=True)
class Cut(StepsConfig):
    """Steps by the rule of a segmenter."""

    segmenter: str = "newline"
    """Segmenter by name: newline (the default), blank_line, step_heading, sentence, whole, regex:PATTERN,
    regex_before:PATTERN, or adaptive_step:THRESHOLD and entropy:THRESHOLD with a number or the threshold.json of an
    earlier job."""

    def __post_init__(self) -> None:
        get_segmenter(self.segmenter)  # a wrong name is said before anything is loaded
        if self.kind == "reject":
            raise ConfigError("segmenter 'reject' needs a teacher's signals: choose Reject, with the teacher")

    def settings(self) -> dict[str, Any] | None:
        """Its name and what its argument says."""
        return super().settings()


@dataclass(frozen=True, kw_only=True)
class Fitted(StepsConfig):
    """Steps that end where the policy is unsure, at a threshold that the job fits on its own solutions."""

    segmenter: Literal["adaptive_step", "entropy"] = "adaptive_step"
    """What is compared with the threshold: the probability of the sampled token (adaptive_step, the paper's), or the
    entropy of its distribution."""
    quantile: float = 0.02
    """Share of all tokens that the threshold is to divide, in (0, 1); the paper has 2%."""

    def __post_init__(self) -> None:
        check_bounds("", self, quantile="(0, 1)")

    def settings(self) -> dict[str, Any]:
        """The threshold is not known yet."""
        return {"name": self.segmenter, "threshold": "fitted", "quantile": self.quantile}


@dataclass(frozen=True, kw_only=True)
class Reject(StepsConfig):
    """Steps that end where a teacher would not have accepted the policy's token."""

    teacher: str
    """Second model with the policy's vocabulary, loaded as the policy is."""
    probability: float = 0.5
    """Probability that the teacher has rejected a token of the step so far, above which the step ends, in (0, 1)."""

    def __post_init__(self) -> None:
        get_segmenter(self.segmenter)

    @property
    def segmenter(self) -> str:  # type: ignore[override]
        """The segmenter by name."""
        return f"reject:{self.probability}"

    def settings(self) -> dict[str, Any] | None:
        """Its probability; the teacher's weights are a setting of the job."""
        return super().settings()


@dataclass(frozen=True, kw_only=True)
class LabellingConfig(PromptedConfig):
    """How solutions are cut and labelled, wherever they come from."""

    steps: StepsConfig = field(default_factory=OwnSteps)
    """How they are cut into steps: OwnSteps of the rows (else lines), Cut by a segmenter's rule, at a Fitted threshold,
    or where a teacher would Reject a token."""
    labeller: LabellerConfig = field(default_factory=MonteCarlo)
    """Who labels the steps: MonteCarlo continuations, the tiny world's TaskChecker, the Sums that steps write out, the
    Outcome, or what is Scored by a judge or reward model."""


@dataclass(frozen=True, kw_only=True)
class LabelConfig(LabellingConfig, LabelJobConfig):
    """One labelling job: what is labelled, by whom, and where it is written."""

    solutions: SolutionsConfig
    """Solutions to label: Sampled from problems, or Existing ones."""


# ---- pairs ---------------------------------------------------------------------------------------------------------


class PairJobConfig(LabelJobConfig):
    """One job that makes step preference pairs and samples for it."""

    model: str | None
    """The policy."""


@dataclass(frozen=True, kw_only=True)
class StepPairing:
    """The first incorrect step against the first step of a continuation that ends correctly (Step-DPO, arXiv
    2406.18629, whose sampling settings are the defaults)."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(n=20, temperature=0.8, top_p=0.95))
    """How every correct prefix is continued, 20 times by default."""
    take: Literal["incorrect", "all"] = "incorrect"
    """Which solutions give pairs: those with an incorrect answer, or all, also those with a correct answer and an
    incorrect step."""
    max_pairs: int = 1
    """Most pairs of a solution, at least 1; they share the incorrect step."""
    neutral: Neutral = "correct"
    """What a step rated 0 is: correct, incorrect (as in the paper's script), or mask, which drops a solution whose
    first incorrect step comes behind one."""
    threshold: float = 0.5
    """Chance or score from which on a soft step label, and a checked step, is correct, in (0, 1)."""
    check: ScorerConfig | str | None = None
    """Scorer that says whether the better step is correct itself: ``checker`` in the tiny world, else a class of
    settings such as Judge, or a word such as judge:MODEL; null takes every step whose continuation ends correctly."""

    def __post_init__(self) -> None:
        check_bounds("", self, max_pairs="[1, inf)")
        check_threshold(self.threshold)
        self.sampling.check_noise("continuations of a prefix")


@dataclass(frozen=True, kw_only=True)
class StepPairConfig(StepPairing, PairJobConfig):
    """The first incorrect step of labelled solutions against the first step of a continuation that ends correctly
    (Step-DPO, arXiv 2406.18629, whose sampling settings are the defaults)."""

    completions: str
    """Labelled completion rows: a file, the folder of a labelling job, or data settings in one word."""
    model: str | None = None
    """Policy that continues the correct prefixes; null takes the one that the rows name."""

    def __post_init__(self) -> None:
        PairJobConfig.__post_init__(self)
        StepPairing.__post_init__(self)


class ValueConfig(ABC):
    """What estimates a state of a search tree."""

    @abstractmethod
    def build(self, bench: Any, generator: Any, scorer: StepScorer | None) -> Any:
        """The estimate of states.

        Args:
            bench: what the job works with.
            generator: proposes its steps.
            scorer: a loaded one in place of the named one.
        """


@dataclass(frozen=True, kw_only=True)
class ContinuationShare(ValueConfig):
    """The share of correct answers among simulated continuations."""

    continuations: int = 8
    """Continuations of every state, at least 1; as many as Monte-Carlo labels have."""

    def __post_init__(self) -> None:
        check_bounds("", self, continuations="[1, inf)")

    def build(self, bench: Any, generator: Any, scorer: StepScorer | None) -> Any:
        """A :class:`~stepkd.search.generate.ContinuationValue`."""
        from stepkd.search.generate import ContinuationValue

        return ContinuationValue(generator, bench.grader, continuations=self.continuations)


@dataclass(frozen=True, kw_only=True)
class StepScore(ValueConfig):
    """What a step scorer says of the steps so far."""

    scorer: ScorerConfig | str
    """What scores them, a class of settings such as PRM or Judge, or a word such as judge:MODEL."""
    reduction: Reduction | None = None
    """From the scores of all steps to one; null takes the product where they say whether a step is correct, and the
    last one where they estimate the future."""

    def build(self, bench: Any, generator: Any, scorer: StepScorer | None) -> Any:
        """A :class:`~stepkd.search.generate.ScorerValue`."""
        from stepkd.search.generate import ScorerValue

        loaded = scorer or load_scorer(self.scorer, device=bench.config.device, max_rows=bench.config.engine.at_once)
        return ScorerValue(loaded, reduction=self.reduction, name="scorer")


@dataclass(frozen=True, kw_only=True)
class SelfEvaluation(ValueConfig):
    """What the policy answers when it is asked whether the steps are correct, with the reference before it: the paper's
    value (of another model: StepScore, with a Judge and its reference)."""

    whole: bool = False
    """Ask one question about the whole partial solution and take the probability of a yes among all tokens, as the
    released code does; false asks about each step, yes against no, and reduces the answers."""
    reduction: Reduction | None = None
    """From the answers about all steps to one; null takes their product. Not with whole."""

    def __post_init__(self) -> None:
        if self.whole and self.reduction is not None:
            raise ConfigError(
                f"value.reduction={self.reduction}: value.whole asks one question, whose answer needs none; drop it"
            )

    def build(self, bench: Any, generator: Any, scorer: StepScorer | None) -> Any:
        """A :class:`~stepkd.search.generate.ScorerValue`."""
        from stepkd.scorers.judge import PromptedJudge
        from stepkd.search.generate import ScorerValue

        how = {"engine": generator.engine, "max_rows": bench.config.engine.at_once, "name": bench.model}
        scorer = scorer or PromptedJudge(bench.policy, reference=True, whole=self.whole, **how)
        return ScorerValue(scorer, reduction="last" if self.whole else self.reduction, name="self_evaluation")


@dataclass(frozen=True, kw_only=True)
class TreePairing:
    """Siblings of a search tree, at every depth of its chosen path (MCTS-DPO, arXiv 2405.00451, whose value is
    SelfEvaluation; :mod:`stepkd.search.mcts` says what else differs)."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How steps are sampled, above temperature 0; the search says how many."""
    search: PairTreeConfig = field(default_factory=PairTreeConfig)
    """How trees are searched."""
    pairs: PairConfig = field(default_factory=PairConfig)
    """Which pairs a tree gives."""
    value: ValueConfig = field(default_factory=ContinuationShare)
    """What estimates a state: the ContinuationShare of correct answers, a StepScore, or SelfEvaluation."""
    segmenter: str = "newline"
    """What a step is."""
    max_step_tokens: int = 128
    """Longest step in tokens, at least 1."""

    def __post_init__(self) -> None:
        check_bounds("", self, max_step_tokens="[1, inf)")
        if self.sampling.temperature == 0:
            raise ConfigError("a tree needs different steps from one state: set a temperature above 0")
        get_segmenter(self.segmenter)  # a wrong name is said before anything is loaded


@dataclass(frozen=True, kw_only=True)
class TreePairConfig(TreePairing, PairJobConfig):
    """Siblings of a search tree of a problem, at every depth of its chosen path (MCTS-DPO, arXiv 2405.00451, whose
    value is SelfEvaluation; :mod:`stepkd.search.mcts` says what else differs)."""

    problems: str
    """Problems with answers: a file, a folder, or data settings in one word (gsm8k:split=train,limit=100)."""
    model: str
    """Policy that proposes the steps: a run, a checkpoint, a model folder, a hub id or a tiny preset."""

    def __post_init__(self) -> None:
        PairJobConfig.__post_init__(self)
        TreePairing.__post_init__(self)


PAIR_JOBS: dict[str, type[PairJobConfig]] = {"step": StepPairConfig, "tree": TreePairConfig}
"""Jobs of ``stepkd pairs`` by name."""
