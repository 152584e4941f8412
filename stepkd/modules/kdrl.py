"""Reinforcement learning from rewards, with a teacher: GRPO, on-policy distillation, and both in one (KDRL).

A step reads top to bottom: :meth:`KDRLModule.prepare` samples groups and grades them
(:class:`~stepkd.modules.rollouts.GroupSampler`: ``Rollout.reward``), makes of the rewards an advantage for every token
(:meth:`KDRLModule.credit`: ``Rollout.advantages``), and cuts the rollouts into micro-batches for the loss
(:class:`~stepkd.modules.kdrl_objective.KDRLObjective`), which multiplies every token's ratio by its advantage. A
completion keeps its tokens and log-probabilities as arrays from the sampler to the loss.

Axes: R completions of this rank (groups whole), S their steps, N their tokens or those of a micro-batch, C of one
chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepkd.data.batching import StepBatch
from stepkd.data.collate import Batch
from stepkd.errors import ConfigError
from stepkd.losses import chunked_head, group_advantages, step_advantages, target_logps, tempered, token_normalisation
from stepkd.models.spec import PolicyConfig
from stepkd.modules.components import ForwardPass
from stepkd.modules.distillation import DistillationModule
from stepkd.modules.kdrl_objective import KDRLObjective, rollouts_of
from stepkd.modules.kdrl_settings import (
    AsAdvantage,
    ExactKL,
    KDConfig,
    PolicyLossConfig,
    RolloutConfig,
    SampledKL,
    SampleLogConfig,
    Steady,
    StepCreditConfig,
    Switch,
)
from stepkd.modules.policy_module import telling
from stepkd.modules.rewards import RewardConfig, Rewards
from stepkd.modules.rollouts import GroupSampler, Rollout, SampleLog
from stepkd.modules.step_scores import load_step_scorer, step_scores
from stepkd.runs.logger import JsonlLogger
from stepkd.sampling.config import IN_PROCESS, EngineConfig
from stepkd.scorers.scorer import StepScorer
from stepkd.teachers.config import Needs, TeacherConfig


class KDRLModule(DistillationModule):
    """KDRL (arXiv 2506.02208): ``J = J_GRPO - beta KL(pi || teacher)`` on the policy's own samples.

    Without a teacher it is GRPO and its kin; with ``policy_loss.weight: 0`` on-policy distillation by the reverse KL
    alone. No KL to a reference model: the teacher takes its place.

    A group is sampled and credited on one rank, whole. Denominators are counted after sampling and reduced over ranks.

    Args:
        policy: the model to train.
        rewards: weighted sum of reward functions; a name stands for itself with weight 1; null: the
            correct final answer. In Python also functions.
        teacher: the model that is distilled from; null: none.
        rollout: what is sampled.
        engine: where it is sampled: Transformers, VLLMServer or VLLM.
        policy_loss: the policy-gradient term.
        kd: the distillation: SampledKL, ExactKL or AsAdvantage.
        step_credit: rewards of steps beside those of answers; null: none.
        samples: what is kept of the rollouts to look at (``samples.jsonl``, in runs with a logger).
        **settings: optimizer, validation, micro_batch_tokens, chunk_size, loss_weights, seed: as for
            :class:`~stepkd.modules.base.StepModule`.
    """

    shown = ("train/reward", "train/length")
    shares = True
    skip_empty_steps = True
    prepares_with_model = True

    def __init__(
        self,
        policy: PolicyConfig,
        rewards: list[str | RewardConfig] | None = None,
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
        self.rollout_spec = rollout or RolloutConfig()
        self.engine = engine
        self.policy_loss = policy_loss or PolicyLossConfig()
        self.kd = kd or SampledKL()
        self.step_credit = step_credit
        self.samples = samples or SampleLogConfig()
        self.steps_per_batch = self.policy_loss.num_iterations
        self._check_settings(teacher)
        self.teacher = None if teacher is None else teacher.build()
        self.teacher_temperature = self.rollout_spec.sampling.temperature
        self.reads_targets = not isinstance(self.kd, ExactKL)
        self.new_tokens = self.rollout_spec.sampling.longest
        names = sorted(spec.name for spec in self.reward_specs)
        self.objective = KDRLObjective(self.policy_loss, self.kd, self.teacher_temperature, names)
        self.components = (self.objective,)

    def _check_settings(self, teacher: TeacherConfig | None) -> None:
        """What holds between settings of different parts, so that the type of none of them can say it."""
        if teacher is not None:
            reads = "KDRL reads the teacher's probability of every sampled token"
            needs: Needs = {"fresh": reads, "targets": reads, "other": "KDRL distils from another model"}
            if isinstance(self.kd, ExactKL):
                needs["whole"] = "kd: ExactKL sums over the teacher's whole distribution (SampledKL reads one token)"
            if (temperature := self.rollout_spec.sampling.temperature) != 1:
                needs["tempered"] = f"rollout.sampling.temperature={temperature:g} tempers the teacher, too"
            teacher.require(needs)
        weight, n = self.policy_loss.weight, self.rollout_spec.sampling.n
        equal_groups, schedule = self.policy_loss.equal_groups, type(self.kd.schedule).__name__
        distils = teacher is not None and self.kd.beta > 0 and isinstance(self.kd.schedule, Steady)
        as_advantage = teacher is not None and isinstance(self.kd, AsAdvantage)
        mistakes = {
            "rewards: give at least one, for instance {name: accuracy}": not self.reward_specs,
            "kd.schedule: Switch distils first, and there is no teacher: give one, for instance Local": (
                isinstance(self.kd.schedule, Switch) and teacher is None
            ),
            f"kd: AsAdvantage distils through the policy-gradient term, which policy_loss.weight {weight} or "
            f"equal_groups: {equal_groups} changes or switches off: set kd: SampledKL": (
                as_advantage and (weight != 1 or equal_groups == "drop")
            ),
            f"policy_loss.weight=0 with teacher {teacher}, kd.beta={self.kd.beta}, kd.schedule {schedule}: nothing "
            "would be left to learn from": weight == 0 and not distils,
            "policy_loss.weight=0 has no use for step_credit and rollout.dynamic_sampling: drop them": (
                weight == 0 and bool(self.step_credit or self.rollout_spec.dynamic_sampling)
            ),
            f"rollout.sampling.n={n}: an advantage compares the completions of a prompt and needs at least 2; for "
            "distillation alone set policy_loss.weight: 0": weight > 0 and n < 2,
        }
        for mistake, is_made in mistakes.items():
            if is_made:
                raise ConfigError(mistake)

    # ---- model -----------------------------------------------------------------------------------------------------

    @cached_property
    @telling
    def sampler(self) -> GroupSampler:
        """Samples and grades."""
        rewards = Rewards(self.reward_specs, self.sampled_accuracy.grader)
        return GroupSampler(self.rollout_spec, self.sampling_engine, self.model, rewards, self.phases, self.seed)

    @cached_property
    @telling
    def step_scorer(self) -> StepScorer | None:
        """Scores the steps that are credited; None: none are."""
        if self.step_credit is None:
            return None
        return load_step_scorer(self.step_credit.scorer, "step_credit.scorer", device=str(self.device))

    def begin(self) -> None:
        """Load what rewards and credits, so that a mistake there is said before anything is sampled."""
        _ = self.sampler, self.step_scorer
        own = [each for each in self.trainer.loggers if isinstance(each, JsonlLogger)] or self.trainer.loggers
        folder = own[-1].save_dir if own else None
        self._sample_log = SampleLog(self.samples, folder, self.rollout_spec.sampling.longest)

    def distils(self, micro_batch: Batch) -> bool:
        """Of rollouts; the data's own solutions, in validation, are not distilled on."""
        return bool(rollouts_of(micro_batch))

    # ---- batches ---------------------------------------------------------------------------------------------------

    def reads(self, split: str) -> dict[tuple[str, ...], str]:
        """In training what the rewards read, and answers where correct completions are not distilled on."""
        if split != "train":
            return super().reads(split)
        needs = {spec.reads(): f"the reward {spec.name!r} reads it" for spec in self.reward_specs if spec.reads()}
        graded = {("answer",): f"kd.mask: {self.kd.mask} grades answers"}
        return needs if self.kd.mask == "none" else needs | graded

    def choices(self, split: str) -> Mapping[str, Collection[str]]:
        """In training alone, as validation does not distil."""
        return super().choices(split) if split == "train" else {}

    def prepare(self, batch: StepBatch) -> Iterator[list[Batch]]:
        """Sample groups, grade and credit them, and yield ``num_iterations`` optimiser steps of them."""
        rollouts = self.credit(self.sample(batch))
        self._sample_log(self.global_step, rollouts, self.device, writes=self.trainer.is_global_zero)
        if self.policy_loss.num_iterations > 1:
            rollouts = self._with_old_logps(rollouts)
        for _ in range(self.policy_loss.num_iterations):
            self.objective.at_step(self.global_step)
            yield self.prepare_examples(rollouts)

    def sample(self, batch: StepBatch) -> list[Rollout]:
        """Graded completions of the batch's prompts, group after group.

        Args:
            batch: this rank's share; its examples give the prompts.

        Returns:
            Rollouts with rewards and steps, not credited yet.
        """
        from transformers import TrainerState

        rewards, step, epoch = self.sampler.rewards, self.global_step, self.position.epoch
        rewards.trainer_state = TrainerState(epoch=epoch, global_step=step, max_steps=self.planned_steps() or 0)
        found = self.sampler(batch, step, epoch)
        self.log("perf/reward_seconds", sum(rewards.seconds.values()), batch_size=1)
        self.log_dict({f"train/{name}": value for name, value in rewards.logged(self.device).items()}, batch_size=1)
        return found

    def credit(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Give every token of rollouts its advantage, and every rollout its weights in both sums.

        A token's advantage is that of its completion's reward within the group; where steps are credited, it is
        ``outcome_weight`` times that plus ``weight`` times the advantage of its step. A rollout whose reward is NaN has
        no advantage of it.

        Args:
            rollouts: whole groups, in any order.

        Returns:
            The same rollouts, with ``advantages``, ``step_scores``, and weight and count in ``pg`` and ``kd``: 0 for
            those that are left out (truncated ones with ``mask``, groups without an advantage with ``drop``, correct
            ones by ``kd.mask``).
        """
        if not rollouts:
            return []
        group_R = torch.tensor([rollout.group for rollout in rollouts])
        length_R = torch.tensor([len(rollout.token_ids) for rollout in rollouts])
        counted_R = torch.tensor([not (r.cut_off and self.rollout_spec.truncated == "mask") for r in rollouts])
        reward_R = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
        known_R = ~reward_R.isnan()  # one without a reward has no advantage, and no part in its group's mean
        outcome_R = torch.zeros_like(reward_R)
        outcome_R[known_R] = group_advantages(reward_R[known_R], group_R[known_R], kind=self.policy_loss.advantage)
        advantage_N = outcome_R.repeat_interleave(length_R)
        scores: Sequence[Sequence[float]] = [()] * len(rollouts)
        if self.step_credit is not None and self.step_scorer is not None:
            scores = step_scores(self.step_scorer, [r.row for r in rollouts], [r.steps for r in rollouts])
            steps_N = _of_steps(rollouts, scores, group_R, self.step_credit.discount)
            advantage_N = self.step_credit.outcome_weight * advantage_N + self.step_credit.weight * steps_N
        kept_R = counted_R
        if self.policy_loss.equal_groups == "drop":
            # groups in which some token has an advantage
            kept_R = counted_R & torch.isin(group_R, group_R.repeat_interleave(length_R)[advantage_N != 0])
        pg_R2 = self._normalised(length_R, group_R, kept_R)
        kd_R2 = self._normalised(length_R, group_R, counted_R) * (self.teacher is not None)
        correct_R = torch.tensor([bool(rollout.correct) for rollout in rollouts])
        if self.teacher is not None and self.kd.mask != "none":
            left_out_R = correct_R if self.kd.mask == "response" else torch.isin(group_R, group_R[correct_R])
            kd_R2[:, 0] *= ~left_out_R
        names = ("pg_weight", "pg_count", "kd_weight", "kd_count")
        weights_R4 = torch.cat([pg_R2, kd_R2], dim=1).tolist()
        credited = zip(rollouts, scores, advantage_N.split(length_R.tolist()), weights_R4, strict=True)
        return [
            replace(rollout, step_scores=tuple(own), advantages=each.numpy(), **dict(zip(names, weights, strict=True)))
            for rollout, own, each, weights in credited
        ]

    def _normalised(self, length_R: Tensor, group_R: Tensor, kept_R: Tensor) -> Tensor:
        """(R, 2) weight and count of every completion, 0 for those left out."""
        longest, normalised_R2 = self.rollout_spec.sampling.longest, torch.zeros(len(length_R), 2, dtype=torch.float64)
        found = token_normalisation(
            self.policy_loss.normalisation, length_R[kept_R], group_R[kept_R], max_length=longest
        )
        normalised_R2[kept_R] = torch.stack(found, dim=-1)
        return normalised_R2

    @torch.no_grad()
    def _with_old_logps(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with what the policy says of every token before the first of several optimiser steps."""

        def tempered_logps(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
            return target_logps(tempered(logits_CV, self.teacher_temperature), targets_C)

        old: dict[int, np.ndarray] = {}
        for micro_batch in self.prepare_examples(rollouts):
            forward = ForwardPass(self.model, micro_batch.to(self.device), self.chunk_size)
            arguments = (forward.head, forward.hidden_NH, forward.batch.targets_N)
            logps_N = chunked_head(tempered_logps, *arguments, chunk_size=self.chunk_size).cpu()
            for row, example in enumerate(micro_batch.examples):
                old[id(example)] = logps_N[micro_batch.completion_N == row].numpy()
        return [replace(rollout, old_logps=old[id(rollout)]) for rollout in rollouts]

    def make_dummy(self, batch: StepBatch) -> Batch:
        """A rollout without a weight."""
        zeros = np.zeros(len(batch.dummy.token_ids))
        rollout = Rollout.of(batch.dummy, advantages=zeros, logprobs=zeros)
        return self._collate([rollout], is_dummy=True)

    def after_step(self, metrics: dict[str, float]) -> None:
        """Say when the sampler's probabilities are not the trainer's."""
        most = self.objective.largest_mismatch(self.global_step - 1, self.device)
        self.log("train/sampler_mismatch_max", most, batch_size=1)


def _of_steps(
    rollouts: Sequence[Rollout], scores: Sequence[Sequence[float]], group_R: Tensor, discount: float
) -> Tensor:
    """(N,) advantages of tokens by the scores of their steps; those behind the last scored step have 0."""
    ends = [[*r.step_ends[: len(own)].tolist(), len(r.token_ids)] for r, own in zip(rollouts, scores, strict=True)]
    length_S = torch.tensor([end - start for own in ends for start, end in pairwise([0, *own])])
    score_S = torch.tensor([score for own in scores for score in (*own, math.nan)], dtype=torch.float64)
    completion_S = torch.repeat_interleave(torch.tensor([len(own) for own in ends]))
    return step_advantages(score_S, completion_S, group_R, discount=discount).repeat_interleave(length_S)
