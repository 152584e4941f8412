"""Generalised knowledge distillation: a divergence from a teacher, on the student's own samples or given completions.

Axes: N completion tokens of a micro-batch, C of one chunk, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from stepkd.data.batching import StepBatch
from stepkd.data.collate import Batch
from stepkd.data.encode import Example, with_completion
from stepkd.data.templates import template_name
from stepkd.errors import ConfigError, check_choice
from stepkd.losses import LossTerms, fused_sum, segment_sum, target_logps, tempered
from stepkd.models.policy import Policy
from stepkd.models.source import trained_template
from stepkd.models.spec import PolicyConfig
from stepkd.modules.base import Prepared, StepModule
from stepkd.modules.fidelity import Fidelity, FidelityConfig, fidelity_totals
from stepkd.modules.settings import DivergenceConfig, MixConfig, SourceConfig
from stepkd.modules.step_scores import Focus, FocusConfig, token_weights
from stepkd.randomness import generator
from stepkd.runs.process import STOP_REQUEST
from stepkd.sampling.engines import Engine
from stepkd.sampling.sampler import Sampler
from stepkd.sampling.transformers_sampler import TransformersSampler
from stepkd.steps.segment import get_segmenter
from stepkd.teachers.cache import CachedTeacher
from stepkd.teachers.local import LocalTeacher, TeacherConfig
from stepkd.teachers.own import SelfTeacher
from stepkd.teachers.server import ServerTeacher
from stepkd.teachers.signals import Teacher

logger = logging.getLogger(__name__)

Average = Literal["tokens", "sequences"]


class TaughtModule(StepModule):
    """Base of methods whose ``teacher`` scores the policy's text; None: there is none.

    Dropout is off, so that the policy that samples is the one that learns.
    """

    teacher: Any = None
    without_dropout = "the model that samples is the one that learns"

    def complete_model(self) -> None:
        """Bind the teacher to the policy."""
        if isinstance(self.teacher, SelfTeacher):
            self.teacher.follow(self.model)
        if self.teacher is not None:
            self.teacher.bind(self.model.tokenizer, self.model.vocab_size)
            self.keep_in_mind("teacher", self.teacher.identity(), "under another teacher")

    def on_fit_start(self) -> None:
        """Refuse a teacher that was to be sharded and is not, and a cache of another precision."""
        super().on_fit_start()
        if isinstance(self.teacher, CachedTeacher):
            self.teacher.check_precision(str(self.trainer.precision))
        self._check_context()
        if isinstance(self.teacher, LocalTeacher):
            self.teacher.check_sharded()
            self._warn_of_template(self.teacher.spec)

    def _warn_of_template(self, spec: TeacherConfig) -> None:
        """Say when the teacher was trained to read other prompts than the student's, and is to read those."""
        used = self.template
        trained = None if spec.template is not None else trained_template(str(spec.path))
        if used is not None and trained not in (None, used) and self.trainer.is_global_zero:
            names = template_name(used), template_name(trained)
            logger.warning(
                "prompt template: the teacher reads the student's prompts (%s); it was trained with %s, which "
                "teacher.template gives it",
                *names,
            )

    def _check_context(self) -> None:
        """Refuse data and samples that are longer than the teacher's context."""
        context = getattr(self.teacher, "max_length", None)
        self.check_data_fits("teacher", context)
        new, examples = self.new_tokens(), getattr(self.datamodule, "examples", {}).get("train", ())
        prompt = max((len(each.prompt_ids) for each in examples), default=0)
        sampled = min(prompt + new, self.model.max_length or 2**63) if new else 0
        if context is not None and examples and sampled > context:
            raise ConfigError(
                f"a prompt and {new} new tokens: up to {sampled} tokens, and the teacher's context is {context}: lower "
                "it, or take a teacher of a longer context"
            )

    def new_tokens(self) -> int:
        """Most tokens of a completion that is sampled for the teacher to score; 0: none is sampled."""
        return 0

    def shard(self, mesh: Any) -> None:
        """The teacher, too, if it asks for that."""
        super().shard(mesh)
        if isinstance(self.teacher, LocalTeacher):
            self.teacher.shard(mesh)

    def gathered(self) -> AbstractContextManager[Any]:
        """With the teacher whole, too."""
        whole = ExitStack()
        whole.enter_context(super().gathered())
        if isinstance(self.teacher, LocalTeacher):
            whole.enter_context(self.teacher.gathered())
        return whole


class GKDModule(TaughtModule):
    """GKD (Agarwal et al. 2024, arXiv 2306.13649): ``(1 - lambda) E_data D + lambda E_student D`` of a divergence D.

    No gradient goes through sampling. Dropout is off, so that the student that samples is the one that learns. What is
    counted is known only once a batch has been sampled; the denominators are reduced over ranks after that.

    Args:
        policy: the student.
        teacher: the model that it learns from.
        divergence: how far the student is from it at a position.
        source: whose completions: the student's, the teacher's, the data's.
        average: ``tokens``: every token of the global batch weighs the same; ``sequences``: every completion does (the
            paper's 1/|y|).
        ce_weight: weight of the cross-entropy of the same tokens beside the divergence, >= 0. NKD's paper has 1.
        mix: in its place, weights a and 1 - a of divergence and cross-entropy, with a rising; null: not.
        focus: weigh every step by what a step scorer thinks of it, for instance only the wrong ones; the average is
            over the weights. A batch in which nothing counts is skipped. Validation weighs all tokens alike.
        fidelity: also measure in validation how like its teacher the student is (``val/fidelity/...``); null: not.
        **settings: optimizer, validation, micro_batch_tokens, chunk_size, loss_weights, ema_decay, seed: as for
            :class:`~stepkd.modules.base.StepModule`.
    """

    loss_names = ("kd",)

    def __init__(
        self,
        policy: PolicyConfig,
        teacher: TeacherConfig,
        divergence: DivergenceConfig | None = None,
        source: SourceConfig | None = None,
        average: Average = "tokens",
        ce_weight: float = 0.0,
        mix: MixConfig | None = None,
        focus: FocusConfig | None = None,
        fidelity: FidelityConfig | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(policy, **settings)
        check_choice("average", average, ("tokens", "sequences"))
        if not 0 <= ce_weight < float("inf"):
            raise ConfigError(f"ce_weight={ce_weight}: must be 0 (off) or positive")
        if mix is not None and ce_weight:
            raise ConfigError(f"ce_weight={ce_weight} and mix both weigh the cross-entropy: set ce_weight to 0")
        self.divergence = divergence or DivergenceConfig()
        self.source = source or SourceConfig()
        self.average = average
        self.ce_weight = ce_weight
        self.mix = mix
        self.focus_spec = focus
        self.fidelity_spec = fidelity
        self.steps_per_batch = self.source.reuse
        self.skip_empty_steps = focus is not None
        self.teacher = self._make_teacher(teacher)
        self._segmenter = get_segmenter(self.source.segmenter)
        self._divergence = self.divergence.function()

    def _make_teacher(self, spec: TeacherConfig) -> Teacher:
        buckets: dict[str, Any] = {"top_k": self.divergence.top_k, "tail": self.divergence.tail}
        if spec.itself is not None:
            if self.source.teacher > 0:
                raise ConfigError(
                    f"source.teacher={self.source.teacher} samples from the teacher, which is the student itself: set "
                    "source.student instead"
                )
            if self.fidelity_spec is not None and self.fidelity_spec.answers:
                raise ConfigError("fidelity.answers compares with another model, and the teacher is the student itself")
            return SelfTeacher(spec, **buckets)
        if spec.server is not None:
            return self._server_teacher(spec, buckets)
        if spec.cache is None:
            return LocalTeacher(spec, **buckets)
        if self.source.student > 0 or self.source.teacher > 0:
            raise ConfigError(
                f"teacher.cache knows the completions it was written for and cannot score fresh samples; with "
                f"source.student={self.source.student} and source.teacher={self.source.teacher} some would be fresh: "
                "set both to 0 and train on rollouts written beforehand, or give teacher.path"
            )
        if self.divergence.kind == "nkd":
            raise ConfigError("divergence.kind=nkd needs the teacher's whole distribution, which no cache holds")
        if self.fidelity_spec is not None:
            raise ConfigError(
                "fidelity compares on fresh samples, which teacher.cache cannot score: set fidelity: null"
            )
        return CachedTeacher(spec.cache, **buckets)

    def _server_teacher(self, spec: TeacherConfig, buckets: dict[str, Any]) -> ServerTeacher:
        for setting, clashes in (
            ("divergence.top_k: null (a server gives its likeliest tokens: set it)", self.divergence.top_k is None),
            ("divergence.kind: nkd (which needs the whole distribution)", self.divergence.kind == "nkd"),
            (
                "a temperature (not every server tempers the scores of given text)",
                self.divergence.logits_temperature != 1,
            ),
            ("source.teacher (a server's text is rolled out beforehand: stepkd label)", self.source.teacher > 0),
            ("fidelity (which needs the whole distribution: set it to null)", self.fidelity_spec is not None),
        ):
            if clashes:
                raise ConfigError(f"teacher.server does not go with {setting}")
        return ServerTeacher(str(spec.server), tokenizer=spec.tokenizer, **buckets)

    # ---- model -----------------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        """The weights of a teacher that keeps up with the student."""
        return {"itself": self.teacher.state()} if isinstance(self.teacher, SelfTeacher) else {}

    def restore_method_state(self, state: dict[str, Any]) -> None:
        """Take back the weights of a teacher that keeps up with the student."""
        self.adopt_method_state(state)

    def adopt_method_state(self, state: dict[str, Any]) -> None:
        """Take over the weights of a teacher that keeps up with the student."""
        if isinstance(self.teacher, SelfTeacher) and "itself" in state:
            self.teacher.restore(state["itself"])

    def after_step(self) -> None:
        """A teacher that is the student itself keeps up with it."""
        if isinstance(self.teacher, SelfTeacher):
            self.teacher.after_step(self.global_step)

    def new_tokens(self) -> int:
        """Tokens of a sample, where there are samples."""
        return self.source.max_new_tokens if self.source.student or self.source.teacher else 0

    # ---- batches ---------------------------------------------------------------------------------------------------

    def reads(self, split: str) -> dict[tuple[str, ...], str]:
        """Solutions where batches are the data's own, answers where they are graded."""
        student, teacher, fidelity = self.source.student, self.source.teacher, self.fidelity_spec
        if split == "train":
            reason = f"source.student: {student} leaves batches to the data's own solutions (1 samples all of them)"
            return {("solution",): reason} if student < 1 and teacher < 1 else {}
        answers = {("answer",): "fidelity.answers grades answers"} if fidelity is not None and fidelity.answers else {}
        return answers | super().reads(split)

    def prepare(self, batch: StepBatch) -> Iterator[Prepared]:
        """The batch's completions, from the source that its step draws; ``reuse`` optimiser steps of them."""
        if isinstance(self.teacher, SelfTeacher):
            self.teacher.begin(self.position.epoch)
        chosen = self.draw_source()
        examples: Sequence[Example] = batch.examples if chosen == "data" else self.sample(batch, chosen)
        if self.focus_spec is not None:
            with self.phases.phase("scoring steps", total=len(examples)):
                examples = self._focus(self.tokenizer, examples)
        prepared = self.prepare_examples(examples)
        for _ in range(self.source.reuse):
            yield prepared

    @cached_property
    def _focus(self) -> Focus:
        assert self.focus_spec is not None
        return Focus(self.focus_spec, str(self.device))

    def draw_source(self) -> Literal["student", "teacher", "data"]:
        """Where this optimiser step's completions come from: the same on every rank, and after a resume."""
        draws = generator(self.seed, "gkd source", self.global_step).random(2)
        if draws[0] < self.source.student:
            return "student"
        return "teacher" if draws[1] < self.source.teacher else "data"

    def sample(self, batch: StepBatch, source: Literal["student", "teacher"]) -> list[Example]:
        """Completions of the batch's prompts, keyed by step and problem whatever the rank."""
        policy, prompts = self.model, [example.prompt_ids for example in batch.examples]
        if source == "teacher":
            self.teacher.place(self.device)
            policy, prompts = self.teacher.policy, self.teacher.prompts(batch.examples)
        with self.gathered(), self.phases.phase(f"{source} rollout", total=len(prompts)):
            rollouts = self._sampler(policy, source).sample(
                prompts,
                self.source.sampling(self.seed),
                purpose=f"gkd {source}",
                step=self.global_step,
                indices=batch.indices,
                on_progress=self.phases.advance,
            )
        pairs = zip(batch.examples, rollouts, strict=True)
        return [with_completion(each, drawn[0].token_ids, self.tokenizer, self._segmenter) for each, drawn in pairs]

    def _sampler(self, policy: Policy, source: str) -> Sampler:
        if source == "teacher":
            return TransformersSampler(policy, breaks_off=STOP_REQUEST.__bool__)
        self._student.refresh(self.global_step)
        return self._student

    @cached_property
    def _student(self) -> Engine:
        return self.source.engine.build(self.model, self.source.sampling(self.seed), STOP_REQUEST.__bool__)

    # ---- validation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: StepBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The divergence on given completions, sampled accuracy, and fidelity where it is asked for."""
        super().validation_step(batch, batch_idx, dataloader_idx)
        if self.fidelity_spec is None:
            return
        with self._averaged():  # every rank gathers what is cut up, also one without examples
            if not batch.examples:
                return
            with self.phases.phase("fidelity", total=len(batch.examples)):
                for name, (total, number) in self._fidelity(batch.examples, batch.indices).items():
                    self._sums[f"metric/{name}"] += total
                    self._sums[f"number/{name}"] += number

    def evaluation_metrics(self, totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """The means, with fidelity's errors made of their sums."""
        return super().evaluation_metrics(fidelity_totals(totals))

    @cached_property
    def _fidelity(self) -> Fidelity:
        assert self.fidelity_spec is not None
        return Fidelity(
            self.fidelity_spec,
            self.model,
            self.teacher,
            self._sampled().grader,
            self._collate,
            max_tokens=self.micro_batch_tokens,
            chunk_size=self.chunk_size,
            seed=self.seed,
        )

    # ---- loss ------------------------------------------------------------------------------------------------------

    def count(self, micro_batch: Batch) -> dict[str, float]:
        """Completion tokens (or their weights), or completions in which something counts."""
        weights_N = token_weights(micro_batch)
        if self.average == "tokens":
            return {"kd": float(weights_N.sum())}
        return {"kd": float(len(micro_batch.completion_N[weights_N > 0].unique()))}

    def loss_terms(self, micro_batch: Batch) -> LossTerms:
        """``kd``: the summed divergence (and weighted cross-entropy) in nats.

        Metrics over all completion tokens: ``divergence`` alone, ``agreement`` (share of positions at which both find
        the same token likeliest), ``ce`` where it has a weight, ``focus`` (share that counts) where steps have weights.
        """
        temperature = self.divergence.logits_temperature
        kd_weight, ce_weight = 1.0, self.ce_weight
        if self.mix is not None:
            kd_weight = self.mix.share(self.global_step, self.planned_steps()) if self.training else self.mix.end
            ce_weight = 1.0 - kd_weight
        signals = self.teacher.signals(micro_batch, temperature=temperature)

        def position(logits_CV: Tensor, targets_C: Tensor, *chunk: Tensor) -> Tensor:
            log_student_CV = tempered(logits_CV, temperature)
            student, teacher, favourite_C = signals.compare(log_student_CV, *chunk)
            kd_C = self._divergence(student, teacher, targets_C)
            agree_C = (logits_CV.argmax(-1) == favourite_C).to(kd_C.dtype)
            if not with_ce:
                return torch.stack([kd_C, kd_C.detach(), agree_C], dim=-1)
            ce_C = -target_logps(logits_CV, targets_C)
            total_C = kd_weight * kd_C + ce_weight * ce_C
            return torch.stack([total_C, kd_C.detach(), agree_C, ce_C.detach()], dim=-1)

        with_ce = bool(self.ce_weight) or self.mix is not None
        weights_N = self._weights(micro_batch)
        total, values = fused_sum(
            position,
            self.model.head,
            self.needed_hidden(micro_batch),
            weights_N,
            micro_batch.targets_N,
            *signals.tensors,
            chunk_size=self.chunk_size,
        )
        number = torch.tensor(float(len(values)), device=values.device)
        metrics = {"divergence": (values[:, 1].sum(), number), "agreement": (values[:, 2].sum(), number)}
        if self.focus_spec is not None:
            metrics["focus"] = ((weights_N > 0).double().sum(), number)
        if with_ce:
            metrics["ce"] = (values[:, 3].sum(), number)
        return LossTerms({"kd": total}, metrics)

    def _weights(self, batch: Batch) -> Tensor:
        """Weight of every token in the sum whose denominator :meth:`count` gives."""
        weights_N = token_weights(batch)
        if self.average == "tokens":
            return weights_N
        totals_B = segment_sum(weights_N, batch.completion_N, len(batch.examples))
        return weights_N / totals_B.clamp_min(1e-300)[batch.completion_N]
