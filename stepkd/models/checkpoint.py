"""From a training checkpoint back to a model. Nothing pickled is executed: checkpoints load with ``weights_only``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepkd.errors import ConfigError, ModelError
from stepkd.models.adapter import add_lora, misfit
from stepkd.models.load import checkpoint_layers, load_tokenizer
from stepkd.models.policy import Policy
from stepkd.models.source import find_checkpoint as find_checkpoint
from stepkd.models.spec import FrozenSpec, PolicySpec, Quantization, spec_from_dict
from stepkd.models.step_head import step_head_from_dict
from stepkd.runs.resume import read_checkpoint


def trained_spec(path: str | Path) -> PolicySpec:
    """What :func:`load_trained` would load from a path, before its weights are put in.

    Raises:
        ModelError: a checkpoint that cannot be read.
    """
    return _read(path)[2]


def _read(path: str | Path) -> tuple[Path | None, dict[str, Any] | None, PolicySpec]:
    """The checkpoint that a path means, where it means one, and the policy's settings."""
    found = find_checkpoint(Path(path).expanduser())
    if found is None:
        return None, None, PolicySpec(path=str(path))
    checkpoint = read_checkpoint(found)
    return found, checkpoint, spec_from_dict(checkpoint["stepkd"]["policy"])


def load_policy(spec: PolicySpec) -> Policy:
    """Load the policy that a spec describes, whose path may also be a run folder or a checkpoint.

    An adapter that the run trained is trained further; ``spec.lora`` puts fresh ones on a run without.

    Raises:
        ModelError: nothing loadable there.
        ConfigError: fresh adapters for a run that trained adapters, or other settings that do not fit the model.
    """
    found = find_checkpoint(Path(spec.path).expanduser())
    if found is None:
        return Policy.load(spec)
    if spec.lora is not None and trained_spec(found).lora is not None:
        raise ConfigError(
            f"policy.path={spec.path} trained an adapter and policy.lora asks for a new one: drop policy.lora to go on "
            "training this adapter, or merge it first (stepkd export) and give the export"
        )
    dtype = None if spec.dtype == "auto" else spec.dtype
    trained = load_trained(found, dtype=dtype, attention=spec.attention, quantization=spec.quantization)
    model = trained.model if spec.lora is None else add_lora(trained.model, spec)
    if spec.gradient_checkpointing:
        checkpoint_layers(model)
    tokenizer = trained.tokenizer if spec.tokenizer is None else load_tokenizer(spec)
    policy = Policy(model, tokenizer, spec)
    if trained.step_head is not None:
        policy.attach_step_head(trained.step_head.spec, weights=trained.step_head.state_dict())
    return policy


def load_trained(
    path: str | Path,
    *,
    dtype: str | None = None,
    attention: str | None = None,
    quantization: Quantization = "none",
    ema: bool = True,
    dequantise: bool = False,
) -> Policy:
    """Load a model for evaluation or export.

    Args:
        path: a run folder (its best checkpoint), a ``.ckpt`` file, or anything :class:`PolicySpec` takes.
        dtype: overrides the dtype it was trained in.
        attention: overrides the attention implementation.
        quantization: other than none: how the base weights are kept.
        ema: use the averaged weights of a checkpoint that has them.
        dequantise: put a checkpoint's adapter on the unquantised base, whatever it was trained on.

    Raises:
        ModelError: nothing loadable there.
    """
    checkpoint_path, checkpoint, spec = _read(path)
    spec = replace(spec, gradient_checkpointing=False)
    if dequantise:
        spec = replace(spec, quantization="none")
    if dtype is not None:
        spec = replace(spec, dtype=dtype)  # type: ignore[arg-type]
    elif checkpoint is None:
        spec = replace(spec, dtype="auto")
    if attention is not None:
        spec = replace(spec, attention=attention)
    if quantization != "none":
        if checkpoint is not None and spec.lora is None:
            raise ModelError(
                f"{path} was trained in all weights, which a run keeps unquantised: export it (stepkd export) and "
                "quantise the export"
            )
        frozen = {field.name: getattr(spec, field.name) for field in fields(spec)}
        spec = FrozenSpec(**{**frozen, "quantization": quantization})
    policy = load_policy(spec)
    if checkpoint is not None:
        trained = checkpoint["stepkd"]["policy"]
        as_trained = (spec.dtype, spec.quantization) == (trained["dtype"], trained["quantization"])
        base = checkpoint["stepkd"].get("base", "") if as_trained else ""
        if base and base != base_fingerprint(policy):
            raise ModelError(
                f"{checkpoint_path} holds an adapter of {spec.path}, whose weights are others now than when it was "
                "trained: put the old ones back"
            )
        if "step_head" in checkpoint["stepkd"]:
            policy.attach_step_head(step_head_from_dict(checkpoint["stepkd"]["step_head"]))
        _load_weights(policy, checkpoint, str(checkpoint_path), ema=ema)
    return policy


def _load_weights(policy: Policy, checkpoint: dict[str, Any], path: str, *, ema: bool) -> None:
    weights = {name.removeprefix("policy."): value for name, value in checkpoint["state_dict"].items()}
    expected = dict(policy.trainable_parameters())
    averages = checkpoint["stepkd"].get("ema", weights)
    if differing := misfit(expected, weights) or misfit(expected, averages):
        raise ModelError(
            f"{path} holds weights of another model than its own policy section describes ({differing}): was "
            f"{policy.spec and policy.spec.path} changed since?"
        )
    if ema:
        weights = averages
    policy.load_state_dict(weights, strict=False)


def base_fingerprint(policy: Policy) -> str:
    """:func:`weights_fingerprint` of what an adapter stands on; empty without an adapter."""
    if not policy.has_adapter:
        return ""
    # Quantised weights are left out: they may differ from one kind of GPU to another.
    named = policy.named_parameters()
    return parameters_fingerprint((n, p) for n, p in named if p.is_floating_point() and not p.requires_grad)


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Short hash that tells two sets of weights apart.

    Covers every parameter's name, shape and dtype and a thousand of its values, evenly spaced: enough to recognise a
    changed checkpoint in milliseconds, not a cryptographic proof.
    """
    return parameters_fingerprint(model.named_parameters())


def parameters_fingerprint(named: Iterable[tuple[str, torch.nn.Parameter]]) -> str:
    """:func:`weights_fingerprint` of some parameters, in any order."""
    digest = hashlib.sha256()
    for name, parameter in sorted(named, key=lambda pair: pair[0]):
        flat = parameter.detach().reshape(-1)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if flat.numel():
            stride = max(1, flat.numel() // 1000)
            digest.update(np.ascontiguousarray(flat[::stride].float().cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Short hash of everything that decides how text becomes ids: vocabulary, merges, normaliser, special tokens."""
    shape = json.loads(tokenizer.backend_tokenizer.to_str())
    shape.pop("truncation", None)  # set by whoever called last
    shape.pop("padding", None)
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:16]
