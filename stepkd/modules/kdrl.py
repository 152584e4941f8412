"""Reinforcement learning from rewards, with a teacher: GRPO, on-policy distillation, and both in one (KDRL).

Axes: R completions of this rank, N completion tokens of a micro-batch, C of one chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stepkd.data.batching import StepBatch
from stepkd.data.collate import Batch
from stepkd.errors import ConfigError
from stepkd.losses import (
    LossTerms,
    chunked_head,
    cross_entropy,
    fused_sum,
    target_logps,
    tempered,
)
from stepkd.models.spec import PolicyConfig
from stepkd.modules.base import Prepared
from stepkd.modules.gkd import TaughtModule
from stepkd.modules.kdrl_objective import Mismatch, TokenObjective, TokenTerms, Weigher
from stepkd.modules.rewards import GivenReward, RewardConfig, Rewards
from stepkd.modules.rollouts import GroupSampler, Rollout, SampleLog
from stepkd.modules.settings import KDConfig, PolicyLossConfig, RolloutConfig, SampleLogConfig, StepCreditConfig
from stepkd.modules.step_scores import load_step_scorer
from stepkd.teachers.local import LocalTeacher, TeacherConfig
from stepkd.teachers.signals import Signals


class KDRLModule(TaughtModule):
    """KDRL (arXiv 2506.02208): ``J = J_GRPO - beta KL(pi || teacher)`` on the policy's own samples.

    Without a teacher it is GRPO and its kin; with ``policy_loss.weight: 0`` on-policy distillation by the reverse KL
    alone. No KL to a reference model: the teacher takes its place.

    A group is sampled and weighed on one rank, whole. Denominators are counted after sampling and reduced over ranks.
    Dropout is off, so that the policy that samples is the one that learns.

    Args:
        policy: the model to train.
        rewards: weighted sum of reward functions; null: the right final answer. In Python also names and functions.
        teacher: the model that is distilled from; null: none.
        rollout: what is sampled.
        policy_loss: the policy-gradient term.
        kd: the distillation term.
        step_credit: rewards of steps beside those of answers; null: none.
        samples: what is kept of the rollouts to look at (``samples.jsonl``, in runs with a logger).
        **settings: optimizer, validation, micro_batch_tokens, chunk_size, loss_weights, ema_decay, seed: as for
            :class:`~stepkd.modules.base.StepModule`.
    """

    loss_names = ("pg", "kd")
    shown = ("train/reward", "train/length")
    skip_empty_steps = True
    prepares_with_model = True

    def __init__(
        self,
        policy: PolicyConfig,
        rewards: list[GivenReward] | None = None,
        teacher: TeacherConfig | None = None,
        rollout: RolloutConfig | None = None,
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
        self.policy_loss = policy_loss or PolicyLossConfig()
        self.kd = kd or KDConfig()
        self.step_credit = step_credit
        self.samples = samples or SampleLogConfig()
        self.steps_per_batch = self.policy_loss.inner_steps
        self._check_settings(teacher)
        self.teacher = None if teacher is None else LocalTeacher(teacher)
        self._mismatch = Mismatch()

    def _check_settings(self, teacher: TeacherConfig | None) -> None:
        if not self.reward_specs:
            raise ConfigError("rewards: give at least one, for instance {name: accuracy}")
        if teacher is None and self.policy_loss.weight == 0:
            raise ConfigError("policy_loss.weight=0 and no teacher: there is nothing to learn from")
        if self.policy_loss.weight == 0 and (self.kd.beta == 0 or self.kd.schedule == "switch"):
            raise ConfigError(
                f"policy_loss.weight=0 with kd.beta={self.kd.beta}, schedule: {self.kd.schedule}: nothing would be "
                "left to learn from"
            )
        if self.policy_loss.weight == 0 and (self.step_credit is not None or self.rollout.resample):
            raise ConfigError("policy_loss.weight=0 has no use for step_credit and rollout.resample: drop them")
        if teacher is None and self.kd.schedule == "switch":
            raise ConfigError("kd.schedule: switch distils first, and there is no teacher: give teacher.path")
        if teacher is not None and teacher.path is None:
            raise ConfigError("teacher: KDRL scores fresh samples with another model: give teacher.path")
        if teacher is not None and self.kd.form != "joint":
            for setting, clashes in (
                ("a policy_loss.weight other than 1", self.policy_loss.weight != 1),
                ("policy_loss.equal_groups: drop", self.policy_loss.equal_groups == "drop"),
                ("kd.schedule: switch", self.kd.schedule == "switch"),
            ):
                if clashes:
                    raise ConfigError(
                        f"kd.form={self.kd.form} teaches through the policy-gradient term, which {setting} changes or "
                        "switches off: set kd.form: joint"
                    )
        if self.policy_loss.weight and self.rollout.group_size < 2:
            raise ConfigError(
                f"rollout.group_size={self.rollout.group_size}: an advantage compares the completions of a prompt and "
                "needs at least 2; for distillation alone set policy_loss.weight: 0"
            )

    # ---- model -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Load what rewards and credits, so that a mistake there is said before anything is sampled."""
        super().on_fit_start()
        rewards = Rewards(self.reward_specs, self._sampled().grader)
        self._groups = GroupSampler(self.rollout, self.model, rewards, self.phases, self.seed)
        scorer = None
        if self.step_credit is not None:
            scorer = load_step_scorer(self.step_credit.scorer, "step_credit.scorer", device=str(self.device))
        self._weigher = Weigher(
            self.rollout,
            self.policy_loss,
            self.kd,
            self.step_credit,
            distils=self.teacher is not None,
            tokenizer=self.tokenizer,
            scorer=scorer,
        )
        folder = None if self.trainer.logger is None else self.trainer.logger.save_dir
        self._sample_log = SampleLog(self.samples, folder, self.rollout.max_new_tokens, self.tokenizer)

    def new_tokens(self) -> int:
        """Those of a rollout."""
        return self.rollout.max_new_tokens

    # ---- batches ---------------------------------------------------------------------------------------------------

    def reads(self, split: str) -> dict[tuple[str, ...], str]:
        """In training what the rewards read, and answers where right completions are not distilled on."""
        if split != "train":
            return super().reads(split)
        needs = {spec.reads(): f"the reward {spec.name!r} reads it" for spec in self.reward_specs if spec.reads()}
        return needs if self.kd.mask == "none" else needs | {("answer",): f"kd.mask: {self.kd.mask} grades answers"}

    def prepare(self, batch: StepBatch) -> Iterator[Prepared]:
        """Sample groups, reward and weigh them, and yield ``inner_steps`` optimiser steps of them."""
        rollouts = self.weighed(self.sampled(batch))
        self._sample_log(self.global_step, rollouts, self.device, writes=self.trainer.is_global_zero)
        if self.policy_loss.inner_steps > 1:
            logps = self._of_rollouts(rollouts, lambda logps_N2: logps_N2[:, 0])
            rollouts = [replace(r, old_logps=tuple(each.tolist())) for r, each in zip(rollouts, logps, strict=True)]
        for _ in range(self.policy_loss.inner_steps):
            yield self.prepare_examples(rollouts)

    def sampled(self, batch: StepBatch) -> list[Rollout]:
        """Rewarded completions of the batch's prompts, group after group."""
        from transformers import TrainerState

        rewards, step, epoch = self._groups.rewards, self.global_step, self.position.epoch
        rewards.trainer_state = TrainerState(epoch=epoch, global_step=step, max_steps=self.planned_steps() or 0)
        found = self._groups(batch, step, epoch)
        self.log("perf/reward_seconds", sum(rewards.seconds.values()), batch_size=1)
        self.log_dict({f"train/{name}": value for name, value in rewards.logged(self.device).items()}, batch_size=1)
        return found

    def weighed(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with advantages, and with weights and counts of both terms."""
        if self.teacher is None or self.kd.form != "reward":
            return self._weigher(rollouts)
        gaps = self._of_rollouts(rollouts, lambda logps_N2: logps_N2[:, 1] - logps_N2[:, 0])
        beta = self.kd.coefficient(self.global_step)
        return self._weigher(rollouts, torch.tensor([beta * float(gap.sum()) for gap in gaps], dtype=torch.float64))

    @torch.no_grad()
    def _of_rollouts(self, rollouts: Sequence[Rollout], choose: Any) -> list[Tensor]:
        """Something of every token's log-probabilities, rollout by rollout."""
        found: dict[int, Tensor] = {}
        for micro_batch in self.prepare_examples(rollouts).micro_batches:
            chosen_N = choose(self._token_logps(micro_batch.to(self.device))).cpu()
            for row, example in enumerate(micro_batch.examples):
                found[id(example)] = chosen_N[micro_batch.completion_N == row]
        return [found[id(rollout)] for rollout in rollouts]

    def make_filler(self, batch: StepBatch) -> Batch:
        """A rollout without a weight."""
        zeros = (0.0,) * len(batch.filler.completion_ids)
        return self._collate([Rollout.of(batch.filler, advantages=zeros, sampled_logps=zeros)], is_filler=True)

    def prepare_evaluation(self, batch: StepBatch) -> Prepared:
        """Given solutions, every token weighing the same."""
        prepared = super().prepare_evaluation(batch)
        return Prepared(prepared.micro_batches, {"pg": float(sum(len(m.targets_N) for m in prepared.micro_batches))})

    # ---- loss ------------------------------------------------------------------------------------------------------

    def count(self, micro_batch: Batch) -> dict[str, float]:
        """Denominators of both terms, as the normalisation has them."""
        rollouts = [each for each in micro_batch.examples if isinstance(each, Rollout)]
        counts = {"pg": [r.pg_count for r in rollouts], "kd": [r.kd_count for r in rollouts]}
        if self.policy_loss.normalisation == "bnpo":
            return {name: float(any(values)) for name, values in counts.items()}
        return {name: math.fsum(values) for name, values in counts.items()}

    def loss_terms(self, micro_batch: Batch) -> LossTerms:
        """``pg``: the clipped objective; ``kd``: beta times the divergence from the teacher. Both summed by token.

        On given solutions (validation) there is nothing to weigh: ``pg`` is their cross-entropy, to look at.
        """
        if not all(isinstance(example, Rollout) for example in micro_batch.examples):
            hidden_NH = self.needed_hidden(micro_batch)
            ce = cross_entropy(self.model.head, hidden_NH, micro_batch.targets_N, chunk_size=self.chunk_size).sums["ce"]
            return LossTerms({"pg": ce, "kd": ce * 0.0})
        signals = self._signals(micro_batch)
        objective = TokenObjective(
            self.policy_loss, self.kd, self.rollout.temperature, self.global_step, self.loss_scales, signals
        )
        constants = objective.constants(micro_batch, self._distilled(micro_batch.targets_N))
        _, old_N, sampled_N, *_ = constants
        loss, columns_NM = fused_sum(
            objective,
            self.model.head,
            self.needed_hidden(micro_batch),
            torch.ones_like(sampled_N),
            micro_batch.targets_N,
            *constants,
            *(() if signals is None else signals.tensors),
            chunk_size=self.chunk_size,
        )
        found = TokenTerms(*columns_NM.unbind(-1))
        gap_N = sampled_N - torch.where(old_N.isnan(), found.logps_N, old_N)
        if self.training and not micro_batch.is_filler:
            self._mismatch.add(gap_N)
        return LossTerms(
            {"pg": found.pg_N.sum(), "kd": found.kd_N.sum()}, self._metrics(micro_batch, found, gap_N), loss
        )

    def _distilled(self, targets_N: Tensor) -> Tensor:
        """1 for tokens that may count in the distillation term."""
        eos = sorted(self.model.eos_ids) if self.kd.skip_eos else []
        return (~torch.isin(targets_N, torch.tensor(eos, dtype=targets_N.dtype, device=targets_N.device))).double()

    def _signals(self, micro_batch: Batch) -> Signals | None:
        return None if self.teacher is None else self.teacher.signals(micro_batch, temperature=self.rollout.temperature)

    def _token_logps(self, micro_batch: Batch) -> Tensor:
        """(N, 2): log-probability of the target under the policy and under the teacher (0 without one)."""
        signals = self._signals(micro_batch)

        def position(logits_CV: Tensor, targets_C: Tensor, *chunk: Tensor) -> Tensor:
            log_CV = tempered(logits_CV, self.rollout.temperature)
            own_C = target_logps(log_CV, targets_C)
            if signals is None:
                return torch.stack([own_C, torch.zeros_like(own_C)], dim=-1)
            teacher_C = target_logps(signals.compare(log_CV, *chunk).log_teacher_CW, targets_C)
            return torch.stack([own_C, teacher_C.to(own_C.dtype)], dim=-1)

        tensors = () if signals is None else signals.tensors
        arguments = (self.needed_hidden(micro_batch), micro_batch.targets_N, *tensors)
        return chunked_head(position, self.model.head, *arguments, chunk_size=self.chunk_size)

    # ---- what is logged --------------------------------------------------------------------------------------------

    def _metrics(self, micro_batch: Batch, found: TokenTerms, gap_N: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        rollouts: list[Any] = list(micro_batch.examples)
        number = gap_N.new_tensor(float(len(gap_N)))

        def of_rows(values: Sequence[float | None]) -> tuple[Tensor, Tensor]:
            known = [value for value in values if value is not None and not math.isnan(value)]
            return gap_N.new_tensor(float(sum(known))), gap_N.new_tensor(float(len(known)))

        metrics = {
            "reward": of_rows([rollout.reward for rollout in rollouts]),
            "accuracy": of_rows([rollout.correct for rollout in rollouts]),
            "length": of_rows([len(rollout.completion_ids) for rollout in rollouts]),
            "cut_off": of_rows([rollout.cut_off for rollout in rollouts]),
            "no_signal": of_rows([not any(rollout.advantages) for rollout in rollouts]),
            "entropy": (found.entropy_N.sum(), number),
            "clip_low": (found.low_N.sum(), number),
            "clip_high": (found.high_N.sum(), number),
            "sampler_mismatch": (gap_N.abs().sum(), number),
            "sampler_kl": (gap_N.sum(), number),
        }
        names = sorted({name for rollout in rollouts for name in rollout.parts} | {s.name for s in self.reward_specs})
        metrics |= {f"reward/{name}": of_rows([r.parts.get(name) for r in rollouts]) for name in names}
        if self.teacher is not None:
            metrics["kl_to_teacher"] = ((found.logps_N - found.teacher_N).sum(), number)
            metrics["distilled"] = of_rows([rollout.kd_weight > 0 for rollout in rollouts])
        return metrics

    def after_step(self) -> None:
        """Say when the sampler's probabilities are not the trainer's."""
        most = self._mismatch.finish(self.global_step - 1, self.device)
        self.log("train/sampler_mismatch_max", most, batch_size=1)
