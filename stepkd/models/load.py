"""Load weights and tokenizer from a folder, a hub id, a GGUF file, a peft adapter folder or a tiny preset."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from stepkd.errors import ConfigError, ModelError
from stepkd.models.adapter import adapter_base, adapter_folder, add_lora, first_line, load_adapter
from stepkd.models.machine import check_host_room, compute_dtype, fast_bfloat16
from stepkd.models.source import as_trained, check_source, no_model
from stepkd.models.spec import TINY_PRESETS, PolicyConfig, build_tiny, tiny_config, tiny_tokenizer
from stepkd.safe import check_remote_code
from stepkd.steps.format import marker_token_id

logger = logging.getLogger(__name__)


def load_model(spec: PolicyConfig) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        spec: see :class:`~stepkd.models.spec.PolicyConfig`.

    Returns:
        ``(model, tokenizer)``: a transformers causal language model, wrapped by peft when ``spec.lora`` is set or the
        path is an adapter folder, on the CPU (quantised: on the GPU), in evaluation mode.

    Raises:
        ModelError: nothing loadable at ``spec.path``, weights or tokenizer missing, tokenizer without an end token.
        ConfigError: settings that do not fit the model or this machine.
    """
    adapter = adapter_folder(spec.path)
    if spec.lora is not None and adapter is not None:
        raise ConfigError(
            f"policy.path={spec.path} is an adapter and policy.lora asks for a new one: drop policy.lora to continue "
            "training this adapter, or merge it first (stepkd export)"
        )
    model = _base_model(_base_spec(spec))
    tokenizer = load_tokenizer(spec)
    if tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]:
        tokenizer.pad_token = tokenizer.eos_token
    if adapter is not None:
        model = load_adapter(model, adapter)
    elif spec.lora is not None:
        model = add_lora(model, spec)
    if spec.gradient_checkpointing:
        checkpoint_layers(model)
    model.eval()
    return model, tokenizer


def load_outline(spec: PolicyConfig, dtype: str | None = None) -> tuple[Any, Any]:
    """A model's settings and its tokenizer, as :func:`load_model` gives them, without weights: they are on the ``meta``
    device.

    Args:
        spec: of a whole model.
        dtype: of the weights that are not here; None: that which they are stored in.

    Raises:
        ModelError: nothing readable there.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer, spec = load_tokenizer(spec), _base_spec(as_trained(spec))
    more = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    with torch.device("meta"):
        config, trusts = model_config(spec), spec.trust_remote_code
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusts, **more)
    if spec.path not in TINY_PRESETS:
        source, arguments = _place(spec.path, spec.revision, spec.trust_remote_code)
        with suppress(OSError):  # there need not be any
            model.generation_config = GenerationConfig.from_pretrained(source, revision=arguments.get("revision"))
    return model.eval(), tokenizer


def training_spec(spec: PolicyConfig) -> PolicyConfig:
    """A spec as training takes it: under ``auto`` weights that are all trained are float32, however they are stored.

    Raises:
        ConfigError: quantised weights without an adapter to train.
    """
    if spec.quantization != "none" and spec.lora is None:
        raise ConfigError(
            f"policy.quantization={spec.quantization!r} without policy.lora: quantised weights cannot be trained; add "
            "a lora section, or load the weights unquantised"
        )
    base = as_trained(spec)
    trains_all = base.lora is None and adapter_folder(base.path) is None
    return replace(spec, dtype="float32") if trains_all and spec.dtype is None else spec


def listed_ends(causal_lm: Any) -> frozenset[int]:
    """The ids at which the model's generation settings stop."""
    ids = getattr(getattr(causal_lm, "generation_config", None), "eos_token_id", None)
    return frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids)


def checkpoint_layers(model: Any) -> None:
    """Have a model compute its layers again in the backward pass.

    Raises:
        ConfigError: it cannot.
    """
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"policy.gradient_checkpointing does not work: {first_line(error)}") from error
    model.enable_input_require_grads()


def _base_spec(spec: PolicyConfig) -> PolicyConfig:
    """The same settings for the model below an adapter folder; any other spec as it is."""
    adapter = adapter_folder(spec.path)
    if adapter is None:
        return spec
    base, revision = adapter_base(adapter)
    return replace(spec, path=base, revision=revision)


def _base_model(spec: PolicyConfig) -> Any:
    from transformers import AutoModelForCausalLM

    arguments: dict[str, Any] = {} if spec.quantization == "none" else {"quantization_config": _quantization(spec)}
    if spec.path in TINY_PRESETS:
        return _tiny_model(spec)
    is_gguf, folder = spec.path.endswith(".gguf"), Path(spec.path).expanduser()
    if not is_gguf and not arguments and folder.is_dir():
        check_host_room(folder, spec.dtype)
    if spec.attention is not None:
        arguments["attn_implementation"] = spec.attention
    if spec.dtype is not None:
        arguments["dtype"] = getattr(torch, spec.dtype)
    else:
        arguments["dtype"] = compute_dtype() if is_gguf else "auto"
    model, report = _pretrained(AutoModelForCausalLM, spec, output_loading_info=True, **arguments)
    _check_complete(spec.path, model, report)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # repacks for inference; gradients then end at this layer
            module.support_avx512bf16_for_cpu = False
    if is_gguf:  # the weights are dequantised; with these left in place save_pretrained refuses to write them
        del model.config.quantization_config, model.hf_quantizer
        model.is_quantized = False
    if model.dtype == torch.bfloat16 and not (torch.cuda.is_available() or fast_bfloat16()):
        logger.warning(
            "%s is loaded in bfloat16, which this CPU emulates very slowly and there is no GPU: "
            "dtype float32 is many times faster",
            spec.path,
        )
    return model


def model_config(spec: PolicyConfig) -> Any:
    """Settings of a policy's model, without its weights.

    Raises:
        ModelError: nothing readable there.
    """
    from transformers import AutoConfig

    spec = _base_spec(as_trained(spec))
    if spec.path in TINY_PRESETS:
        return tiny_config(spec.path, tiny_tokenizer())
    return _pretrained(AutoConfig, spec)


def _pretrained(kind: Any, spec: PolicyConfig, **more: Any) -> Any:
    """What a class of transformers loads from where a spec points."""
    source, arguments = _place(spec.path, spec.revision, spec.trust_remote_code)
    folder = Path(source)
    if "gguf_file" not in arguments and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(no_model(folder))
        if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")):
            raise ModelError(
                f"{folder} holds a config.json but no weights (*.safetensors): was the download or the export cut off?"
            )
    try:
        return kind.from_pretrained(source, **arguments, **more)
    except Exception as error:  # transformers, safetensors, gguf and the hub raise many classes for a broken model
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{spec.path!r} ships its own Python code, which stepkd does not run unasked. Read that code; if you "
                "trust it, set policy.trust_remote_code: true"
            ) from error
        raise ModelError(
            f"cannot load {spec.path!r}: {first_line(error)}. Give an existing folder, a .gguf file, a tiny preset "
            f"({', '.join(TINY_PRESETS)}), or a hub id that this machine can reach (or has in its cache)"
        ) from error


def _tiny_model(spec: PolicyConfig) -> Any:
    if spec.quantization != "none":
        raise ConfigError(f"policy.quantization={spec.quantization!r}: the tiny presets cannot be quantised")
    model, _ = build_tiny(spec.path, seed=spec.init_seed, dtype=spec.dtype or "float32")
    if spec.attention is not None:
        try:
            model.set_attn_implementation(spec.attention)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"policy.attention={spec.attention!r} does not work: {first_line(error)}") from error
    return model


def _check_complete(path: str, model: Any, report: dict[str, Any]) -> None:
    """Refuse what transformers only warns of: weights that it had to make up."""
    if getattr(model, "peft_config", None):
        raise ModelError(
            f"{path!r} is a peft adapter: download it (hf download) and give its folder as policy.path, or give the "
            "base model"
        )
    if made_up := sorted(report["missing_keys"]):
        raise ModelError(
            f"{path!r} lacks weights that {type(model).__name__} needs ({', '.join(made_up[:3])}"
            f"{', ...' if len(made_up) > 3 else ''}; {len(made_up)} in all): they would start at random. Is it a model "
            "of another kind (an encoder, a reward model), or was it cut off?"
        )


def load_tokenizer(spec: PolicyConfig) -> Any:
    """Load and check the tokenizer of a policy.

    It comes from ``spec.tokenizer``, else from beside the weights; for an adapter folder without tokenizer files, from
    the base model. ``spec.chat_template`` replaces its own chat template. A missing pad token is replaced by the end
    token: attention masks and target positions, never pad ids, decide what counts. A missing end token is an error,
    because a policy that cannot stop cannot be sampled.

    Raises:
        ModelError: no tokenizer there, or one without an end token.
        ConfigError: a chat template of one's own that is no Jinja text, or a special token that is not one token here.
    """
    from jinja2 import TemplateSyntaxError

    where, revision = _tokenizer_place(spec)
    tokenizer = tiny_tokenizer() if where in TINY_PRESETS else _stored_tokenizer(where, revision, spec)
    for token in as_trained(spec).special_tokens:
        marker_token_id(tokenizer, token, what="policy.special_tokens:")
        tokenizer.add_tokens(token, special_tokens=True)
    if (own := as_trained(spec).chat_template) is not None:
        tokenizer.chat_template = own
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        except TemplateSyntaxError as error:
            raise ConfigError(f"policy.chat_template, line {error.lineno}: {first_line(error)}") from error
        except Exception:  # a template may refuse this message: it says so when it is used
            logger.debug("policy.chat_template refuses a lone user message")
    return tokenizer


def _stored_tokenizer(where: str, revision: str | None, spec: PolicyConfig) -> Any:
    from transformers import AutoTokenizer

    source, arguments = _place(where, revision, spec.trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **arguments)
    except Exception as error:  # transformers, tokenizers and the hub raise many classes for a broken tokenizer
        raise ModelError(
            f"no tokenizer at {source!r}: {first_line(error)}. Put the tokenizer files beside the weights or set "
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
        tokenizer.pad_token = tokenizer.eos_token


def _tokenizer_place(spec: PolicyConfig) -> tuple[str, str | None]:
    """Path or hub id of the tokenizer, and its revision."""
    spec = as_trained(spec)
    if spec.tokenizer is not None:
        return _tokenizer_place(PolicyConfig(path=spec.tokenizer))
    adapter = adapter_folder(spec.path)
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        return str(adapter), None
    base = _base_spec(spec)
    return base.path, base.revision


def _place(path: str, revision: str | None, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """Folder or hub id of what a path names, and the arguments with which transformers loads it."""
    check_remote_code(trust_remote_code)
    if path.startswith("~"):
        path = str(Path(path).expanduser())
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        arguments["revision"] = revision
    if not path.endswith(".gguf"):
        check_source(path, revision)
        return path, arguments
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"no GGUF file at {path}: give the path of an existing .gguf file")
    if find_spec("gguf") is None:
        raise ModelError(f"{path} is a GGUF file: install the reader with pip install 'stepkd[gguf]'")
    return str(file.parent), arguments | {"gguf_file": file.name}


def _quantization(spec: PolicyConfig) -> Any:
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"policy.quantization={spec.quantization!r} needs bitsandbytes: pip install 'stepkd[qlora]', or drop the "
            "setting"
        )
    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if spec.dtype is None else getattr(torch, spec.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
