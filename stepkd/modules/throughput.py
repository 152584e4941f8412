"""Tokens per second, model FLOPs utilisation and peak memory."""

from __future__ import annotations

import resource
import sys
import time

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import nn


def train_flops_per_token(model: nn.Module) -> float:
    """Floating-point operations to train on one token.

    ``2 N`` for the forward pass, ``2 N`` for gradients of activations, ``2 N_trainable`` for gradients of weights (so
    ``6 N`` when everything is trained). Attention scores and recomputation are not counted, as usual for MFU (Chowdhery
    et al. 2022, arXiv 2204.02311, appendix B, without the attention term).
    """
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 4.0 * total + 2.0 * trainable


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on a CUDA device, resident size of the process elsewhere (GiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class Throughput:
    """Rate over the time between two calls of :meth:`measure`."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.flops_per_token = train_flops_per_token(model)
        # Lightning knows the peak of CUDA devices and TPUs; for anything else there is no honest figure, so no MFU.
        self.peak_flops = get_available_flops(device, dtype) if device.type == "cuda" else None
        self.device = device
        self._last = time.perf_counter()

    def measure(self, tokens: float, world_size: int = 1) -> dict[str, float]:
        """Rates since the last call.

        Args:
            tokens: tokens trained on since then, over all ranks.
            world_size: devices that shared the work.
        """
        now = time.perf_counter()
        seconds, self._last = max(now - self._last, 1e-9), now
        result = {
            "perf/tokens_per_second": tokens / seconds,
            "perf/step_seconds": seconds,
            "perf/memory_gib": peak_memory_gib(self.device),
        }
        if self.peak_flops:
            result["perf/mfu"] = self.flops_per_token * tokens / seconds / (self.peak_flops * world_size)
        return result

    def restart(self) -> None:
        """Leave out time that was not training (validation, checkpoints)."""
        self._last = time.perf_counter()
