"""Reference points of KTO and Step-KTO: over the global batch, clamped at 0, without gradient.

Axes: R completions, S steps, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stepkd.data.batching import StepBatch, mismatched
from stepkd.data.collate import Completion
from stepkd.data.encode import Example
from stepkd.errors import check_bounds
from stepkd.losses import reference_point
from stepkd.modules.distributed import all_reduce

OutcomePoint = Literal["mismatch", "batch", "zero"]
StepPoint = Literal["mismatch", "batch", "per_index", "zero"]


@dataclass(frozen=True)
class ReferencePointSpec:
    """How the points are estimated that values are measured from."""

    outcome: OutcomePoint = "mismatch"
    """Of completions. ``mismatch``: mean log-ratio of prompts with the completions of other prompts (KTO);
    ``batch``: of the batch's own completions, which is biased by its mix of labels; ``zero``: none (APO-zero)."""
    step: StepPoint = "mismatch"
    """Of steps. ``mismatch``: mean over the steps of the mismatched completions; ``per_index``: the same for each step
    number, as a running average; ``batch`` and ``zero`` as above."""
    rotation: Literal["global", "device"] = "global"
    """``global``: completions are exchanged within the whole batch, always between different prompts; ``device``:
    within a rank's share, by one place, and the ranks' means are averaged (TRL's way)."""
    ema: float = 0.9
    """``per_index``: decay of the running average, in [0, 1); 0 takes each batch by itself."""

    def __post_init__(self) -> None:
        check_bounds("reference_point.", self, ema="[0, 1)")

    @property
    def needs_mismatches(self) -> bool:
        """Whether mismatched pairs are to be read."""
        return self.outcome == "mismatch" or self.step in ("mismatch", "per_index")

    @property
    def needs_batch(self) -> bool:
        """Whether the batch's own log-ratios are needed before the first backward pass."""
        return "batch" in (self.outcome, self.step)


@dataclass(frozen=True)
class Points:
    """The points of one optimiser step."""

    z0: float = 0.0
    """Of completions, >= 0."""
    z0_step: float = 0.0
    """Of steps, >= 0."""
    by_index: tuple[float, ...] = ()
    """Of steps by their number, where that is asked for; later steps have ``z0_step``."""

    def of_steps(self, completion_S: Tensor) -> float | Tensor:
        """Point of every step.

        Args:
            completion_S: completion of every step, in order.
        """
        if not self.by_index:
            return self.z0_step
        starts_S = torch.searchsorted(completion_S, completion_S)  # first step of the same completion
        index_S = torch.arange(len(completion_S), device=completion_S.device) - starts_S
        table = torch.tensor([*self.by_index, self.z0_step], dtype=torch.float64, device=completion_S.device)
        return table[index_S.clamp(max=len(self.by_index))]


def mismatched_completions(batch: StepBatch, rotation: str, max_length: int | None = None) -> list[Completion]:
    """Prompts of this rank's examples with the completions of others; one that exceeds the context is left out.

    Args:
        batch: this rank's share, with its peers (without them, the share is the whole batch).
        rotation: ``global`` or ``device``; see :class:`ReferencePointSpec`.
        max_length: the model's context in tokens.
    """
    peers, places = batch.peers, batch.places
    if not peers:
        peers, places = batch.examples, tuple(range(len(batch.examples)))
    partners: dict[int, int | None] = {}
    if rotation == "global":
        partners = dict(enumerate(mismatched([peer.prompt_ids for peer in peers])))
    else:
        order = sorted(places)
        partners = {place: order[k - 1] for k, place in enumerate(order)}
    found = []
    for place in places:
        partner = partners[place]
        if partner is None or not peers[partner].completion_ids:
            continue
        other: Example = peers[partner]
        completion = Completion(peers[place].prompt_ids, other.completion_ids, other.spans)
        if max_length is None or completion.length <= max_length:
            found.append(completion)
    return found


class PointEstimator:
    """Keeps the running averages and turns log-ratios into points.

    Args:
        spec: how.
    """

    def __init__(self, spec: ReferencePointSpec) -> None:
        self.spec = spec
        self.averages: list[float] = []

    def __call__(
        self,
        mismatches: Sequence[tuple[Completion, Tensor]],
        own: Sequence[tuple[Completion, Tensor]],
        device: torch.device,
        *,
        update: bool = True,
    ) -> Points:
        """Points of a batch; every rank calls this.

        Args:
            mismatches: this rank's mismatched completions with their token log-ratios.
            own: its own completions with theirs, when the spec asks for them.
            device: of the collective.
            update: whether running averages move (in training) or are only read.
        """
        sums: dict[str, float] = {}
        for name, items in (("mismatch", mismatches), ("batch", own)):
            totals = [float(ratios_N.double().sum()) for _, ratios_N in items]
            steps = [value for completion, ratios_N in items for value in _step_sums(completion, ratios_N)]
            mean = self.spec.rotation == "device"
            for kind, values in (("outcome", totals), ("step", steps)):
                divisor = len(values) if mean and values else 1
                sums[f"{name}/{kind}/sum"] = sum(values) / divisor
                sums[f"{name}/{kind}/count"] = len(values) / divisor
        sums = all_reduce(sums, device)
        points = {
            (name, kind): reference_point(sums[f"{name}/{kind}/sum"], sums[f"{name}/{kind}/count"])
            for name in ("mismatch", "batch")
            for kind in ("outcome", "step")
        }
        step = "mismatch" if self.spec.step == "per_index" else self.spec.step
        by_index = self._by_index(mismatches, device, update) if self.spec.step == "per_index" else ()
        return Points(points.get((self.spec.outcome, "outcome"), 0.0), points.get((step, "step"), 0.0), by_index)

    def _by_index(
        self, mismatches: Sequence[tuple[Completion, Tensor]], device: torch.device, update: bool
    ) -> tuple[float, ...]:
        """Clamped points by step number, after this batch has moved the running averages."""
        rows = [_step_sums(completion, ratios_N) for completion, ratios_N in mismatches]
        longest = int(all_reduce({"n": float(max(map(len, rows), default=0))}, device, op="max")["n"])
        sums = {f"{part}/{i}": 0.0 for i in range(longest) for part in ("sum", "count")}
        for row in rows:
            for i, value in enumerate(row):
                sums[f"sum/{i}"] += value
                sums[f"count/{i}"] += 1
        sums = all_reduce(sums, device)
        averages = list(self.averages)
        for i in range(longest):
            mean = sums[f"sum/{i}"] / sums[f"count/{i}"]
            if i < len(averages):
                averages[i] += (1 - self.spec.ema) * (mean - averages[i])
            else:
                averages.append(mean)
        if update:
            self.averages = averages
        return tuple(max(0.0, value) for value in averages)


def _step_sums(completion: Completion, ratios_N: Tensor) -> list[float]:
    values = ratios_N.double().cpu()
    return [float(values[start:end].sum()) for start, end in completion.spans]
