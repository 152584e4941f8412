"""Generalised knowledge distillation: a divergence from a teacher, on the student's own samples or given completions.

The loss is :class:`~stepkd.modules.distillation.Distillation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, cast

from stepkd.data.batching import StepBatch
from stepkd.data.collate import Batch
from stepkd.data.completion import Completion
from stepkd.data.encode import with_completion
from stepkd.errors import check_choice
from stepkd.models.spec import PolicyConfig
from stepkd.modules.base import telling
from stepkd.modules.distillation import Average, Distillation, DistillationModule
from stepkd.modules.distillation_settings import JSD, CrossEntropyConfig, DivergenceConfig, SourceConfig
from stepkd.modules.fidelity import Fidelity, FidelityConfig, Sums, with_calibration
from stepkd.modules.step_scores import FocusConfig, focused, load_step_scorer
from stepkd.randomness import generator
from stepkd.runs.process import STOP_REQUEST
from stepkd.sampling.config import IN_PROCESS, EngineConfig
from stepkd.sampling.engine import Engine
from stepkd.scorers.scorer import StepScorer
from stepkd.steps.segment import get_segmenter
from stepkd.teachers.config import TeacherConfig
from stepkd.teachers.local import LocalTeacher
from stepkd.teachers.signals import Teacher


class GKDModule(DistillationModule):
    """GKD (Agarwal et al. 2024, arXiv 2306.13649): ``(1 - lambda) E_data D + lambda E_student D`` of a divergence D.

    No gradient goes through sampling. What is counted is known only once a batch has been sampled; the denominators are
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
        self.teacher = teacher.build()
        self.teacher_temperature = self.divergence.logits_temperature
        weights = None if cross_entropy is None else self._weights
        self.components = [Distillation(self.divergence, average, weights, focus is not None)]
        self._segmenter = get_segmenter(self.source.segmenter)

    def _weights(self) -> tuple[float, float]:
        assert self.cross_entropy is not None
        now = (self.global_step, self.planned_steps()) if self.training else (None, None)
        return self.cross_entropy.weights(*now)

    def after_step(self) -> None:
        """A teacher that is the student itself keeps up with it."""
        self.teacher.after_step(self.global_step)

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
        with self.gathered(), self.phases.phase(f"{source} rollout", total=len(prompts) * self.sampling.n):
            if source == "teacher":
                engine: Engine = cast(LocalTeacher, self.teacher).engine(self.device, STOP_REQUEST.__bool__)
            else:
                engine = self._engine
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
    def _engine(self) -> Engine:
        return self.engine.build(self.model, self.sampling, STOP_REQUEST.__bool__)

    @cached_property
    @telling
    def _scorer(self) -> StepScorer:
        assert self.focus_spec is not None
        return load_step_scorer(self.focus_spec.scorer, "focus.scorer", device=str(self.device))

    def measured(self, batch: StepBatch) -> Sums:
        """Fidelity, where it is asked for."""
        if self.fidelity_spec is None:
            return {}
        with self.phases.phase("fidelity", total=len(batch.examples)):
            return self._fidelity(batch.examples, batch.indices)

    def derived_metrics(self, values: dict[str, float]) -> dict[str, float]:
        """With fidelity's calibration errors."""
        return with_calibration(values)

    @cached_property
    @telling
    def _fidelity(self) -> Fidelity:
        assert self.fidelity_spec is not None
        return Fidelity(self.fidelity_spec, self, self.sampled_accuracy.grader)
