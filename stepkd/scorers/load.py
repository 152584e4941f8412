"""Step scorers as settings: a class for each kind, with only its own settings, or one word that stands for it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stepkd.data.config import check_training_use, parse_spec
from stepkd.data.templates import TEMPLATES, PromptTemplate
from stepkd.errors import ConfigError, check_bounds, nearest
from stepkd.models.spec import DType, StepHeadConfig
from stepkd.sampling.config import EngineConfig, VLLMServer
from stepkd.sampling.engine import Engine, SamplingConfig
from stepkd.scorers.critiques import get_form
from stepkd.scorers.rules import Arithmetic, Checker, Gain
from stepkd.scorers.scorer import Meaning, ScorerConfig, StepScorer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Reader(ScorerConfig):
    """A scorer that reads with a language model."""

    path: str
    """Model that scores: run folder, checkpoint, model folder, export or hub id."""
    template: str | PromptTemplate | None = None
    """Prompt template: a built-in name or a YAML file; the default is the model's own, that of its training."""
    dtype: DType | None = None
    """Numeric type of the weights; the default keeps the one they are stored in."""
    attention: str | None = None
    """Attention implementation (sdpa, eager, flash_attention_2); the default lets transformers choose."""
    max_length: int | None = None
    """Longest prompt and solution in tokens, at least 2, beyond which steps have no score; the default is the model's
    context."""
    temperature: float | None = None
    """Temperature that scales the scores, in [0.01, 100], as stepkd score --fit_temperature fits one; the default
    leaves them."""
    engine: EngineConfig | None = None
    """What holds the model and reads: of a Judge or Critic Transformers, VLLMServer or VLLM, of a QwenPRM VLLMServer
    (started with --runner pooling); null reads in this process, as many rows at once as the job does."""
    engines: ClassVar[tuple[type[EngineConfig], ...]] = ()

    def __post_init__(self) -> None:
        check_bounds("scorer.", self, max_length="[2, inf)", temperature="[0.01, 100]")
        if self.engine is not None and not isinstance(self.engine, self.engines):
            name = type(self).__name__
            where = " or ".join([*(f"by {each.__name__}" for each in self.engines), "in this process"])
            raise ConfigError(
                f"scorer.engine={type(self.engine).__name__}: the model of a {name} is read {where}: "
                "drop scorer.engine. Engines read for a Judge or Critic, VLLMServer also for a QwenPRM (published, or "
                "written by stepkd export --layout qwen_prm)"
            )

    def _built(self, policy: Any) -> Engine | None:
        """The engine, where one is given."""
        return None if self.engine is None else self.engine.build(policy)

    def build(self, *, device: str = "auto", max_rows: int = 32) -> StepScorer:
        """See :meth:`ScorerConfig.build`."""
        where = pick_device(device)
        rows = max_rows if self.engine is None else self.engine.at_once
        reading = {"max_length": self.max_length, "temperature": self.temperature, "name": self.path}
        scorer = self._load({"dtype": self.dtype, "attention": self.attention}, max_rows=rows, **reading)
        if scorer.policy.device.type != "meta":  # whose weights an engine has
            scorer.policy.to(where)
        return scorer

    @abstractmethod
    def _load(self, weights: dict[str, Any], **reading: Any) -> Any:
        """The scorer, on the CPU, with weights as :func:`~stepkd.models.checkpoint.load_trained` is told; ``reading``
        are settings of :class:`~stepkd.scorers.prm.PolicyScorer`."""


@dataclass(frozen=True)
class PRM(_Reader):
    """A process reward model of stepkd: run, checkpoint or export of any layout; or a plain model with a head."""

    head: StepHeadConfig | None = None
    """How a plain model scores steps: LabelTokens or Classifier; the default is the head that it was trained with."""
    meaning: Meaning | None = None
    """What its scores are taken for: correctness, value or outcome; the default is what it was trained for. ``value``
    reads an outcome reward model, which learns at every token, at every step's end and not at the last alone."""

    def _load(self, weights: dict[str, Any], **reading: Any) -> Any:
        from stepkd.models.checkpoint import load_trained
        from stepkd.models.source import trained_template
        from stepkd.scorers.prm import PRMScorer

        if self.head is None and (family := _family(self.path)) in (QwenPRM.family, TRLPRM.family):
            scorer = _WITH_MODEL[family](self.path, self.template)._load(weights, **reading)  # an export for others
        else:
            policy = load_trained(self.path, **weights)
            if self.head is not None:
                policy.attach_step_head(self.head)
            policy.require_step_head()
            template = self.template or _known(trained_template(self.path), self.path)
            scorer = PRMScorer(policy, template=template, **reading)
        scorer.meaning = self.meaning or scorer.meaning
        return scorer


def _known(template: PromptTemplate | None, path: str) -> PromptTemplate:
    if template is None:
        raise ConfigError(
            f"{path} does not say which prompt template it was trained with: give one (template: "
            f"{', '.join(TEMPLATES)}, or a YAML file)"
        )
    return template


def _family(path: str) -> str | None:
    """The family of a published model or of an export in its layout; None: a run, or an export of layout stepkd."""
    from stepkd.models.source import find_checkpoint
    from stepkd.scorers.published import recognise

    folder = Path(path).expanduser()
    family = None if find_checkpoint(folder) is not None else recognise(path)
    named_only = family in (MathShepherdPRM.family, ASPRM.family) and (folder / "step_head.json").is_file()
    return None if named_only else family


@dataclass(frozen=True)
class _Published(_Reader):
    """A published process reward model, in the layout it was trained with."""

    family: ClassVar[str]

    def _load(self, weights: dict[str, Any], **reading: Any) -> Any:
        from stepkd.scorers.prm import PRMScorer
        from stepkd.scorers.published import ServedPRM, open_published

        own: dict[str, Any] = {"separator": self.separator} if isinstance(self, TRLPRM) else {}
        own["weights"] = self.engine is None
        policy, template, encoder = open_published(self.family, self.path, **own, **weights)
        reading |= {"template": self.template or _known(template, self.path), "encoder": encoder}
        engine = self._built(policy)
        return PRMScorer(policy, **reading) if engine is None else ServedPRM(policy, engine=engine, **reading)


@dataclass(frozen=True)
class MathShepherdPRM(_Published):
    """A published model with the layout of math-shepherd-mistral-7b-prm."""

    family = "math-shepherd"


@dataclass(frozen=True)
class ASPRM(_Published):
    """A published model with the layout of AdaptiveStep's ASPRM-L, ASPRM-M and ASPRM-D."""

    family = "asprm"


@dataclass(frozen=True)
class QwenPRM(_Published):
    """A published model with the layout of Qwen2.5-Math-PRM."""

    family = "qwen-prm"
    engines = (VLLMServer,)


@dataclass(frozen=True)
class TRLPRM(_Published):
    """A token classification model that TRL's PRMTrainer trained."""

    family = "trl"
    separator: str = "\n"
    """Step separator that it was trained with, one token; TRL's own default is a newline."""


@dataclass(frozen=True)
class Judge(_Reader):
    """Any language model, asked whether each step is correct; its template asks that, so none of the built-in ones."""

    engines = (EngineConfig,)
    answers: tuple[str, str] | None = None
    """The two tokens for yes and for no; the default takes the usual forms of Yes and No."""
    reference: bool = False
    """Show the row's gold solution, else its answer, to the model; off, it judges by itself."""
    whole: bool = False
    """Ask once, whether all steps together are on the way to the correct answer, and take the chance of yes among all
    tokens (MCTS-DPO's question); with ideas, whether the solution is correct, and take yes against no (P(True)); off,
    ask about every step, and take yes against no."""
    ideas: str | None = None
    """Sampled solutions, of which the first five of the same problem are shown before the one in question: a file, the
    folder of a labelling job, or data settings in one word; the default shows none."""
    examples: str | None = None
    """Step-labelled rows, of which those steps of other problems are shown that are nearest to the one in question: a
    file, the folder of a labelling job, or data settings in one word (prm800k:limit=2000); the default shows none."""
    shots: int = 1
    """Correct steps, and as many incorrect ones, that are shown of the examples, at least 1; questions grow with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("scorer.", self, shots="[1, inf)")
        if self.examples is not None:
            check_training_use(parse_spec(self.examples))
        if isinstance(self.template, str) and self.template in TEMPLATES:
            raise ConfigError(
                f"template {self.template!r} asks for a solution, and a judge is asked whether a step is correct: drop "
                "it, or give a YAML file"
            )

    def _load(self, weights: dict[str, Any], **reading: Any) -> Any:
        from stepkd.data.load import load_rows
        from stepkd.models.checkpoint import load_trained
        from stepkd.scorers.examples import Ideas, StepExamples
        from stepkd.scorers.judge import JUDGE_TEMPLATE, PromptedJudge

        rows = None if self.examples is None else load_rows(parse_spec(self.examples))
        holds = self.engine is None or self.engine.holds_weights
        policy = load_trained(self.path, **weights, weights=holds)
        return PromptedJudge(
            policy,
            template=JUDGE_TEMPLATE if self.template is None else self.template,
            answers=(self.answers,) if self.answers else (),
            reference=self.reference,
            whole=self.whole,
            ideas=None if self.ideas is None else Ideas(load_rows(parse_spec(self.ideas))),
            examples=None if rows is None else StepExamples(rows, shots=self.shots),
            engine=self._built(policy),
            **reading,
        )


@dataclass(frozen=True)
class Critic(_Reader):
    """Any language model, asked for a critique before each verdict: a generative verifier, with votes. Its template is
    that of its training, unless that is a built-in one that asks for a solution: then the request alone."""

    engines = (EngineConfig,)
    form: str = "step"
    """What is asked: step (a verdict per step), processbench (its official prompt: the index of the first incorrect
    step), task (the tiny world's, for a model trained on it), or a YAML file; step scores each step by itself."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0, max_new_tokens=2048))
    """How critiques are drawn: n of them vote, and need a temperature; by default one greedy critique of up to 2,048
    tokens (ProcessBench's code: 8,192; with votes n=8, temperature 1, top_p 0.9)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        get_form(self.form)
        if isinstance(self.template, str) and self.template in TEMPLATES and _solves(TEMPLATES[self.template]):
            raise ConfigError(
                f"template {self.template!r} asks for a solution, and a critic is asked for a critique: drop it, or "
                "give a YAML file"
            )
        self.sampling.check_noise("critiques")

    def _load(self, weights: dict[str, Any], **reading: Any) -> Any:
        from stepkd.models.checkpoint import load_trained
        from stepkd.models.source import trained_template
        from stepkd.scorers.critic import CRITIC_TEMPLATE, GenerativeVerifier

        holds = self.engine is None or self.engine.holds_weights
        policy = load_trained(self.path, **weights, weights=holds)
        trained = trained_template(self.path)
        template = self.template or (CRITIC_TEMPLATE if trained is None or _solves(trained) else trained)
        own: dict[str, Any] = {"form": self.form, "sampling": self.sampling, "template": template}
        return GenerativeVerifier(policy, engine=self._built(policy), **own, **reading)


def _solves(template: PromptTemplate) -> bool:
    """Whether a template is a built-in one that asks for a solution, in words of its own."""
    words = [(each.user, each.plain) for each in (template, PromptTemplate(), *TEMPLATES.values())]
    return words[0] != words[1] and words[0] in words[2:]


@dataclass(frozen=True)
class Implicit(_Reader):
    """A policy that learnt from outcomes (a run of KTO, DPO or ImplicitPRM), as an implicit process reward model."""

    reference: str | None = None
    """Frozen model whose log-probabilities are subtracted; the default is the one that the run was trained against,
    which an export does not know."""
    beta: float | None = None
    """Factor of the log-ratios, positive, which changes how sure scores are, not their order; the default is the run's
    own."""
    cumulative: bool = True
    """Score a step by the log-ratio of all that was written up to its end, an estimate of future success; off, by its
    own tokens alone, which says whether the step made success likelier."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("scorer.", self, beta="(0, inf)")

    def _load(self, weights: dict[str, Any], **reading: Any) -> Any:
        from stepkd.models.source import trained_template
        from stepkd.scorers.implicit import ImplicitPRM, load_implicit

        policy, beta = load_implicit(self.path, self.reference, self.beta, **weights)
        template = self.template or _known(trained_template(self.path), self.path)
        return ImplicitPRM(policy, template=template, beta=beta, cumulative=self.cumulative, **reading)


_ALONE: dict[str, type[ScorerConfig]] = {"checker": Checker, "arithmetic": Arithmetic, "gain": Gain}
_WITH_MODEL: dict[str, type[_Reader]] = {"prm": PRM, "judge": Judge, "critic": Critic, "implicit": Implicit}
_WITH_MODEL |= {each.family: each for each in (MathShepherdPRM, ASPRM, QwenPRM, TRLPRM)}


def scorer_of(scorer: ScorerConfig | str) -> ScorerConfig:
    """The settings that a word stands for.

    Args:
        scorer: settings, which stay as they are; or ``checker``, ``arithmetic``, ``gain``, ``judge:MODEL``,
            ``critic:MODEL``, ``prm:PATH``, ``implicit:RUN``, ``math-shepherd:PATH``, ``asprm:PATH``, ``qwen-prm:PATH``,
            ``trl:PATH``; or a path or hub id alone, whose kind is told from what is there.

    Raises:
        ConfigError: an unknown kind.
        ModelError: nothing of that name here or on the hub.
    """
    if isinstance(scorer, ScorerConfig):
        return scorer
    if scorer in _ALONE:
        return _ALONE[scorer]()
    word, colon, path = scorer.partition(":")
    if colon and "/" not in word and "." not in word and not Path(scorer).exists():
        if word not in _WITH_MODEL:
            raise ConfigError(
                f"unknown kind of scorer {word!r} in {scorer!r}.{nearest(word, [*_WITH_MODEL, *_ALONE])} Known: "
                f"{', '.join([*_WITH_MODEL, *_ALONE])} ({', '.join(_ALONE)} stand alone)"
            )
        if not path:
            raise ConfigError(f"{scorer!r} names no model: write {word}:PATH")
        return _WITH_MODEL[word](path)
    return _WITH_MODEL[_family(scorer) or "prm"](scorer)


def load_scorer(scorer: ScorerConfig | str, *, device: str = "auto", max_rows: int = 32) -> StepScorer:
    """Make a step scorer of settings or of a word; :meth:`ScorerConfig.build` and :func:`scorer_of` say more.

    Args:
        scorer: settings, such as ``PRM("runs/prm")``, or a word, such as ``checker``, ``judge:MODEL``, or a path or hub
            id alone.
        device: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` takes a GPU when there is one.
        max_rows: most rows in one forward pass, at least 1.

    Returns:
        The scorer, its model loaded.

    Raises:
        ConfigError: settings that the model cannot be used under, or an impossible device.
        ModelError: nothing loadable there, or a model without a step head.
    """
    return scorer_of(scorer).build(device=device, max_rows=max_rows)


def pick_device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        ConfigError: not a device, or one that this machine does not have.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r}: must be auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}, but no CUDA device is available: use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}, but this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device
