"""A model sharded over ranks (FSDP2), and whole again for a while.

Every transformer block is a group of its own, whose weights are gathered for its forward and backward pass alone. What
is left (embeddings, last norm, vocabulary head, step head) is one more group, gathered for a whole step: the head is
called chunk by chunk, in the backward pass too. For that the loss of a micro-batch runs inside one forward pass of the
:class:`~stepkd.models.policy.Policy` (its ``forward``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepkd.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is only a part of itself on this rank (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank; all ranks must ask for it."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def share_of(full: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a tensor that every rank has, laid out as another one; the tensor itself without shards.

    Args:
        full: the same values on every rank.
        like: a parameter, sharded or not, of the same shape.
    """
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def blocks_of(causal_lm: Any) -> list[nn.Module]:
    """The transformer blocks of a model, in order.

    Raises:
        ConfigError: it has none that can be told.
    """
    names = set(causal_lm._no_split_modules or ())
    blocks = [module for module in causal_lm.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(
            f"{type(causal_lm).__name__} does not say which modules are its blocks, which sharding needs: use "
            "recipes/strategy/ddp.yaml"
        )
    within = {id(child) for block in blocks for child in block.modules() if child is not block}
    return [block for block in blocks if id(block) not in within]


def shard(policy: nn.Module, mesh: DeviceMesh, *, param_dtype: torch.dtype | None = None) -> None:
    """Shard a policy, in place.

    Args:
        policy: a :class:`~stepkd.models.policy.Policy`, loaded and complete; no weight may be added later.
        mesh: one dimension, the ranks that share it.
        param_dtype: weights are gathered, and computed with, in this dtype (mixed precision; gradients are summed in
            float32); None: their own.

    Raises:
        ConfigError: weights that cannot be sharded.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    odd = sorted({str(p.dtype) for p in policy.parameters() if not p.is_floating_point()})
    if odd:
        raise ConfigError(f"quantised weights ({', '.join(odd)}) cannot be sharded: use recipes/strategy/ddp.yaml")
    mixed = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=None if param_dtype is None else torch.float32, cast_forward_inputs=False
    )
    blocks: list[Any] = blocks_of(policy.causal_lm)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=mixed)
    root: Any = fully_shard(policy, mesh=mesh, mp_policy=mixed, reshard_after_forward=False)
    # What a block fetches ahead in the backward pass would otherwise follow all forward passes since the last one, and
    # ranks that sampled or validated differently often would wait for each other for ever.
    for block, before in zip(blocks, [root, *blocks], strict=False):
        block.set_modules_to_backward_prefetch([before])
    root.set_modules_to_backward_prefetch([blocks[-1]])
    with torch.no_grad():
        policy(lambda: None)  # its first forward pass makes it, and not a block, the root of its groups
    for module in _groups(policy):
        module.reshard()


def _groups(policy: nn.Module) -> list[Any]:
    """All modules of a policy that are sharded, the root first."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered(policy: nn.Module) -> Iterator[None]:
    """All weights on every rank for a block without gradients: no rank waits for another one in it.

    Weights must not be changed in the block. Nothing happens to a model that is not sharded, or is whole already.
    """
    groups = _groups(policy)
    if not groups or getattr(policy, "_is_gathered", False):
        yield
        return
    root: Any = policy
    for module in groups:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    root._is_gathered = True
    try:
        yield
    finally:
        root._is_gathered = False
        for module in groups:
            module.set_reshard_after_forward(module is not policy, recurse=False)
            module.reshard()


class WeightAverage:
    """Float32 running average ``a <- decay * a + (1 - decay) * w`` of named parameters.

    Only trainable parameters are averaged: with LoRA that is the adapter.

    Args:
        parameters: names and parameters, as they will be given to :meth:`update`.
        decay: in (0, 1).
    """

    def __init__(self, parameters: list[tuple[str, nn.Parameter]], decay: float) -> None:
        self.decay = decay
        self.average = {name: parameter.detach().float().clone() for name, parameter in parameters}

    @torch.no_grad()
    def update(self, parameters: list[tuple[str, nn.Parameter]]) -> None:
        """Take in the weights after an optimiser step."""
        for name, parameter in parameters:
            average = self.average[name]
            if is_sharded(parameter) and not is_sharded(average):  # begun before the weights were sharded
                average = self.average[name] = share_of(average, parameter)
            if average.device != parameter.device:
                average = self.average[name] = average.to(parameter.device)
            average.lerp_(parameter.detach().float(), 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, whole, for a checkpoint; with sharded weights all ranks must ask for it."""
        return {name: whole_tensor(value) for name, value in self.average.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over averages of the same parameters from a checkpoint."""
        assert set(state) == set(self.average)
        self.average = {name: share_of(value, self.average[name]).clone() for name, value in state.items()}
