"""Exponential moving average of the trainable weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stepkd.errors import ConfigError
from stepkd.models.sharding import is_sharded, share_of, whole_tensor


class WeightAverage:
    """Float32 running average ``a <- decay * a + (1 - decay) * w`` of named parameters.

    Only trainable parameters are averaged: with LoRA that is the adapter.

    Args:
        parameters: names and parameters, as they will be given to :meth:`update`.
        decay: in (0, 1).
    """

    def __init__(self, parameters: list[tuple[str, nn.Parameter]], decay: float) -> None:
        if not 0 < decay < 1:
            raise ConfigError(f"ema_decay={decay}: must lie strictly between 0 and 1, or be null for none")
        self.decay = decay
        self.average = {name: parameter.detach().float().clone() for name, parameter in parameters}

    @torch.no_grad()
    def update(self, parameters: list[tuple[str, nn.Parameter]]) -> None:
        """Take in the weights after an optimiser step."""
        for name, parameter in parameters:
            average = self.average[name]
            if is_sharded(parameter) and not is_sharded(average):  # begun before the weights were cut up
                average = self.average[name] = share_of(average, parameter)
            if average.device != parameter.device:
                average = self.average[name] = average.to(parameter.device)
            average.lerp_(parameter.detach().float(), 1 - self.decay)

    @contextmanager
    def applied(self, parameters: list[tuple[str, nn.Parameter]]) -> Iterator[None]:
        """Run a block with the averaged weights in place, then put the trained ones back."""
        trained = {name: parameter.detach().clone() for name, parameter in parameters}
        try:
            with torch.no_grad():
                for name, parameter in parameters:
                    parameter.copy_(self.average[name])
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters:
                    parameter.copy_(trained[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, whole, for a checkpoint; with sharded weights all ranks must ask for it."""
        return {name: whole_tensor(value) for name, value in self.average.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over averages from a checkpoint.

        Raises:
            ConfigError: the checkpoint averages other parameters.
        """
        if set(state) != set(self.average):
            raise ConfigError(
                "the checkpoint's weight average belongs to other parameters: same policy and lora needed"
            )
        self.average = {name: share_of(value, self.average[name]).clone() for name, value in state.items()}
