"""The memory of a recipe whose model is cut up over ranks (FSDP2): shares of what is held, and what is gathered.

Foretold from how :mod:`stepkd.models.sharding` groups and gathers weights; no GPU has run it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stepkd.models.adapter import plain_model
from stepkd.models.sharding import blocks_of

if TYPE_CHECKING:
    from stepkd.doctor.footprint import Footprint

SHARED = ("weights", "gradients", "optimiser (AdamW)", "running average")


def cut_up(
    found: Footprint, module: Any, data: Any, models: Sequence[nn.Module | None], mixed: bool, shards: int
) -> None:
    """Change a footprint of whole models into that of one rank.

    Args:
        found: of the recipe on one device.
        module: the training module.
        data: its data module.
        models: policy and teacher without storage; None for a teacher that is not loaded.
        mixed: whether weights are gathered in bfloat16 and their gradients summed in float32.
        shards: ranks, >= 2.
    """
    policy, teacher = models
    assert policy is not None
    spec = getattr(getattr(module, "teacher", None), "spec", None)
    if spec is None or not spec.sharded:
        teacher = None
    names = [*SHARED, *(["teacher"] if teacher is not None else [])]
    found.held |= {name: -(-found.held[name] // shards) for name in names if name in found.held}
    found.facts["cut up"] = f"over {shards} ranks"
    found.phases["training"] |= _of_a_pass(policy, mixed)
    gathered = {"gathered weights": _bytes(policy.parameters(), mixed)}
    if teacher is not None:  # in its own dtype; embeddings and head stay from its first pass on
        blocks, rest = _groups(teacher)
        found.phases["training"]["gathered teacher"] = 2 * max(map(_bytes, blocks)) + _bytes(rest)
        gathered["gathered teacher"] = _bytes(teacher.parameters())
    if "sampling" in found.phases:
        found.phases["sampling"] |= gathered
    if module.prepares_with_model:
        found.phases["before a step"] = dict(gathered)
    if (getattr(data, "specs", None) or {}).get("validation") is not None:
        found.phases["validation"] = {**gathered, "chunk of logits": found.phases["training"]["chunk of logits"]}


def _of_a_pass(policy: nn.Module, mixed: bool) -> dict[str, int]:
    """Two blocks (one is fetched ahead) and all that is no block, and gradients of one block and the rest."""
    blocks, rest = _groups(policy)
    trained = [[p for p in group if p.requires_grad] for group in (*blocks, rest)]
    gradients = max(_bytes(group, mixed) for group in trained[:-1]) + _bytes(trained[-1], mixed)
    if mixed:  # copied once more to be summed
        gradients += max(4 * sum(p.numel() for p in group) for group in trained)
    weights = 2 * max(_bytes(block, mixed) for block in blocks) + _bytes(rest, mixed)
    return {"gathered blocks": weights, "their gradients": gradients}


def _groups(model: Any) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
    """Weights of every block, and all others."""
    blocks = [list(block.parameters()) for block in blocks_of(plain_model(model))]
    inside = {id(parameter) for block in blocks for parameter in block}
    return blocks, [parameter for parameter in model.parameters() if id(parameter) not in inside]


def _bytes(parameters: Iterable[torch.Tensor], mixed: bool = False) -> int:
    return sum(p.numel() * min(p.element_size(), 2 if mixed else 8) for p in parameters)
