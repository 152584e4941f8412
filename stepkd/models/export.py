"""Export a trained policy into a folder that plain transformers loads (and so vLLM and the llama.cpp converters)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

from stepkd.errors import ConfigError, ModelError
from stepkd.models.checkpoint import load_trained
from stepkd.models.policy import Policy


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
    """Write weights (safetensors), configuration and tokenizer.

    Args:
        source: a run folder, a checkpoint, an adapter folder, or any model path.
        out: the folder to write; written whole or not at all.
        mode: ``merged`` folds adapters into the weights; ``adapter`` writes the adapter alone, in peft's format.
        dtype: weights' dtype; None keeps the one the model was trained in.
        ema: use the averaged weights of a checkpoint that has them.
        overwrite: replace an existing folder.
        push_to_hub: repository id to upload the folder to afterwards (needs credentials and a network).

    Returns:
        The folder.

    Raises:
        ConfigError: the folder exists, or ``adapter`` was asked of a model without one.
        ModelError: the source cannot be loaded, or the upload failed (the folder stays).
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} already exists: give another folder, or --overwrite to replace it")
    policy = load_trained(source, dtype=dtype, ema=ema)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_policy(policy, temporary, mode=mode)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
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
        policy.model.save_pretrained(out, safe_serialization=True)
    elif mode == "merged":
        model = policy.model.merge_and_unload() if policy.has_adapter else policy.model
        model.save_pretrained(out, safe_serialization=True)
    else:
        raise ConfigError(f"mode={mode!r}: must be 'merged' or 'adapter'")
    policy.tokenizer.save_pretrained(out)


def _push(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True, private=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"the upload to {repository} failed ({type(error).__name__}: {str(error).splitlines()[0]}); the export is "
            f"complete in {folder}: log in (hf auth login) and upload that folder"
        ) from error
