"""How far the sampler's log-probabilities are from the trainer's.

They are of one policy and should be equal; a temperature that is missing in one place, weights of another step, or a
narrow dtype sets them apart, and the samples are off-policy without anybody saying so.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from stepkd.modules.distributed import all_reduce

MISMATCH_ALARM = 0.05
"""Mean distance in nats beyond which something is wrong."""


class Mismatch:
    """Adds up the distances of one optimiser step, and warns once."""

    def __init__(self) -> None:
        self.total = self.most = 0.0
        self.number = 0
        self.warned = False

    def add(self, gap_N: Tensor) -> None:
        """Differences of a micro-batch's tokens, in nats."""
        if len(gap_N):
            self.total += float(gap_N.abs().sum())
            self.most = max(self.most, float(gap_N.abs().max()))
            self.number += len(gap_N)

    def finish(self, step: int, device: torch.device) -> float:
        """End an optimiser step: the largest distance on any rank; warns where this rank's mean is too large."""
        mean = self.total / self.number if self.number else 0.0
        most = all_reduce({"most": self.most}, device, op="max")["most"]
        self.total = self.most = 0.0
        self.number = 0
        if mean > MISMATCH_ALARM and not self.warned:
            self.warned = True
            warnings.warn(
                f"step {step}: the log-probabilities of sampler and trainer differ by {mean:.3f} nats a token (alarm "
                f"above {MISMATCH_ALARM}): another temperature or weights, too narrow a dtype? The samples are not "
                "on-policy; policy_loss.importance_cap corrects small gaps",
                stacklevel=3,
            )
        return most
