"""From a training checkpoint back to a model, and to a folder that plain transformers loads (and so vLLM and the
llama.cpp converters). Nothing pickled is executed: checkpoints load with ``weights_only``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from stepkd.errors import ConfigError, ModelError, disk_error
from stepkd.models.adapter import ADAPTER_CONFIG, adapter_folder, add_lora, in_base_precision, misfit
from stepkd.models.card import write_card
from stepkd.models.layouts import Layout, check_layout, save_classifier
from stepkd.models.load import checkpoint_layers, listed_ends, load_outline, load_tokenizer
from stepkd.models.policy import Policy
from stepkd.models.source import find_checkpoint, save_template, trained_template
from stepkd.models.spec import TINY_PRESETS, PolicyConfig, Quantization, spec_from_dict, step_head_from_dict
from stepkd.models.step_head import save_step_head
from stepkd.runs.rundir import read_checkpoint


def _read(path: str | Path) -> tuple[Path | None, dict[str, Any] | None, PolicyConfig]:
    """The checkpoint that a path means, where it means one, and the policy's settings."""
    found = find_checkpoint(Path(path).expanduser())
    if found is None:
        return None, None, PolicyConfig(path=str(path))
    checkpoint = read_checkpoint(found)
    return found, checkpoint, spec_from_dict(checkpoint["stepkd"]["policy"])


def load_policy(spec: PolicyConfig) -> Policy:
    """Load the policy that a spec describes, whose path may also be a run folder or a checkpoint.

    An adapter that the run trained is trained further; ``spec.lora`` puts fresh ones on a run without.

    Raises:
        ModelError: nothing loadable there.
        ConfigError: fresh adapters for a run that trained adapters, or other settings that do not fit the model.
    """
    found = find_checkpoint(Path(spec.path).expanduser())
    if found is None:
        return Policy.load(spec)
    if spec.lora is not None and _read(found)[2].lora is not None:
        raise ConfigError(
            f"policy.path={spec.path} trained an adapter and policy.lora asks for a new one: drop policy.lora to train "
            "this one further, or merge it first (stepkd export) and give the export"
        )
    trained = load_trained(found, dtype=spec.dtype, attention=spec.attention, quantization=spec.quantization)
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
    dequantise: bool = False,
    weights: bool = True,
) -> Policy:
    """Load a model for evaluation or export.

    Args:
        path: a run folder (its best checkpoint), a ``.ckpt`` file, or anything :class:`PolicyConfig` takes.
        dtype: overrides the dtype it was trained in.
        attention: overrides the attention implementation.
        quantization: other than none: how the base weights are kept.
        dequantise: put a checkpoint's adapter on the unquantised base, whatever it was trained on.
        weights: off, only settings and tokenizer are read, for a model that another process samples from: its weights
            are on the ``meta`` device and cannot be computed with.

    Raises:
        ModelError: nothing loadable there; without weights also a run or an adapter.
    """
    checkpoint_path, checkpoint, spec = _read(path)
    if not weights:
        if checkpoint is not None or adapter_folder(spec.path) is not None:
            raise ModelError(
                f"{path} is a run or an adapter, and an engine of its own loads whole models: export it (stepkd export "
                f"{path} --to FOLDER), and let the engine and --model name the folder"
            )
        outline = Policy(*load_outline(spec, dtype), spec, verify_head=False)
        outline.files = _files_fingerprint(Path(spec.path).expanduser())
        return outline
    if quantization != "none" and checkpoint is not None and spec.lora is None:
        raise ModelError(
            f"{path} was trained in all weights, which a run keeps unquantised: export it (stepkd export) and "
            "quantise the export"
        )
    changes: dict[str, Any] = {
        "gradient_checkpointing": False,
        "dtype": dtype or (None if checkpoint is None else spec.dtype),
        "attention": attention or spec.attention,
    }
    if dequantise or quantization != "none":
        changes["quantization"] = quantization
    spec = replace(spec, **changes)
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
        _load_weights(policy, checkpoint, str(checkpoint_path))
    return policy


def _load_weights(policy: Policy, checkpoint: dict[str, Any], path: str) -> None:
    weights = {name.removeprefix("policy."): value for name, value in checkpoint["state_dict"].items()}
    if differing := misfit(dict(policy.trainable_parameters()), weights):
        raise ModelError(
            f"{path} holds weights of another model than its own policy section describes ({differing}): was "
            f"{policy.spec and policy.spec.path} changed since?"
        )
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
    changed checkpoint in milliseconds, not a cryptographic proof. Of weights that another process holds it covers
    the files they are read from; of the hub's names, shapes and dtypes.
    """
    return getattr(model, "files", "") or parameters_fingerprint(model.named_parameters())


def reference_fingerprint(policy: Policy) -> str:
    """:func:`weights_fingerprint` of the policy's reference: another model, or what its own adapter stands on."""
    with policy.reference() as frozen:
        named = frozen.named_parameters()
        return parameters_fingerprint(named if frozen is not policy else ((n, p) for n, p in named if "lora_" not in n))


def sampled_by(policy: Policy, sampling: Any) -> dict[str, Any]:
    """What a job notes of a model and its sampling settings (:class:`~stepkd.sampling.engine.SamplingConfig`), without
    their number of samples, as JSON values."""
    spec, settings = policy.spec, asdict(sampling) | {"stop": list(sampling.stop)}
    del settings["n"]
    name = type(policy.causal_lm).__name__ if spec is None else spec.path
    facts = {"model": name, "revision": spec and spec.revision, "weights": weights_fingerprint(policy)}
    return facts | settings


def _files_fingerprint(path: Path) -> str:
    """Short hash of the weights' files of a folder, or of a file; empty where there are none here (of the hub)."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    for file in files:
        with open(file, "rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16] if files else ""


def parameters_fingerprint(named: Iterable[tuple[str, torch.nn.Parameter]]) -> str:
    """:func:`weights_fingerprint` of some parameters, in any order."""
    digest = hashlib.sha256()
    for name, parameter in sorted(named, key=lambda pair: pair[0]):
        flat = parameter.detach().reshape(-1)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if flat.numel() and not flat.is_meta:
            stride = max(1, flat.numel() // 1000)
            digest.update(np.ascontiguousarray(flat[::stride].float().cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Short hash of everything that decides how text becomes ids: vocabulary, merges, normaliser, special tokens."""
    shape = json.loads(tokenizer.backend_tokenizer.to_str())
    shape.pop("truncation", None)  # set by whoever called last
    shape.pop("padding", None)
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def export_model(
    source: str | Path,
    out: str | Path,
    *,
    mode: Literal["merged", "adapter"] = "merged",
    dtype: str | None = None,
    layout: Layout = "stepkd",
    overwrite: bool = False,
) -> Path:
    """Write weights (safetensors), configuration, tokenizer, prompt template and a model card; of a reward model also
    its head.

    Args:
        source: a run folder, a checkpoint, an adapter folder, or any model path.
        out: the folder to write; written whole or not at all.
        mode: ``merged`` folds adapters into the weights (those of the unquantised base, after QLoRA); ``adapter``
            writes the adapter alone, in peft's format.
        dtype: weights' dtype; None keeps the one the model was trained in.
        layout: ``stepkd``: a language model, and the step head of a reward model in files of its own; or a reward model
            as others load it (:mod:`stepkd.models.layouts`): ``token_classification``, ``qwen_prm``.
        overwrite: replace an existing export.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder exists, ``adapter`` was asked of a model without one, or the layout cannot say the
            model exactly.
        ModelError: the source cannot be loaded.
        MachineError: the disk is full or the folder cannot be written; nothing is left there.
    """
    out = Path(out).expanduser().absolute()
    _check_target(out, overwrite=overwrite)
    policy = load_trained(source, dtype=dtype, dequantise=True)
    template, weights = trained_template(source), weights_fingerprint(policy)
    check_layout(layout, None if policy.step_head is None else policy.step_head.spec, policy.causal_lm.config, template)
    if layout != "stepkd" and mode == "adapter":
        raise ConfigError(f"layout {layout} is of whole models: leave mode at merged")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        save_policy(policy, temporary, mode=mode, layout=layout)
        if template is not None:
            save_template(template, temporary)
        form = mode if layout == "stepkd" else layout
        write_card(temporary, source, policy, template, title=out.name, weights=weights, form=form)
        _put_in_place(temporary, out)
    except Exception as error:  # safetensors and the tokenizer have their own classes
        if words := disk_error(error, out, "Nothing was left there. "):
            raise words from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def save_policy(
    policy: Policy, out: Path, *, mode: Literal["merged", "adapter"] = "merged", layout: Layout = "stepkd"
) -> None:
    """Write a loaded policy; merging changes it in place."""
    if mode == "adapter":
        if not policy.has_adapter:
            raise ConfigError("there is no adapter to write: the model was trained in full; use mode merged")
        base = policy.spec or PolicyConfig()
        if (base.path in TINY_PRESETS and base.init_seed) or find_checkpoint(Path(base.path).expanduser()) is not None:
            raise ConfigError(
                f"an adapter on {base.path} (random weights, or a run) cannot name its base model: use mode merged, "
                "or export that base first and train on the export"
            )
        policy.model.save_pretrained(out, safe_serialization=True)
    else:
        listed = listed_ends(policy.causal_lm)
        if listed and (more := policy.eos_ids - listed):
            policy.causal_lm.generation_config.eos_token_id = [*sorted(listed), *sorted(more)]
        if policy.has_adapter:
            _untie_adapted_head(in_base_precision(policy.model).get_base_model())
        model = policy.model.merge_and_unload() if policy.has_adapter else policy.model
        if layout != "stepkd":
            save_classifier(model, policy.require_step_head(), out, layout)
        else:
            model.save_pretrained(out, safe_serialization=True)
    policy.tokenizer.save_pretrained(out)
    if policy.step_head is not None and layout == "stepkd":
        save_step_head(policy.step_head, out)


def _untie_adapted_head(causal_lm: Any) -> None:
    """Give head and embeddings weights of their own where an adapter sits on one of two tied ones.

    Merging writes into the shared weight, which would change both; and transformers saves one of two tied weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    config = causal_lm.config.get_text_config()
    head, embeddings = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    adapted = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    if not config.tie_word_embeddings or not (isinstance(head, adapted) or isinstance(embeddings, adapted)):
        return
    own = getattr(head, "base_layer", getattr(head, "original_module", head))
    own.weight = nn.Parameter(own.weight.detach().clone(), requires_grad=False)
    causal_lm.config.tie_word_embeddings = config.tie_word_embeddings = False


def _check_target(out: Path, *, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise ConfigError(f"{out} already exists: give another folder, or set overwrite (--overwrite) to replace it")
    is_model = any((out / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
    if not out.is_dir() or not (is_model or not any(out.iterdir())):
        raise ConfigError(f"{out} is not a model folder, so overwrite does not replace it: give another folder")


def _put_in_place(temporary: Path, out: Path) -> None:
    """Rename, keeping the folder that is replaced until the new one stands."""
    if not out.exists():
        temporary.rename(out)
        return
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    out.rename(old)
    try:
        temporary.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
