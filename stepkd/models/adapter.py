"""Adapters through peft: add fresh ones to a model, or load a folder of trained ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stepkd.errors import ConfigError, ModelError
from stepkd.models.spec import PolicyConfig

LOW_PRECISION = (torch.float16, torch.bfloat16)
"""Dtypes in which updates of a usual learning rate are less than the rounding of the weights."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_folder(path: str) -> Path | None:
    """The folder a path means, when it holds a peft adapter."""
    folder = Path(path).expanduser()
    return folder if (folder / ADAPTER_CONFIG).is_file() else None


def adapter_base(folder: Path) -> tuple[str, str | None]:
    """The base model an adapter was trained on, as ``(path or hub id, hub revision)``.

    Raises:
        ModelError: its settings cannot be read or name no base model.
    """
    file = folder / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {first_line(error)}") from error
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not base:
        raise ModelError(f"{file} names no base model: set its base_model_name_or_path")
    return str(base), config.get("revision")


def load_adapter(model: Any, folder: Path) -> Any:
    """Put a trained adapter on its base model; its weights can be trained further.

    Raises:
        ModelError: weights missing or of another base model, or an adapter that is more than weights in the layers.
    """
    from peft import PeftConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{folder} holds {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}: was the export cut off?")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            # Hidden states are taken from the transformer itself, which never sees the virtual tokens.
            raise ModelError(
                f"{folder} holds a prompt-learning adapter ({config.peft_type.value}); stepkd loads adapters inside "
                "layers (LoRA and its kin)"
            )
        renamed = getattr(model, "_checkpoint_conversion_mapping", None)
        weights = load_peft_weights(str(folder), device="cpu", key_mapping=renamed)
        adapted = add_empty_adapter(model, folder)
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except ModelError:
        raise
    except Exception as error:  # peft and safetensors raise many classes for a broken or foreign file
        raise ModelError(f"cannot load the adapter in {folder}: {first_line(error)}") from error
    differing = misfit(expected, weights)
    try:
        report = set_peft_model_state_dict(adapted, weights)
        trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        if not report.unexpected_keys and trained.isdisjoint(report.missing_keys):
            differing = ""  # older layouts, which only peft can read, or base weights beside the adapter's
    except (KeyError, RuntimeError, ValueError) as error:
        differing = differing or first_line(error)
    if differing:
        raise ModelError(
            f"the adapter in {folder} does not fit {config.base_model_name_or_path}, the base model that its "
            f"{ADAPTER_CONFIG} names ({differing}): it would be loaded in part, or not at all. Export it again, or "
            "name the base model that it was trained on"
        )
    return adapted


def misfit(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """How weights differ from those a model wants, with counts and examples; empty where names and shapes agree.

    Args:
        expected: names and weights (anything with a ``shape``) of the model.
        found: of the file.
    """
    shapes = [name for name in expected if name in found and expected[name].shape != found[name].shape]
    parts = {
        "missing": sorted(set(expected) - set(found)),
        "left over": sorted(set(found) - set(expected)),
        "of another shape": [f"{n}: {[*found[n].shape]} for {[*expected[n].shape]}" for n in sorted(shapes)],
    }
    return "; ".join(
        f"{len(names)} {what}: {', '.join(names[:2])}{', ...' if len(names) > 2 else ''}"
        for what, names in parts.items()
        if names
    )


def add_empty_adapter(model: Any, folder: Path) -> Any:
    """Wrap a model with adapters shaped like those of a folder, whose weights are not read."""
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    model.name_or_path = config.base_model_name_or_path  # which peft would overwrite, with a warning
    return _in_float32(get_peft_model(model, config))


def add_lora(model: Any, spec: PolicyConfig) -> Any:
    """Wrap a model with the fresh adapters ``spec.lora`` describes.

    Raises:
        ConfigError: the target modules do not exist, or other settings that peft refuses.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    assert spec.lora is not None
    lora = spec.lora
    if spec.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=spec.gradient_checkpointing)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
    )
    try:
        # peft draws the adapters from the global generators; keyed here, the same spec gives the same policy.
        with torch.random.fork_rng():
            torch.manual_seed(spec.init_seed)
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"policy.lora does not fit {spec.path}: {first_line(error)}") from error
    saved = [f".{key}" for key, module in adapted.named_modules() if hasattr(module, "modules_to_save")]
    if unknown := [name for name in lora.modules_to_save or () if not any(key.endswith(f".{name}") for key in saved)]:
        raise ConfigError(f"policy.lora.modules_to_save names {unknown}, which {spec.path} does not have")
    # peft records the model's own name, which is empty for tiny presets and only the folder for a GGUF file.
    adapted.active_peft_config.base_model_name_or_path = spec.path
    adapted.active_peft_config.revision = spec.revision
    return _in_float32(adapted)


def _in_float32(adapted: Any) -> Any:
    """Keep modules that are trained in full beside an adapter in float32, as peft keeps the adapter.

    They compute in the precision of the base, so that an untrained one gives what the base gives.
    """
    for wrapper, dtype in _saved_modules(adapted):
        if dtype in LOW_PRECISION:
            for module in wrapper.modules_to_save.values():
                module.float().register_forward_pre_hook(partial(_round_weights, dtype))
                module.register_forward_hook(_put_back, always_call=True)
    return adapted


def in_base_precision(adapted: Any) -> Any:
    """Round modules that are trained in full to the precision of the base, for a model that is stored whole."""
    for wrapper, dtype in _saved_modules(adapted):
        wrapper.modules_to_save.to(dtype)
    return adapted


def _saved_modules(adapted: Any) -> Iterator[tuple[Any, torch.dtype]]:
    """Modules trained in full, and their precision in the base."""
    from peft.utils.other import ModulesToSaveWrapper

    for wrapper in adapted.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            yield wrapper, next(wrapper.original_module.parameters()).dtype


def _round_weights(dtype: torch.dtype, module: Any, _: Any) -> None:
    module.masters = [(part._parameters, dict(part._parameters)) for part in module.modules()]
    for weights, masters in module.masters:
        weights.update({name: None if value is None else value.to(dtype) for name, value in masters.items()})


def _put_back(module: Any, *_: Any) -> None:
    for weights, masters in module.__dict__.pop("masters", ()):
        weights.update(masters)


def first_line(error: BaseException) -> str:
    """First line of a library's error message (or its class name), for use inside one of ours."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
