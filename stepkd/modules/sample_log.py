"""What a policy writes while it learns: some of its completions, step by step, and how long all of them are.

``samples.jsonl`` in the run folder has a line every so many optimiser steps; ``stepkd samples RUN`` shows it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stepkd.errors import DataError, disk_error
from stepkd.modules.distributed import all_reduce
from stepkd.modules.kdrl_settings import SampleLogSpec
from stepkd.modules.rollouts import Rollout
from stepkd.modules.step_scores import step_texts
from stepkd.runs.logger import append, ends_torn

SAMPLES_FILE = "samples.jsonl"
BINS = 16
"""Bars of the histogram of lengths, from 0 to the longest completion that is allowed."""


class SampleLog:
    """Writes rollouts of one step in so many.

    Args:
        spec: how often, how many.
        folder: where the file goes; None: nowhere.
        longest: tokens of the longest completion that is allowed.
        tokenizer: the policy's.
    """

    def __init__(self, spec: SampleLogSpec, folder: str | Path | None, longest: int, tokenizer: Any) -> None:
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
