"""Reinforcement learning from rewards, with a teacher: GRPO, on-policy distillation, and both in one (KDRL).

A step reads top to bottom: :meth:`KDRLModule.prepare` samples groups and grades them
(:class:`~stepkd.modules.rollouts.GroupSampler`), gives every token an advantage
(:class:`~stepkd.modules.advantages.AdvantageEstimator`), and cuts the rollouts into micro-batches, whose loss is
:class:`~stepkd.modules.kdrl_objective.PolicyGradient`. A completion keeps its tokens and log-probabilities as arrays
from the sampler to the loss.

Axes: N completion tokens of a micro-batch, C of one chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepkd.data.batching import StepBatch
from stepkd.data.collate import Batch
from stepkd.errors import ConfigError
from stepkd.losses import chunked_head, target_logps, tempered
from stepkd.models.spec import PolicyConfig
from stepkd.modules.advantages import AdvantageEstimator
from stepkd.modules.base import Prepared
from stepkd.modules.components import ForwardPass
from stepkd.modules.distillation import DistillationModule
from stepkd.modules.kdrl_objective import PolicyGradient, rollouts_of
from stepkd.modules.rewards import RewardConfig, Rewards
from stepkd.modules.rollouts import GroupSampler, Rollout, SampleLog
from stepkd.modules.settings import (
    AsAdvantage,
    KDConfig,
    PolicyLossConfig,
    RolloutConfig,
    SampledKL,
    SampleLogConfig,
    Steady,
    StepCreditConfig,
    Switch,
)
from stepkd.modules.step_scores import load_step_scorer
from stepkd.sampling.engines import IN_PROCESS, EngineConfig
from stepkd.teachers.config import TeacherConfig


class KDRLModule(DistillationModule):
    """KDRL (arXiv 2506.02208): ``J = J_GRPO - beta KL(pi || teacher)`` on the policy's own samples.

    Without a teacher it is GRPO and its kin; with ``policy_loss.weight: 0`` on-policy distillation by the reverse KL
    alone. No KL to a reference model: the teacher takes its place.

    A group is sampled and credited on one rank, whole. Denominators are counted after sampling and reduced over ranks.
    Dropout is off, so that the policy that samples is the one that learns.

    Args:
        policy: the model to train.
        rewards: weighted sum of reward functions; null: the correct final answer. In Python also names and functions.
        teacher: the model that is distilled from; null: none.
        rollout: what is sampled.
        engine: where it is sampled: InProcess, VLLMServer or VLLMColocated.
        policy_loss: the policy-gradient term.
        kd: the distillation: SampledKL, ExactKL or AsAdvantage.
        step_credit: rewards of steps beside those of answers; null: none.
        samples: what is kept of the rollouts to look at (``samples.jsonl``, in runs with a logger).
        **settings: optimizer, validation, micro_batch_tokens, chunk_size, loss_weights, ema_decay, seed: as for
            :class:`~stepkd.modules.base.StepModule`.
    """

    shown = ("train/reward", "train/length")
    shares = True
    skip_empty_steps = True
    prepares_with_model = True

    def __init__(
        self,
        policy: PolicyConfig,
        rewards: list[RewardConfig] | None = None,
        teacher: TeacherConfig | None = None,
        rollout: RolloutConfig | None = None,
        engine: EngineConfig = IN_PROCESS,
        policy_loss: PolicyLossConfig | None = None,
        kd: KDConfig | None = None,
        step_credit: StepCreditConfig | None = None,
        samples: SampleLogConfig | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(policy, **settings)
        given: list[Any] = [RewardConfig()] if rewards is None else list(rewards)
        self.reward_specs = [each if isinstance(each, RewardConfig) else RewardConfig(each) for each in given]
        self.rollout = rollout or RolloutConfig()
        self.engine = engine
        self.policy_loss = policy_loss or PolicyLossConfig()
        self.kd = kd or SampledKL()
        self.step_credit = step_credit
        self.samples = samples or SampleLogConfig()
        self.steps_per_batch = self.policy_loss.num_iterations
        self._check_settings(teacher)
        self.teacher = None if teacher is None else teacher.build()
        self.teacher_temperature = self.rollout.sampling.temperature
        self.objective = PolicyGradient(
            self.policy_loss,
            self.kd,
            self.teacher_temperature,
            sorted(spec.name for spec in self.reward_specs),
        )
        self.components = (self.objective,)

    def _check_settings(self, teacher: TeacherConfig | None) -> None:
        """What holds between settings of different parts, so that the type of none of them can say it."""
        if not self.reward_specs:
            raise ConfigError("rewards: give at least one, for instance {name: accuracy}")
        if teacher is not None:
            reads = "KDRL reads the teacher's probability of every sampled token"
            teacher.require({"fresh": reads, "whole": reads, "other": "KDRL distils from another model"})
        if isinstance(self.kd.schedule, Switch) and teacher is None:
            raise ConfigError(
                "kd.schedule: Switch distils first, and there is no teacher: give one, for instance Local"
            )
        shaped = teacher is not None and isinstance(self.kd, AsAdvantage)
        if shaped and (self.policy_loss.weight != 1 or self.policy_loss.equal_groups == "drop"):
            raise ConfigError(
                "kd: AsAdvantage distils through the policy-gradient term, which policy_loss.weight "
                f"{self.policy_loss.weight} or equal_groups: {self.policy_loss.equal_groups} changes or switches off: "
                "set kd: SampledKL"
            )
        if self.policy_loss.weight == 0:
            if teacher is None or self.kd.beta == 0 or not isinstance(self.kd.schedule, Steady):
                raise ConfigError(
                    f"policy_loss.weight=0 with teacher {teacher}, "
                    f"kd.beta={self.kd.beta}, kd.schedule {type(self.kd.schedule).__name__}: nothing would be left to "
                    "learn from"
                )
            if self.step_credit is not None or self.rollout.dynamic_sampling:
                raise ConfigError(
                    "policy_loss.weight=0 has no use for step_credit and rollout.dynamic_sampling: drop them"
                )
        elif self.rollout.sampling.n < 2:
            raise ConfigError(
                f"rollout.sampling.n={self.rollout.sampling.n}: an advantage compares the completions of a prompt and "
                "needs at least 2; for distillation alone set policy_loss.weight: 0"
            )

    # ---- model -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Load what rewards and credits, so that a mistake there is said before anything is sampled."""
        super().on_fit_start()
        rewards = Rewards(self.reward_specs, self._sampled().grader)
        self._groups = GroupSampler(self.rollout, self.engine, self.model, rewards, self.phases, self.seed)
        scorer = None
        if self.step_credit is not None:
            scorer = load_step_scorer(self.step_credit.scorer, "step_credit.scorer", device=str(self.device))
        mask = None if self.teacher is None else self.kd.mask
        self._estimator = AdvantageEstimator(self.rollout, self.policy_loss, self.step_credit, mask, scorer)
        folder = None if self.trainer.logger is None else self.trainer.logger.save_dir
        self._sample_log = SampleLog(self.samples, folder, self.rollout.sampling.longest)

    def distils(self, micro_batch: Batch) -> bool:
        """Of rollouts; the data's own solutions, in validation, are not distilled on."""
        return bool(rollouts_of(micro_batch))

    def new_tokens(self) -> int:
        """Those of a rollout."""
        return self.rollout.sampling.longest

    # ---- batches ---------------------------------------------------------------------------------------------------

    def reads(self, split: str) -> dict[tuple[str, ...], str]:
        """In training what the rewards read, and answers where correct completions are not distilled on."""
        if split != "train":
            return super().reads(split)
        needs = {spec.reads(): f"the reward {spec.name!r} reads it" for spec in self.reward_specs if spec.reads()}
        graded = {("answer",): f"kd.mask: {self.kd.mask} grades answers"}
        return needs if self.kd.mask == "none" else needs | graded

    def prepare(self, batch: StepBatch) -> Iterator[Prepared]:
        """Sample groups, grade and credit them, and yield ``num_iterations`` optimiser steps of them."""
        rollouts = self._estimator(self.sampled(batch))
        self._sample_log(self.global_step, rollouts, self.device, writes=self.trainer.is_global_zero)
        if self.policy_loss.num_iterations > 1:
            rollouts = self._with_old_logps(rollouts)
        for _ in range(self.policy_loss.num_iterations):
            self.objective.at_step(self.global_step)
            yield self.prepare_examples(rollouts)

    def sampled(self, batch: StepBatch) -> list[Rollout]:
        """Graded completions of the batch's prompts, group after group."""
        from transformers import TrainerState

        rewards, step, epoch = self._groups.rewards, self.global_step, self.position.epoch
        rewards.trainer_state = TrainerState(epoch=epoch, global_step=step, max_steps=self.planned_steps() or 0)
        found = self._groups(batch, step, epoch)
        self.log("perf/reward_seconds", sum(rewards.seconds.values()), batch_size=1)
        self.log_dict({f"train/{name}": value for name, value in rewards.logged(self.device).items()}, batch_size=1)
        return found

    @torch.no_grad()
    def _with_old_logps(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with what the policy says of every token before the first of several optimiser steps."""
        old: dict[int, np.ndarray] = {}
        for micro_batch in self.prepare_examples(rollouts).micro_batches:
            forward = ForwardPass(self.model, micro_batch.to(self.device), self.chunk_size)
            arguments = (forward.head, forward.hidden_NH, forward.batch.targets_N)
            logps_N = chunked_head(self._tempered_logps, *arguments, chunk_size=self.chunk_size).cpu()
            for row, example in enumerate(micro_batch.examples):
                old[id(example)] = logps_N[micro_batch.completion_N == row].numpy()
        return [replace(rollout, old_logps=old[id(rollout)]) for rollout in rollouts]

    def _tempered_logps(self, logits_CV: Tensor, targets_C: Tensor) -> Tensor:
        return target_logps(tempered(logits_CV, self.teacher_temperature), targets_C)

    def make_dummy(self, batch: StepBatch) -> Batch:
        """A rollout without a weight."""
        zeros = np.zeros(len(batch.dummy.token_ids))
        rollout = Rollout.of(batch.dummy, advantages=zeros, logprobs=zeros)
        return self._collate([rollout], is_dummy=True)

    def after_step(self) -> None:
        """Say when the sampler's probabilities are not the trainer's."""
        most = self.objective.mismatch.finish(self.global_step - 1, self.device)
        self.log("train/sampler_mismatch_max", most, batch_size=1)
