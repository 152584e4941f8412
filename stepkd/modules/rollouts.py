"""Groups of sampled completions: drawn from a policy, rewarded, what the loss needs of every token, and what is kept.

``samples.jsonl`` in the run folder has some of them every so many optimiser steps, step by step, and the lengths of
all; ``stepkd samples RUN`` shows it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from stepkd.data.batching import StepBatch
from stepkd.data.encode import Example, with_completion
from stepkd.errors import DataError, disk_error
from stepkd.models.policy import Policy
from stepkd.modules.distributed import all_reduce
from stepkd.modules.rewards import Rewards
from stepkd.modules.settings import RolloutConfig, SampleLogConfig, SourceConfig
from stepkd.modules.step_scores import step_texts
from stepkd.runs.logger import append, ends_torn
from stepkd.runs.process import STOP_REQUEST
from stepkd.runs.progress import PhaseTracker
from stepkd.sampling.engines import Engine
from stepkd.sampling.sampler import Sampler
from stepkd.steps.segment import get_segmenter

SAMPLES_FILE = "samples.jsonl"
BINS = 16
"""Bars of the histogram of lengths, from 0 to the longest completion that is allowed."""


@dataclass(frozen=True)
class Rollout(Example):
    """A sampled completion with all that its loss needs; one number per token where there are several."""

    group: int = 0
    """Number of its prompt in the rank's share of the batch."""
    text: str = ""
    """Its text as the sampler has it."""
    reward: float = 0.0
    """Sum of its rewards, less what its length costs; NaN where every reward passes it over."""
    parts: Mapping[str, float | None] = field(default_factory=dict, compare=False)
    """Reward -> its value, before weights; None where it passes it over."""
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What reward functions said of it by ``log_extra``."""
    correct: bool | None = None
    """Whether its final answer is right; None without a gold answer."""
    cut_off: bool = False
    """Whether it was cut off."""
    step_scores: tuple[float, ...] = field(default=(), compare=False)
    """Scores of its steps, where step credit gives some; NaN for a step without one."""
    advantages: tuple[float, ...] = field(default=(), compare=False)
    """Advantage of every token."""
    sampled_logps: tuple[float, ...] = field(default=(), compare=False)
    """What the sampler said of every token, at its temperature."""
    old_logps: tuple[float, ...] | None = field(default=None, compare=False)
    """What the policy said of them before the first of several optimiser steps."""
    pg_weight: float = 0.0
    """Weight of its tokens in the policy-gradient sum."""
    pg_count: float = 0.0
    """What it adds to that sum's denominator."""
    kd_weight: float = 0.0
    """Weight of its tokens in the distillation sum."""
    kd_count: float = 0.0
    """What it adds to that sum's denominator."""

    @classmethod
    def of(cls, example: Example, **more: Any) -> Rollout:
        """An example with what is known of it as a rollout."""
        own: dict[str, Any] = {each.name: getattr(example, each.name) for each in fields(Example)}
        return cls(**{**own, **more})


class TrainingSampler:
    """Samples the policy that is trained, by an engine whose weights follow it. A stop breaks it off.

    Args:
        policy: the model.
        spec: its engine and how it draws.
        seed: keys the noise.
    """

    def __init__(self, policy: Policy, spec: RolloutConfig | SourceConfig, seed: int) -> None:
        self.policy, self.spec, self.seed = policy, spec, seed
        self._engine: Engine | None = None

    def __call__(self, step: int) -> Sampler:
        """The sampler, with the policy's weights as they are before an optimiser step."""
        if self._engine is None:
            self._engine = self.spec.engine.build(self.policy, self.spec.sampling(self.seed), STOP_REQUEST.__bool__)
        self._engine.refresh(step)
        return self._engine


class GroupSampler:
    """Draws groups from a policy and rewards them.

    Args:
        spec: what is sampled.
        policy: the model.
        rewards: what a completion is worth.
        phases: told how far it is.
        seed: keys the noise, with step and problem.
    """

    def __init__(self, spec: RolloutConfig, policy: Policy, rewards: Rewards, phases: PhaseTracker, seed: int) -> None:
        self.spec = spec
        self.policy = policy
        self.rewards = rewards
        self.phases = phases
        self.seed = seed
        self._sampler = TrainingSampler(policy, spec, seed)
        self._segmenter = get_segmenter(spec.segmenter)

    def __call__(self, batch: StepBatch, step: int, epoch: int) -> list[Rollout]:
        """Rewarded completions of the batch's prompts, group after group; equal groups are drawn anew on request.

        Args:
            batch: this rank's prompts.
            step, epoch: key the noise; a step that was skipped has another epoch when its prompts come again.

        Raises:
            TrainingError: a reward function that fails.
        """
        groups: dict[int, list[Rollout]] = {}
        waiting = list(range(len(batch.examples)))
        for attempt in range(self.spec.resample + 1):
            drawn = self._draw(batch, waiting, step, f"kdrl {epoch} {attempt}")
            groups |= dict(zip(waiting, drawn, strict=True))
            waiting = [i for i in waiting if len({r.reward for r in groups[i] if not math.isnan(r.reward)}) < 2]
            if not waiting:
                break
        return [rollout for number in sorted(groups) for rollout in groups[number]]

    def _draw(self, batch: StepBatch, numbers: Sequence[int], step: int, purpose: str) -> list[list[Rollout]]:
        examples = [batch.examples[i] for i in numbers]
        sampler = self._sampler(step)
        size = self.spec.group_size
        with self.phases.phase("rollout", total=len(examples) * size):
            drawn = sampler.sample(
                [example.prompt_ids for example in examples],
                self.spec.sampling(self.seed),
                purpose=purpose,
                step=step,
                indices=[batch.indices[i] for i in numbers],
                on_progress=self.phases.advance,
            )
        rollouts = [
            Rollout.of(
                with_completion(example, sample.token_ids, self.policy.tokenizer, self._segmenter),
                group=number,
                text=sample.text,
                sampled_logps=tuple(sample.logprobs.tolist()),
                cut_off=sample.finish == "length",
            )
            for number, example, group in zip(numbers, examples, drawn, strict=True)
            for sample in group
        ]
        with self.phases.phase("rewards", total=len(rollouts)):
            rewarded = self._rewarded(rollouts)
        return [rewarded[i : i + size] for i in range(0, len(rewarded), size)]

    def _rewarded(self, rollouts: list[Rollout]) -> list[Rollout]:
        if not rollouts:
            return []
        columns = self._columns(rollouts)
        ids = [f"{rollout.id}/{i % self.spec.group_size}" for i, rollout in enumerate(rollouts)]
        totals, parts = self.rewards(columns, ids)
        known = "answer" in columns
        right = parts.get("accuracy") or (self.rewards.correct(columns) if known else [None] * len(rollouts))
        extra = {name: each for name, each in self.rewards.extra.items() if len(each) == len(rollouts)}
        return [
            replace(
                rollout,
                reward=total - self.spec.punishment(len(rollout.completion_ids)),
                parts={name: values[i] for name, values in parts.items()},
                extra={name: values[i] for name, values in extra.items()},
                correct=None if right[i] is None else bool(right[i]),
            )
            for i, (rollout, total) in enumerate(zip(rollouts, totals, strict=True))
        ]

    def _columns(self, rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
        """What reward functions get: TRL's arguments, ``steps``, ``cut_off``, ``rows``, and what all rows have."""
        shared = set.intersection(*(set(rollout.row) for rollout in rollouts))
        shared -= {"answer"} if any(rollout.row.get("answer") is None for rollout in rollouts) else set()
        columns: dict[str, list[Any]] = {name: [r.row[name] for r in rollouts] for name in shared}
        return columns | {
            "prompts": [rollout.row.get("prompt") for rollout in rollouts],
            "completions": [rollout.text for rollout in rollouts],
            "completion_ids": [list(rollout.completion_ids) for rollout in rollouts],
            "steps": [step_texts(self.policy.tokenizer, rollout) for rollout in rollouts],
            "cut_off": [rollout.cut_off for rollout in rollouts],
            "rows": [rollout.row for rollout in rollouts],
        }


class SampleLog:
    """Writes rollouts of one step in so many.

    Args:
        spec: how often, how many.
        folder: where the file goes; None: nowhere.
        longest: tokens of the longest completion that is allowed.
        tokenizer: the policy's.
    """

    def __init__(self, spec: SampleLogConfig, folder: str | Path | None, longest: int, tokenizer: Any) -> None:
        self.spec = spec
        self.path = None if folder is None else Path(folder) / SAMPLES_FILE
        self.longest = longest
        self.tokenizer = tokenizer

    def __call__(self, step: int, rollouts: Sequence[Rollout], device: torch.device, *, writes: bool) -> None:
        """Write an entry when it is time. All ranks call it, and one of them writes: its own samples, all lengths.

        Args:
            step: optimiser steps taken.
            rollouts: this rank's, weighed, group after group.
            device: where messages between ranks live.
            writes: whether this rank is the one.
        """
        if self.path is None or step % self.spec.every:
            return
        counts = {f"bin{i}": 0.0 for i in range(BINS)}
        for rollout in rollouts:
            place = math.ceil(len(rollout.completion_ids) * BINS / self.longest) - 1
            counts[f"bin{min(max(place, 0), BINS - 1)}"] += 1
        totals = all_reduce(counts, device)
        if not writes:
            return
        edges = [round(i * self.longest / BINS, 3) for i in range(BINS + 1)]
        entry = {
            "step": step,
            "lengths": {"edges": edges, "counts": [int(totals[name]) for name in counts]},
            "samples": [self._sample(rollout) for rollout in self._chosen(rollouts)],
        }
        try:
            start = "\n" if self.path.exists() and ends_torn(self.path) else ""
            with open(self.path, "ab", buffering=0) as stream:
                append(stream, start + json.dumps(entry, default=str) + "\n")
        except OSError as error:
            raise disk_error(error, self.path, "The samples before are intact. ") or error from None

    def _chosen(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """One completion of every group, then another one, until there are enough."""
        rank_of: dict[int, int] = {}
        order = []
        for i, rollout in enumerate(rollouts):
            nth = rank_of[rollout.group] = rank_of.get(rollout.group, -1) + 1
            order.append((nth, i))
        return [rollouts[i] for _, i in sorted(order)[: self.spec.number]]

    def _sample(self, rollout: Rollout) -> dict[str, Any]:
        return {
            "id": rollout.id,
            "prompt": rollout.row.get("prompt"),
            "answer": rollout.row.get("answer"),
            "steps": step_texts(self.tokenizer, rollout),
            "step_scores": [None if math.isnan(score) else score for score in rollout.step_scores],
            "reward": None if math.isnan(rollout.reward) else rollout.reward,
            "rewards": dict(rollout.parts),
            "correct": rollout.correct,
            "cut_off": rollout.cut_off,
            "tokens": len(rollout.completion_ids),
            **({"extra": dict(rollout.extra)} if rollout.extra else {}),
        }


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """Entries of a run's samples, by step; where a step was taken twice (after a crash), the newest.

    Args:
        path: ``samples.jsonl``, or the run folder that holds it.

    Raises:
        DataError: there is no such file, or nothing whole in it.
    """
    path = Path(path)
    path = path / SAMPLES_FILE if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"no samples here; GRPO and KDRL runs write {SAMPLES_FILE} into their --out", path=path)
    entries: dict[int, dict[str, Any]] = {}
    with open(path, encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                entry = json.loads(line)
            except ValueError:  # torn by a crash
                continue
            if isinstance(entry, Mapping) and isinstance(entry.get("step"), int) and "samples" in entry:
                entries[entry["step"]] = dict(entry)
    if not entries:
        raise DataError("not one whole entry in this file", path=path)
    return [entries[step] for step in sorted(entries)]
