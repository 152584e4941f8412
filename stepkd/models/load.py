"""Load weights and tokenizer from a folder, a hub id, a GGUF file, a peft adapter folder or a tiny preset."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from stepkd.errors import ConfigError, ModelError
from stepkd.models.spec import PolicySpec
from stepkd.models.tiny import TINY_PRESETS, build_tiny, tiny_tokenizer

logger = logging.getLogger(__name__)

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def load_model(spec: PolicySpec) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        spec: see :class:`~stepkd.models.spec.PolicySpec`.

    Returns:
        ``(model, tokenizer)``: a transformers causal language model, wrapped by peft when ``spec.lora`` is set or the
        path is an adapter folder, on the CPU, in evaluation mode.

    Raises:
        ModelError: nothing loadable at ``spec.path``, weights or tokenizer missing, tokenizer without an end token.
    """
    path = Path(spec.path)
    adapter = path if (path / "adapter_config.json").is_file() else None
    base = _adapter_base(path) if adapter else spec.path
    model = _base_model(spec, base)
    tokenizer = load_tokenizer(spec, base)
    if spec.lora is not None and adapter is not None:
        raise ConfigError(
            f"policy.path={spec.path} is an adapter and policy.lora asks for a new one: drop policy.lora to go on "
            "training this adapter, or merge it first (stepkd export)"
        )
    if adapter is not None:
        model = _load_adapter(model, adapter)
    elif spec.lora is not None:
        model = _add_lora(model, spec)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.eval()
    return model, tokenizer


def _base_model(spec: PolicySpec, base: str) -> Any:
    from transformers import AutoModelForCausalLM

    if base in TINY_PRESETS:
        dtype = "float32" if spec.dtype == "auto" else spec.dtype
        return build_tiny(base, seed=spec.init_seed, dtype=dtype)[0]
    source, gguf_file = _split_gguf(base)
    arguments: dict[str, Any] = {
        "dtype": "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype),
        "trust_remote_code": spec.trust_remote_code,
    }
    if spec.revision is not None:
        arguments["revision"] = spec.revision
    if gguf_file is not None:
        _require_gguf(base)
        arguments["gguf_file"] = gguf_file
        if spec.dtype == "auto":
            arguments["dtype"] = torch.bfloat16
    if spec.attention is not None:
        arguments["attn_implementation"] = spec.attention
    if spec.quantization != "none":
        arguments["quantization_config"] = _quantization(spec)
    _check_folder(source, gguf_file)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **arguments)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(_load_message(base, error)) from error
    if gguf_file is not None:
        # The weights are dequantised; with these left in place save_pretrained refuses to write them.
        for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
            if hasattr(holder, name):
                delattr(holder, name)
        model.is_quantized = False
    return model


def load_tokenizer(spec: PolicySpec, base: str | None = None) -> Any:
    """Load and check the tokenizer of a policy.

    A missing pad token is replaced by the end token, with a warning: attention masks and target positions, never pad
    ids, decide what counts. A missing end token is an error, because a policy that cannot stop cannot be sampled.
    """
    from transformers import AutoTokenizer

    base = base if base is not None else spec.path
    if base in TINY_PRESETS and spec.tokenizer is None:
        return tiny_tokenizer()
    source, gguf_file = _split_gguf(spec.tokenizer or base)
    arguments: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if spec.revision is not None and spec.tokenizer is None:
        arguments["revision"] = spec.revision
    if gguf_file is not None:
        _require_gguf(base)
        arguments["gguf_file"] = gguf_file
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **arguments)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"no tokenizer at {source!r}: {_first_line(error)}. Put the tokenizer files beside the weights or set "
            "policy.tokenizer"
        ) from error
    check_tokenizer(tokenizer, source)
    return tokenizer


def check_tokenizer(tokenizer: Any, source: str) -> None:
    """Make sure there is an end token, and something to pad with."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {source!r} has no end-of-sequence token: set eos_token in its tokenizer_config.json "
            "(sampling would never stop and training could not teach the model to stop)"
        )
    if tokenizer.pad_token_id is None:
        logger.warning(
            "the tokenizer of %r has no pad token: padding with its end token %r (masks decide what counts, so the "
            "end token keeps its meaning)",
            source,
            tokenizer.eos_token,
        )
        tokenizer.pad_token = tokenizer.eos_token


def _split_gguf(path: str) -> tuple[str, str | None]:
    if path.endswith(".gguf"):
        file = Path(path)
        if not file.is_file():
            raise ModelError(f"no GGUF file at {path}: give the path of an existing .gguf file")
        return str(file.parent), file.name
    return path, None


def _require_gguf(path: str) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError(f"{path} is a GGUF file: install the reader with pip install 'stepkd[gguf]'") from error


def _check_folder(source: str, gguf_file: str | None) -> None:
    folder = Path(source)
    if gguf_file is not None:
        return
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{source} is a folder without config.json: not a transformers model folder")
        if not any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES):
            raise ModelError(
                f"{source} holds a config.json but no weights (*.safetensors): was the download or the export cut off?"
            )
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"no model folder at {source}")


def _load_message(path: str, error: Exception) -> str:
    return (
        f"cannot load {path!r}: {_first_line(error)}. Give an existing folder, a .gguf file, a tiny preset "
        f"({', '.join(TINY_PRESETS)}), or a hub id that this machine can reach (or has in its cache)"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _adapter_base(path: Path) -> str:
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{path / 'adapter_config.json'} names no base model (base_model_name_or_path)")
    return str(base)


def _quantization(spec: PolicySpec) -> Any:
    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available():
        raise ConfigError(
            f"policy.quantization={spec.quantization!r} needs a CUDA device and there is none: drop the setting, or "
            "run on a GPU machine with pip install 'stepkd[qlora]'"
        )
    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if spec.dtype == "auto" else getattr(torch, spec.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def _load_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    if not any((adapter / name).is_file() for name in ("adapter_model.safetensors",)):
        raise ModelError(f"{adapter} holds adapter_config.json but no adapter_model.safetensors")
    return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)


def _add_lora(model: Any, spec: PolicySpec) -> Any:
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
        use_rslora=lora.rslora,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"policy.lora does not fit {spec.path}: {_first_line(error)}") from error
