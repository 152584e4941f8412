"""Reinforcement learning from rewards, with a teacher: GRPO, on-policy distillation, and both in one (KDRL).

A step reads top to bottom: :meth:`KDRLModule.prepare` samples groups and grades them
(:class:`~stepkd.modules.rollouts.GroupSampler`), gives every token an advantage
(:class:`~stepkd.modules.advantages.AdvantageEstimator`), and cuts the rollouts into micro-batches, whose loss is
:class:`~stepkd.modules.kdrl_objective.PolicyGradient`. A completion keeps its tokens and log-probabilities as arrays
from the sampler to the loss.

Axes: N completion tokens of a micro-batch, C of one chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from stepkd.modules.distillation import DistillationModule
from stepkd.modules.kdrl_objective import PolicyGradient
from stepkd.modules.rewards import GivenReward, RewardConfig, Rewards
from stepkd.modules.rollouts import GroupSampler, Rollout, SampleLog
from stepkd.modules.settings import (
    AsReward,
    KDConfig,
    PolicyLossConfig,
    RolloutConfig,
    Sampled,
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
        kd: the distillation term: Sampled, Exact, AsAdvantage or AsReward.
        step_credit: rewards of steps beside those of answers: ToGo or FirstStep; null: none.
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
        rewards: list[GivenReward] | None = None,
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
        self.kd = kd or Sampled()
        self.step_credit = step_credit
        self.samples = samples or SampleLogConfig()
        self.steps_per_batch = self.policy_loss.num_iterations
        self._check_settings(teacher)
        self.teacher = None if teacher is None else teacher.build()
        self.objective = PolicyGradient(
            self.policy_loss,
            self.kd,
            self.teacher,
            self.rollout.sampling.temperature,
            step=lambda: self.global_step,
            reward_names=sorted(spec.name for spec in self.reward_specs),
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
        shaped = teacher is not None and not hasattr(self.kd, "mask")
        if shaped and (self.policy_loss.weight != 1 or self.policy_loss.equal_groups == "drop"):
            raise ConfigError(
                f"kd: {type(self.kd).__name__} teaches through the policy-gradient term, which policy_loss.weight "
                f"{self.policy_loss.weight} or equal_groups: {self.policy_loss.equal_groups} changes or switches off: "
                "set kd: Sampled"
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
        mask = None if self.teacher is None else getattr(self.kd, "mask", "none")
        self._estimator = AdvantageEstimator(self.rollout, self.policy_loss, self.step_credit, mask, scorer)
        folder = None if self.trainer.logger is None else self.trainer.logger.save_dir
        self._sample_log = SampleLog(self.samples, folder, self.rollout.sampling.longest)

    def new_tokens(self) -> int:
        """Those of a rollout."""
        return self.rollout.sampling.longest

    # ---- batches ---------------------------------------------------------------------------------------------------

    def reads(self, split: str) -> dict[tuple[str, ...], str]:
        """In training what the rewards read, and answers where correct completions are not distilled on."""
        if split != "train":
            return super().reads(split)
        needs = {spec.reads(): f"the reward {spec.name!r} reads it" for spec in self.reward_specs if spec.reads()}
        mask = getattr(self.kd, "mask", "none")
        return needs if mask == "none" else needs | {("answer",): f"kd.mask: {mask} grades answers"}

    def prepare(self, batch: StepBatch) -> Iterator[Prepared]:
        """Sample groups, grade and credit them, and yield ``num_iterations`` optimiser steps of them."""
        rollouts = self.credited(self.sampled(batch))
        self._sample_log(self.global_step, rollouts, self.device, writes=self.trainer.is_global_zero)
        if self.policy_loss.num_iterations > 1:
            logps = self._of_rollouts(rollouts, lambda logps_N2: logps_N2[:, 0])
            rollouts = [replace(r, old_logps=each) for r, each in zip(rollouts, logps, strict=True)]
        for _ in range(self.policy_loss.num_iterations):
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

    def credited(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with advantages, and with weights and counts of both terms."""
        if self.teacher is None or not isinstance(self.kd, AsReward):
            return self._estimator(rollouts)
        gaps = self._of_rollouts(rollouts, lambda logps_N2: logps_N2[:, 1] - logps_N2[:, 0])
        beta = self.kd.coefficient(self.global_step)
        return self._estimator(rollouts, torch.tensor([beta * float(gap.sum()) for gap in gaps], dtype=torch.float64))

    @torch.no_grad()
    def _of_rollouts(self, rollouts: Sequence[Rollout], choose: Callable[[Tensor], Tensor]) -> list[np.ndarray]:
        """Something of every token's log-probabilities, rollout by rollout."""
        found: dict[int, np.ndarray] = {}
        for micro_batch in self.prepare_examples(rollouts).micro_batches:
            chosen_N = choose(self._token_logps(micro_batch.to(self.device))).cpu()
            for row, example in enumerate(micro_batch.examples):
                found[id(example)] = chosen_N[micro_batch.completion_N == row].numpy()
        return [found[id(rollout)] for rollout in rollouts]

    def _token_logps(self, micro_batch: Batch) -> Tensor:
        """(N, 2): log-probability of the target under the policy and under the teacher (0 without one)."""
        temperature, forward = self.rollout.sampling.temperature, self.forward_pass(micro_batch)
        signals = None if self.teacher is None else self.teacher.signals(micro_batch, temperature=temperature)

        def position(logits_CV: Tensor, targets_C: Tensor, *chunk: Tensor) -> Tensor:
            log_CV = tempered(logits_CV, temperature)
            own_C = target_logps(log_CV, targets_C)
            if signals is None:
                return torch.stack([own_C, torch.zeros_like(own_C)], dim=-1)
            teacher_C = target_logps(signals.compare(log_CV, *chunk).log_teacher_CW, targets_C)
            return torch.stack([own_C, teacher_C.to(own_C.dtype)], dim=-1)

        arguments = (forward.hidden_NH, micro_batch.targets_N, *(() if signals is None else signals.tensors))
        return chunked_head(position, forward.head, *arguments, chunk_size=self.chunk_size)

    def make_filler(self, batch: StepBatch) -> Batch:
        """A rollout without a weight."""
        zeros = np.zeros(len(batch.filler.token_ids))
        rollout = Rollout.of(batch.filler, advantages=zeros)
        return self._collate([replace(rollout, logprobs=zeros)], is_filler=True)

    def after_step(self) -> None:
        """Say when the sampler's probabilities are not the trainer's."""
        most = self.objective.mismatch.finish(self.global_step - 1, self.device)
        self.log("train/sampler_mismatch_max", most, batch_size=1)
