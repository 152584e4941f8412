"""Groups of sampled completions: drawn from a policy, graded, credited by token, and what is kept to look at.

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

import numpy as np
import torch

from stepkd.data.batching import StepBatch
from stepkd.data.completion import Completion, Numbers
from stepkd.data.io import SAMPLES_FILE
from stepkd.errors import disk_error
from stepkd.models.policy import Policy
from stepkd.modules.distributed import all_reduce
from stepkd.modules.kdrl_settings import RolloutConfig, SampleLogConfig
from stepkd.modules.rewards import Rewards
from stepkd.modules.step_scores import without_blank_end
from stepkd.runs.logger import append, open_to_append
from stepkd.runs.progress import PhaseTracker
from stepkd.sampling.engine import Engine, is_stand_in
from stepkd.steps.segment import get_segmenter, segment, step_ends
from stepkd.steps.text import text_from_ids

BINS = 16
"""Bars of the histogram of lengths, from 0 to the longest completion that is allowed."""
_NONE = np.zeros(0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Rollout(Completion):
    """A completion that was sampled to learn from, with its grades, and with its credit by token once it has one."""

    group: int = 0
    """Number of its prompt in the rank's share of the batch."""
    steps: tuple[str, ...] = ()
    """Texts of its steps; trailing ones of nothing but space and end tokens are left out."""
    reward: float = 0.0
    """Sum of its rewards, less what its length costs; NaN where every reward passes it over."""
    parts: Mapping[str, float | None] = field(default_factory=dict)
    """Reward -> its value, before weights; None where it passes it over."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What reward functions said of it by ``log_extra``."""
    correct: bool | None = None
    """Whether its final answer is correct; None without a gold answer."""
    step_scores: tuple[float, ...] = ()
    """Scores of its steps, where step credit gives some; NaN for a step without one."""
    advantages: Numbers = field(default_factory=lambda: _NONE)
    """Advantage of every token."""
    old_logps: Numbers | None = None
    """What the policy said of every token before the first of several optimiser steps."""
    pg_weight: float = 0.0
    """Weight of its tokens in the policy-gradient sum."""
    pg_count: float = 0.0
    """What it adds to that sum's denominator."""
    kd_weight: float = 0.0
    """Weight of its tokens in the distillation sum."""
    kd_count: float = 0.0
    """What it adds to that sum's denominator."""

    @classmethod
    def of(cls, completion: Completion, **more: Any) -> Rollout:
        """A completion with what is known of it as a rollout."""
        return cls(**{each.name: getattr(completion, each.name) for each in fields(Completion)} | more)

    @property
    def cut_off(self) -> bool:
        """Whether it was cut off."""
        return self.finish == "length"


@dataclass(eq=False)
class GroupSampler:
    """Draws groups from a policy and grades them."""

    spec: RolloutConfig
    engine: Engine
    policy: Policy
    rewards: Rewards
    phases: PhaseTracker
    """Told how far it is."""
    seed: int
    """Keys the noise, with step and problem."""

    def __post_init__(self) -> None:
        self.sampling = replace(self.spec.sampling, seed=self.seed)
        self._segmenter = get_segmenter(self.spec.segmenter)

    def __call__(self, batch: StepBatch, step: int, epoch: int) -> list[Rollout]:
        """Graded completions of the batch's prompts, group after group; equal groups are drawn anew on request. A
        completion of which nothing was drawn (:func:`~stepkd.sampling.engine.is_stand_in`) is left out.

        Args:
            batch: this rank's prompts.
            step, epoch: key the noise; a step that was skipped has another epoch when its prompts come again.

        Raises:
            TrainingError: a reward function that fails.
        """
        self.engine.update(step)
        groups: dict[int, list[Rollout]] = {}
        waiting = list(range(len(batch.examples)))
        for attempt in range(self.spec.dynamic_sampling + 1):
            drawn = self._draw(batch, waiting, step, f"kdrl {epoch} {attempt}")
            groups |= dict(zip(waiting, drawn, strict=True))
            waiting = [i for i in waiting if len({r.reward for r in groups[i] if not math.isnan(r.reward)}) < 2]
            if not waiting:
                break
        return [rollout for number in sorted(groups) for rollout in groups[number]]

    def _draw(self, batch: StepBatch, numbers: Sequence[int], step: int, purpose: str) -> list[list[Rollout]]:
        examples = [batch.examples[i] for i in numbers]
        with self.phases.phase("rollout", total=len(examples) * self.sampling.n):
            drawn = self.engine.generate(
                [example.prompt_ids for example in examples],
                self.sampling,
                purpose=purpose,
                step=step,
                indices=[batch.indices[i] for i in numbers],
                on_progress=self.phases.advance,
            )
        rollouts = [
            Rollout.of(completion, group=number, id=example.id, row=example.row)
            for number, example, group in zip(numbers, examples, drawn, strict=True)
            for completion in group
            if not is_stand_in(completion, self.policy.eos_ids)
        ]
        with self.phases.phase("rewards", total=len(rollouts)):
            graded = self._graded(self._in_steps(rollouts)) if rollouts else []
        return [[rollout for rollout in graded if rollout.group == number] for number in numbers]

    def _in_steps(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts cut into steps; one that cannot be cut is one step."""
        found = []
        texts = [text_from_ids(self.policy.tokenizer, rollout.token_ids) for rollout in rollouts]
        for rollout, text in zip(rollouts, texts, strict=True):
            spans = segment(self._segmenter, text) or [(0, len(text))]
            steps = without_blank_end([text.span_text(*span) for span in spans])
            found.append(replace(rollout, step_ends=np.asarray(step_ends(spans)), steps=tuple(steps)))
        return found

    def _graded(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with their rewards, summed and less what their length costs."""
        columns = _columns(rollouts)
        totals, parts = self.rewards(columns, [f"{rollout.id}/{rollout.sample}" for rollout in rollouts])
        known = "answer" in columns
        correct = parts.get("accuracy") or (self.rewards.correct(columns) if known else [None] * len(rollouts))
        extra = {name: each for name, each in self.rewards.extra.items() if len(each) == len(rollouts)}
        return [
            replace(
                rollout,
                reward=total - self.spec.penalty(len(rollout.token_ids)),
                parts={name: values[i] for name, values in parts.items()},
                extra={name: values[i] for name, values in extra.items()},
                correct=None if correct[i] is None else bool(correct[i]),
            )
            for i, (rollout, total) in enumerate(zip(rollouts, totals, strict=True))
        ]


def _columns(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """What reward functions get: TRL's arguments, ``steps``, ``cut_off``, ``rows``, and what all rows have."""
    shared = set.intersection(*(set(rollout.row) for rollout in rollouts))
    shared -= {"answer"} if any(rollout.row.get("answer") is None for rollout in rollouts) else set()
    columns: dict[str, list[Any]] = {name: [r.row[name] for r in rollouts] for name in shared}
    return columns | {
        "prompts": [rollout.row.get("prompt") for rollout in rollouts],
        "completions": [rollout.text for rollout in rollouts],
        "completion_ids": [rollout.token_ids.tolist() for rollout in rollouts],
        "steps": [list(rollout.steps) for rollout in rollouts],
        "cut_off": [rollout.cut_off for rollout in rollouts],
        "rows": [rollout.row for rollout in rollouts],
    }


class SampleLog:
    """Writes rollouts of one step in so many.

    Args:
        spec: how often, how many.
        folder: where the file goes; None: nowhere.
        longest: tokens of the longest completion that is allowed.
    """

    def __init__(self, spec: SampleLogConfig, folder: str | Path | None, longest: int) -> None:
        self.spec = spec
        self.path = None if folder is None else Path(folder) / SAMPLES_FILE
        self.longest = longest

    def __call__(self, step: int, rollouts: Sequence[Rollout], device: torch.device, *, writes: bool) -> None:
        """Write an entry when it is time. All ranks call it, and one of them writes: its own samples, all lengths.

        Args:
            step: optimiser steps taken.
            rollouts: this rank's, credited, group after group.
            device: where messages between ranks live.
            writes: whether this rank is the one.
        """
        if self.path is None or step % self.spec.every:
            return
        places = [math.ceil(len(rollout.token_ids) * BINS / self.longest) - 1 for rollout in rollouts]
        counts = np.bincount(np.clip(places, 0, BINS - 1).astype(int), minlength=BINS)
        totals = all_reduce({str(i): number for i, number in enumerate(counts.tolist())}, device)
        if not writes:
            return
        edges = [round(i * self.longest / BINS, 3) for i in range(BINS + 1)]
        entry = {
            "step": step,
            "lengths": {"edges": edges, "counts": [int(total) for total in totals.values()]},
            # One completion of every group, then another one, until there are enough.
            "samples": [sample_row(r) for r in sorted(rollouts, key=lambda r: r.sample)[: self.spec.number]],
        }
        try:
            with open_to_append(self.path) as stream:
                append(stream, json.dumps(entry, default=str) + "\n")
        except OSError as error:
            raise disk_error(error, self.path, "The samples before are intact. ") or error from None


def sample_row(rollout: Rollout) -> dict[str, Any]:
    """A rollout as ``samples.jsonl`` has it."""
    return {
        "id": rollout.id,
        "prompt": rollout.row.get("prompt"),
        "answer": rollout.row.get("answer"),
        "steps": list(rollout.steps),
        "step_scores": [None if math.isnan(score) else score for score in rollout.step_scores],
        "reward": None if math.isnan(rollout.reward) else rollout.reward,
        "rewards": dict(rollout.parts),
        "correct": rollout.correct,
        "cut_off": rollout.cut_off,
        "tokens": len(rollout.token_ids),
        **({"extra": dict(rollout.extra)} if rollout.extra else {}),
    }
