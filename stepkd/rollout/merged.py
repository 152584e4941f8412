"""Weights of a policy as a server of the plain model wants them: adapters added to what they adapt, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stepkd.errors import ConfigError
from stepkd.models.adapter import plain_model

Fact = tuple[str, str, list[int]]
"""Name, dtype (``bfloat16``) and shape of a weight."""


def weight_facts(model: Any) -> list[Fact]:
    """What :func:`merged_weights` will give, in its order, without computing anything.

    Args:
        model: a transformers causal language model, peft-wrapped or not, whole on this rank.

    Raises:
        ConfigError: weights that no plain model has (quantised, or under an adapter that is more than a sum).
    """
    layers = _adapted(model)
    facts = []
    for name, parameter in _parameters(model):
        if not parameter.is_floating_point():
            raise ConfigError(
                f"{name} is quantised ({parameter.dtype}), which cannot be sent: load the policy whole "
                "(policy.quantization none), or sample without vLLM"
            )
        if name in layers:
            _check(name, layers[name], model)
        facts.append((_plain(name, model), str(parameter.dtype).removeprefix("torch."), list(parameter.shape)))
    return facts


def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of the model that a server holds, nothing changed in place, each made when it is asked for.

    Args:
        model: as for :func:`weight_facts`, which refuses what cannot be merged.

    Yields:
        Tied weights once, under the names of the plain model.
    """
    layers = _adapted(model)
    for name, parameter in _parameters(model):
        value = parameter.detach()
        if name in layers and (delta := _delta(layers[name], model.active_adapters)) is not None:
            value = (value.float() + delta.to(value.device).float()).to(value.dtype)
        yield _plain(name, model), value


def _parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights that the plain model has too: no adapter's own, and none that a trained copy stands for."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name and ".original_module." not in name:
            yield name, parameter


def _plain(name: str, model: Any) -> str:
    plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
    for adapter in model.active_adapters if hasattr(model, "peft_config") else ():
        plain = plain.replace(f".modules_to_save.{adapter}", "")
    return plain


def _adapted(model: Any) -> dict[str, Any]:
    """Adapter layers by the name of the weight that they change."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        f"{name}.base_layer.weight": module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def _check(name: str, layer: Any, model: Any) -> None:
    """Refuse adapters whose effect is not a sum with this one weight."""
    from peft.tuners.lora.layer import LoraLayer

    problem = None
    if not isinstance(layer, LoraLayer):
        problem = f"{type(layer).__module__.split('.')[-2]} is not LoRA"
    elif variants := {
        type(v).__name__ for adapter, v in layer.lora_variant.items() if adapter in model.active_adapters
    }:
        problem = f"{', '.join(sorted(variants))} is more than a sum"
    elif any(layer.lora_bias.get(adapter) for adapter in model.active_adapters):
        problem = "lora_bias changes a bias as well"
    elif _is_tied(layer, model):
        problem = "the vocabulary head shares the weight and would change with it"
    if problem is not None:
        raise ConfigError(f"the adapter on {name} cannot be merged for vLLM: {problem}; sample without vLLM")


def _is_tied(layer: Any, model: Any) -> bool:
    """Whether an adapted embedding is the vocabulary head too, which has no adapter."""
    plain = plain_model(model)
    head = plain.get_output_embeddings()
    return layer is plain.get_input_embeddings() and head is not None and head.weight is layer.weight


@torch.no_grad()
def _delta(layer: Any, adapters: Sequence[str]) -> Tensor | None:
    mine = [adapter for adapter in adapters if adapter in layer.lora_A or adapter in layer.lora_embedding_A]
    parts = [layer.get_delta_weight(adapter) for adapter in mine]
    return torch.stack(parts).sum(0) if parts else None
