"""Export a trained policy into a folder that plain transformers loads (and so vLLM and the llama.cpp converters)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

from torch import nn

from stepkd.errors import ConfigError, ModelError, disk_error
from stepkd.models.adapter import ADAPTER_CONFIG, first_line, in_base_precision
from stepkd.models.checkpoint import load_trained
from stepkd.models.load import listed_ends
from stepkd.models.policy import Policy
from stepkd.models.source import find_checkpoint, save_template, trained_template
from stepkd.models.step_head import save_step_head
from stepkd.models.tiny import TINY_PRESETS


def export_model(
    source: str | Path,
    out: str | Path,
    *,
    mode: Literal["merged", "adapter"] = "merged",
    dtype: str | None = None,
    ema: bool = True,
    overwrite: bool = False,
    push_to_hub: str | None = None,
) -> Path:
    """Write weights (safetensors), configuration, tokenizer and prompt template; of a reward model also its head.

    Args:
        source: a run folder, a checkpoint, an adapter folder, or any model path.
        out: the folder to write; written whole or not at all.
        mode: ``merged`` folds adapters into the weights (those of the unquantised base, after QLoRA); ``adapter``
            writes the adapter alone, in peft's format.
        dtype: weights' dtype; None keeps the one the model was trained in.
        ema: use the averaged weights of a checkpoint that has them.
        overwrite: replace an existing export.
        push_to_hub: repository id to upload the folder to afterwards (needs credentials and a network).

    Returns:
        The folder.

    Raises:
        ConfigError: the folder exists, or ``adapter`` was asked of a model without one.
        ModelError: the source cannot be loaded, or the upload failed (the folder stays).
        MachineError: the disk is full or the folder cannot be written; nothing is left there.
    """
    out = Path(out).expanduser().absolute()
    if mode not in ("merged", "adapter"):
        raise ConfigError(f"mode={mode!r}: must be 'merged' or 'adapter'")
    _check_target(out, overwrite=overwrite)
    policy = load_trained(source, dtype=dtype, ema=ema, dequantise=True)
    template = trained_template(source)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        save_policy(policy, temporary, mode=mode)
        if template is not None:
            save_template(template, temporary)
        _put_in_place(temporary, out)
    except Exception as error:  # safetensors and the tokenizer have their own classes
        if words := disk_error(error, out, "Nothing was left there. "):
            raise words from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if push_to_hub is not None:
        _push(out, push_to_hub)
    return out


def save_policy(policy: Policy, out: Path, *, mode: Literal["merged", "adapter"] = "merged") -> None:
    """Write a loaded policy; merging changes it in place."""
    if mode == "adapter":
        if not policy.has_adapter:
            raise ConfigError("there is no adapter to write: the model was trained in full; use --mode merged")
        if policy.spec is not None and policy.spec.path in TINY_PRESETS and policy.spec.init_seed != 0:
            raise ConfigError(
                f"an adapter on random weights (policy.init_seed={policy.spec.init_seed}) cannot name its base model; "
                "use --mode merged"
            )
        if policy.spec is not None and find_checkpoint(Path(policy.spec.path).expanduser()) is not None:
            raise ConfigError(
                f"an adapter on the run {policy.spec.path} cannot name its base model: use --mode merged, or export "
                "that run first and train on the export"
            )
        policy.model.save_pretrained(out, safe_serialization=True)
    else:
        listed = listed_ends(policy.causal_lm)
        if listed and (more := policy.eos_ids - listed):
            policy.causal_lm.generation_config.eos_token_id = [*sorted(listed), *sorted(more)]
        if policy.has_adapter:
            _untie_adapted_head(in_base_precision(policy.model).get_base_model())
        model = policy.model.merge_and_unload() if policy.has_adapter else policy.model
        model.save_pretrained(out, safe_serialization=True)
    policy.tokenizer.save_pretrained(out)
    if policy.step_head is not None:
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
    own = head
    if isinstance(head, BaseTunerLayer):
        own = head.get_base_layer()
    elif isinstance(head, AuxiliaryTrainingWrapper):
        own = head.original_module
    own.weight = nn.Parameter(own.weight.detach().clone(), requires_grad=False)
    causal_lm.config.tie_word_embeddings = config.tie_word_embeddings = False


def _check_target(out: Path, *, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise ConfigError(f"{out} already exists: give another folder, or --overwrite to replace it")
    is_model = any((out / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
    if not out.is_dir() or not (is_model or not any(out.iterdir())):
        raise ConfigError(f"{out} is not a model folder, so --overwrite does not replace it: give another folder")


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


def _push(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True, private=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder))
    except Exception as error:  # the hub's own errors, those of its HTTP library, and bad repository ids
        raise ModelError(
            f"the upload to {repository} failed ({type(error).__name__}: {first_line(error)}); the export is "
            f"complete in {folder}: log in (hf auth login) and upload that folder"
        ) from error
