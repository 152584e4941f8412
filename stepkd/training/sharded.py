"""Fully sharded training (FSDP2) with checkpoints that any number of ranks, and any strategy, can resume from."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from stepkd.models.sharding import share_of, whole_tensor


class FSDP2Strategy(ModelParallelStrategy):
    """Weights, gradients and optimiser state sharded over all ranks (PyTorch's ``fully_shard``).

    The module cuts itself up (``StepModule.shard``) once it is complete. Checkpoints are those of the other strategies:
    one file, whole trainable weights, written by rank 0 through the checkpoint plugin.

    Args:
        process_group_backend: ``nccl``, ``gloo``; null: what fits the device.
        timeout: how long ranks wait for each other.
    """

    matches_one_process = True
    """The tests compare its training with that of one process (:mod:`stepkd.modules.distributed`)."""

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta = default_pg_timeout) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands over the optimiser's state as for any other strategy."""
        return True

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size = self.world_size  # Lightning's "auto" means the nodes, and tensors over processes

    def setup(self, trainer: Trainer) -> None:
        """Cut the module up, then set it up as Lightning does."""
        module: Any = self.lightning_module
        module.shard(self.device_mesh["data_parallel"])
        super().setup(trainer)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole trainable weights on rank 0, nothing on the others (which must ask all the same)."""
        module: Any = self.lightning_module
        return self._whole({f"policy.{name}": p.detach() for name, p in module.model.trainable_parameters()})

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole state by parameter number, as a single process would have it; only on rank 0."""
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = plain.state_dict()
        return {**state, "state": {number: self._whole(values) for number, values in state["state"].items()}}

    def _whole(self, values: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            full = whole_tensor(value) if isinstance(value, torch.Tensor) else value
            if self.is_global_zero:
                found[name] = full.cpu() if isinstance(full, torch.Tensor) else full
        return found

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file on every rank; tensors are mapped, each rank reads its own share of them."""
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path))
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's share of the weights."""
        module: Any = self.lightning_module
        weights = checkpoint["state_dict"]
        with torch.no_grad():
            for name, parameter in module.model.trainable_parameters():
                parameter.copy_(share_of(weights[f"policy.{name}"], parameter))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's share of the optimiser's state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            shares = {
                number: {
                    name: share_of(value, parameters[number]) if _like(value, parameters[number]) else value
                    for name, value in values.items()
                }
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shares})
            _optimizer_to_device(optimizer, self.root_device)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Rank 0 writes, through the checkpoint plugin."""
        ParallelStrategy.save_checkpoint(self, checkpoint, self.broadcast(filepath), storage_options)


def _like(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape
