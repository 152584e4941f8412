"""Generalised knowledge distillation: a divergence from a teacher, on the student's own samples or given completions.

:meth:`Distillation.terms` computes the loss, with a function of :data:`DIVERGENCES`. Every optimiser step draws whose
completions it reads (:meth:`GKDModule.draw_source`): the student's, the teacher's or the data's.

Axes: B completions and N completion tokens of a micro-batch, C of one chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from stepkd import losses
from stepkd.data.batching import StepBatch
from stepkd.data.collate import Batch
from stepkd.data.completion import Completion
from stepkd.data.datamodule import StepData
from stepkd.data.encode import with_completion
from stepkd.errors import ConfigError, check_choice
from stepkd.losses import LossTerms, entropy, fused_sum, segment_sum, target_logps, temperature_slope, tempered
from stepkd.models.spec import PolicyConfig
from stepkd.modules import gkd_settings as settings
from stepkd.modules.base import StepModule
from stepkd.modules.components import Component, ForwardPass
from stepkd.modules.distillation import DistillationModule
from stepkd.modules.fidelity import Fidelity, FidelityConfig, Sums, with_calibration
from stepkd.modules.gkd_settings import JSD, CrossEntropyConfig, DivergenceConfig, LearnedTemperature, SourceConfig
from stepkd.modules.policy_module import telling
from stepkd.modules.step_scores import FocusConfig, focused, load_step_scorer
from stepkd.randomness import generator
from stepkd.runs.process import STOP_REQUEST
from stepkd.sampling.config import IN_PROCESS, EngineConfig
from stepkd.sampling.engine import Engine
from stepkd.scorers.scorer import StepScorer
from stepkd.steps.segment import get_segmenter
from stepkd.teachers.cache import write_cache
from stepkd.teachers.config import TeacherConfig
from stepkd.teachers.local import LocalTeacher
from stepkd.teachers.signals import Teacher

_CPU = torch.device("cpu")


DIVERGENCES: dict[type[DivergenceConfig], Callable[..., Tensor]] = {
    settings.JSD: losses.generalized_jsd,
    settings.ForwardKL: losses.forward_kl,
    settings.ReverseKL: losses.reverse_kl,
    settings.SkewForwardKL: losses.skew_forward_kl,
    settings.SkewReverseKL: losses.skew_reverse_kl,
    settings.BalancedKL: losses.balanced_kl,
    settings.NKD: losses.nkd,
}
"""The function of each: log-probabilities of student and teacher (C, V), where :attr:`DivergenceConfig.whole` says so
also the targets (C,), and the settings, to a divergence (C,) in nats."""
Average = Literal["tokens", "sequences"]
SLOPE = "temperature_slope"
"""Metric that a learnt temperature takes its step by; it is not logged."""


@dataclass
class Distillation(Component):
    """Divergence from a teacher and cross-entropy of the same tokens, in one pass over the logits."""

    divergence: DivergenceConfig
    average: Average
    """Whether every token of the global batch weighs the same, or every completion."""
    term_weights: Callable[[], tuple[float, float]] | None
    """Weights of divergence and cross-entropy as they are now; None: of the divergence alone, 1."""
    focuses: bool
    """Whether steps have weights."""
    soften: LearnedTemperature | None = None
    """How a temperature of the teacher alone is learnt; None: it has none."""

    names = ("kd",)

    def __post_init__(self) -> None:
        self.log_temperature = 0.0
        options = {k: v for k, v in vars(self.divergence).items() if k != "temperature" or not self.divergence.tempers}
        function = DIVERGENCES.get(type(self.divergence))
        if function is None:
            names = ", ".join(each.__name__ for each in DIVERGENCES)
            raise ConfigError(f"divergence {type(self.divergence).__name__} has no function in DIVERGENCES ({names})")
        self._divergence = partial(function, **options)

    def count(self, batch: Batch) -> dict[str, float]:
        """The denominator of ``kd``.

        Args:
            batch: a micro-batch.

        Returns:
            For ``tokens`` the completion tokens (or the sum of their weights), for ``sequences`` the completions in
            which something counts.
        """
        weights_N = self.step_weights(batch)
        if self.average == "tokens":
            return {"kd": float(weights_N.sum())}
        return {"kd": float(len(batch.completion_N[weights_N > 0].unique()))}

    def terms(self, forward: ForwardPass) -> LossTerms:
        """``kd``: the summed divergence (and weighted cross-entropy) in nats.

        Metrics over all completion tokens: ``divergence`` alone, ``agreement`` (share of positions at which both find
        the same argmax token), ``ce`` where it has a weight, ``focus`` (share that counts) where steps have weights,
        ``entropy_gap`` (student minus teacher) where the teacher's temperature is learnt. Outside training the teacher
        is compared as it is, whatever temperature it has learnt under: values of two validations are comparable.
        """
        batch, signals = forward.batch, forward.signals
        kd_weight, ce_weight = (1.0, 0.0) if self.term_weights is None else self.term_weights()
        softness = math.exp(self.log_temperature) if forward.scales else 1.0  # in training
        assert signals is not None

        def position(logits_CV: Tensor, targets_C: Tensor, *chunk: Tensor) -> Tensor:
            student, teacher, argmax_C = signals.compare(
                tempered(logits_CV, self.divergence.logits_temperature), *chunk
            )
            learned = []
            if self.soften is not None:
                learned = [temperature_slope(student, teacher, targets_C, temperature=softness)]
                teacher = tempered(teacher, softness)
                learned.append(entropy(student) - entropy(teacher))
            kd_C = self._divergence(student, teacher, *((targets_C,) if self.divergence.whole else ()))
            agree_C = (logits_CV.argmax(-1) == argmax_C).to(kd_C.dtype)
            if self.term_weights is None:
                return torch.stack([kd_C, kd_C.detach(), agree_C, *learned], dim=-1)
            ce_C = -target_logps(logits_CV, targets_C)
            total_C = kd_weight * kd_C + ce_weight * ce_C
            return torch.stack([total_C, kd_C.detach(), agree_C, *learned, ce_C.detach()], dim=-1)

        weights_N = self.step_weights(batch)
        if self.average == "sequences":
            totals_B = segment_sum(weights_N, batch.completion_N, len(batch.examples))
            weights_N = weights_N / totals_B.clamp_min(1e-300)[batch.completion_N]
        arguments = (forward.hidden_NH, weights_N, batch.targets_N, *signals.tensors)
        total, values = fused_sum(position, forward.head, *arguments, chunk_size=forward.chunk_size)
        number = torch.tensor(float(len(values)), device=values.device)
        names = ["divergence", "agreement"]
        names += [] if self.soften is None else [SLOPE, "entropy_gap"]
        names += [] if self.term_weights is None else ["ce"]
        metrics = {name: (values[:, i].sum(), number) for i, name in enumerate(names, start=1)}
        if self.focuses:
            metrics["focus"] = ((weights_N > 0).double().sum(), number)
        return LossTerms({"kd": total}, metrics)

    @staticmethod
    def step_weights(batch: Batch) -> Tensor:
        """(N,) weight of every target, float64: its step's, or 1 where steps have none."""
        steps = [each.step_weights or (1.0,) * len(each.step_ends) for each in batch.examples]
        weights_S = torch.tensor([w for own in steps for w in own], dtype=torch.float64, device=batch.step_N.device)
        return weights_S[batch.step_N]


class GKDModule(DistillationModule):
    """GKD (Agarwal et al. 2024, arXiv 2306.13649): ``(1 - lambda) E_data D + lambda E_student D`` of a divergence D.

    The expectations take turns: an optimiser step draws whose completions all of its batch is (:meth:`draw_source`). No
    gradient goes through sampling. What is counted is known only once a batch has been sampled; the denominators are
    reduced over ranks after that.

    Args:
        policy: the student.
        teacher: the model that it learns from.
        divergence: how far the student is from it at a position; null: the paper's JSD with beta 0.5.
        source: whose completions: the student's, the teacher's, the data's.
        engine: where the student is sampled: Transformers, VLLMServer or VLLM.
        average: ``tokens``: every token of the global batch weighs the same; ``sequences``: every completion does (the
            paper's 1/|y|).
        cross_entropy: how the cross-entropy of the same tokens joins the divergence; null: not.
        focus: weigh every step by what a step scorer thinks of it, for instance only the incorrect ones; the average
            is over the weights. A batch in which nothing counts is skipped. Validation weighs all tokens alike.
        fidelity: also measure in validation how like its teacher the student is (``val/fidelity/...``); null: not.
        soften: a temperature of the teacher alone that is learnt beside the student; null: none. Not where the student
            samples: the tokens are the temperature's labels.
        **settings: as for :class:`~stepkd.modules.base.StepModule`.
    """

    teacher: Teacher

    def __init__(
        self,
        policy: PolicyConfig,
        teacher: TeacherConfig,
        divergence: DivergenceConfig | None = None,
        source: SourceConfig | None = None,
        engine: EngineConfig = IN_PROCESS,
        average: Average = "tokens",
        cross_entropy: CrossEntropyConfig | None = None,
        focus: FocusConfig | None = None,
        fidelity: FidelityConfig | None = None,
        soften: LearnedTemperature | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(policy, **settings)
        check_choice("average", average, ("tokens", "sequences"))
        self.divergence = divergence or JSD()
        self.source = source or SourceConfig()
        self.engine = engine
        self.cross_entropy = cross_entropy
        self.focus_spec = focus
        self.fidelity_spec = fidelity
        self.sampling = replace(self.source.sampling, seed=self.seed)
        self.new_tokens = self.sampling.longest if self.source.samples else 0
        self.skip_empty_steps = focus is not None
        teacher.require(({} if fidelity is None else fidelity.needs()) | self.source.needs() | self.divergence.needs())
        teacher.require({} if soften is None else {"whole": "soften tempers the whole distribution"})
        if soften is not None and self.source.lmbda:
            what = f"source.lmbda={self.source.lmbda} has the student sample its tokens"
            raise ConfigError(f"soften learns a temperature by the completions' tokens, and {what}: set it to 0")
        self.teacher = teacher.build()
        self.teacher_temperature = self.divergence.logits_temperature
        weights = None if cross_entropy is None else self._term_weights
        self.distillation = Distillation(self.divergence, average, weights, focus is not None, soften)
        self.components = [self.distillation]
        self._segmenter = get_segmenter(self.source.segmenter)

    def _term_weights(self) -> tuple[float, float]:
        assert self.cross_entropy is not None
        now = (self.global_step, self.planned_steps()) if self.training else (None, None)
        return self.cross_entropy.term_weights(*now)

    def after_step(self, metrics: dict[str, float]) -> None:
        """A teacher that is the student itself keeps up with it; a temperature that is learnt takes its step."""
        self.teacher.after_step(self.global_step)
        if (soften := self.distillation.soften) is not None:
            self.distillation.log_temperature -= soften.lr * metrics.get(SLOPE, 0.0)

    def reads(self, split: str) -> dict[tuple[str, ...], str]:
        """Solutions where batches are the data's own, answers where they are graded."""
        lmbda, fidelity = self.source.lmbda, self.fidelity_spec
        if split == "train":
            reason = f"source.lmbda: {lmbda} leaves batches to the data's own solutions (1 samples all of them)"
            return {("solution",): reason} if lmbda < 1 and self.source.teacher < 1 else {}
        answers = {("answer",): "fidelity.answers grades answers"} if fidelity is not None and fidelity.answers else {}
        return answers | super().reads(split)

    def prepare(self, batch: StepBatch) -> Iterator[list[Batch]]:
        """The batch's completions, from the source that its step draws."""
        self.teacher.begin(self.position.epoch)
        chosen = self.draw_source()
        examples: Sequence[Completion] = batch.examples if chosen == "data" else self.sample(batch, chosen)
        if self.focus_spec is not None:
            with self.phases.phase("scoring steps", total=len(examples)):
                examples = focused(examples, self.focus_spec, self._scorer, self.tokenizer)
        yield self.prepare_examples(examples)

    def draw_source(self) -> Literal["student", "teacher", "data"]:
        """Where this optimiser step's completions come from: the same on every rank, and after a resume.

        Returns:
            ``student`` with probability ``lmbda`` (GKD, arXiv 2306.13649, algorithm 1); of the other batches
            ``teacher`` with probability ``source.teacher``, else ``data``.
        """
        draws = generator(self.seed, "gkd source", self.global_step).random(2)
        if draws[0] < self.source.lmbda:
            return "student"
        return "teacher" if draws[1] < self.source.teacher else "data"

    def sample(self, batch: StepBatch, source: Literal["student", "teacher"]) -> list[Completion]:
        """Completions of the batch's prompts, keyed by step and problem whatever the rank.

        Args:
            batch: this rank's share; its examples give the prompts.
            source: who samples. A teacher with a prompt template of its own is asked under that; the student learns the
                completion behind its own prompt.

        Returns:
            ``sampling.n`` completions for each example, in order, cut into steps.
        """
        prompts = (
            self.teacher.prompts(batch.examples) if source == "teacher" else [e.prompt_ids for e in batch.examples]
        )
        with self.gathered(), self.phases.phase(f"sampling from the {source}", total=len(prompts) * self.sampling.n):
            if source == "teacher":
                engine: Engine = cast(LocalTeacher, self.teacher).engine(self.device, STOP_REQUEST.__bool__)
            else:
                engine = self.sampling_engine
                engine.update(self.global_step)
            drawn = engine.generate(
                prompts,
                self.sampling,
                purpose=f"gkd {source}",
                step=self.global_step,
                indices=batch.indices,
                on_progress=self.phases.advance,
            )
        return [
            with_completion(example, completion.token_ids, self.tokenizer, self._segmenter)
            for example, completions in zip(batch.examples, drawn, strict=True)
            for completion in completions
        ]

    @cached_property
    @telling
    def _scorer(self) -> StepScorer:
        assert self.focus_spec is not None
        return load_step_scorer(self.focus_spec.scorer, "focus.scorer", device=str(self.device))

    @property
    def samples_in_validation(self) -> bool:
        """See :class:`~stepkd.modules.policy_module.PolicyModule`; fidelity samples, too."""
        return super().samples_in_validation or self.fidelity_spec is not None

    def measured(self, batch: StepBatch) -> Sums:
        """Fidelity, where it is asked for."""
        if self.fidelity_spec is None:
            return {}
        with self.phases.phase("fidelity", total=len(batch.examples)):
            return self._fidelity(batch.examples, batch.indices)

    def derived_metrics(self, values: dict[str, float]) -> dict[str, float]:
        """With fidelity's calibration errors, and a learnt temperature in place of its slope."""
        if values.pop(SLOPE, None) is not None:
            values["teacher_temperature"] = math.exp(self.distillation.log_temperature)
        return with_calibration(values)

    def method_state(self) -> dict[str, Any]:
        """With the temperature that is learnt."""
        return super().method_state() | {"log_temperature": self.distillation.log_temperature}

    def adopt_method_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        super().adopt_method_state(state)
        self.distillation.log_temperature = state.get("log_temperature", self.distillation.log_temperature)

    @cached_property
    @telling
    def _fidelity(self) -> Fidelity:
        assert self.fidelity_spec is not None
        return Fidelity(self.fidelity_spec, self, self.sampled_accuracy.grader)


def cache_teacher(
    module: StepModule,
    data: StepData,
    out: str | Path,
    *,
    validation: bool = True,
    device: torch.device = _CPU,
    **how: Any,
) -> dict[str, Any]:
    """Write the cache that a distillation module with the teacher Cached reads, or resume.

    Args:
        module: a module with a divergence and a teacher in this process, not attached to a Trainer.
        data: its data; the completions of the training data are scored.
        out: folder of the cache.
        validation: score those of the validation data, too.
        device: where the teacher computes.
        **how: ``top_k``, ``precision`` and ``options`` of :func:`~stepkd.teachers.cache.write_cache`.

    Returns:
        See :func:`~stepkd.teachers.cache.write_cache`.

    Raises:
        ConfigError: another module or teacher; and what ``write_cache`` refuses.
    """
    teacher, loss = getattr(module, "teacher", None), module.components[0]
    if not isinstance(loss, Distillation) or not isinstance(teacher, LocalTeacher):
        raise ConfigError("a teacher's cache needs a distillation recipe (GKDModule) with the teacher Local")
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)  # type: ignore[assignment]
    data.setup("fit")
    names = ("train", "validation") if validation else ("train",)
    teacher.bind(module.tokenizer)
    teacher.place(device)
    examples = [example for name in names for example in data.examples.get(name, [])]
    how |= {"max_tokens": module.micro_batch_tokens, "chunk_size": module.chunk_size}
    return write_cache(out, teacher, examples, temperature=loss.divergence.logits_temperature, **how)
