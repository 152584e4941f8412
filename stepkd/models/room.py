"""Whether weights fit, said before a machine swaps itself to death or a kernel kills the process without a word.

Only folders are looked at, not hub ids that are still to be downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from stepkd.errors import ModelError
from stepkd.models.limits import memory_free

_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def check_host_room(folder: Path, dtype: str) -> None:
    """Refuse to load a folder's weights that are larger than the memory that is free.

    Args:
        folder: a transformers model folder.
        dtype: what they become in memory; ``auto``: as stored.

    Raises:
        ModelError: names the bytes needed and free.
    """
    stored = sum(file.stat().st_size for file in _weight_files(folder))
    wanted = _BYTES.get(dtype)
    if wanted is not None:
        stored = stored * wanted // _BYTES.get(_stored_dtype(folder), wanted)
    free = memory_free()
    if free is not None and stored > free:
        raise ModelError(
            f"{folder} needs {stored:,} bytes ({stored / 2**30:.1f} GiB) for its weights"
            f"{'' if wanted is None else f' in {dtype}'}, and this machine has {free:,} ({free / 2**30:.1f} GiB) free: "
            "load it in bfloat16, quantise it, or take a smaller model"
        )


def device_room(device: torch.device) -> int:
    """Free memory of a CUDA device, in bytes."""
    return int(torch.cuda.mem_get_info(device)[0])


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads, not every copy of the weights that lies there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        return [folder / name for name in names if (folder / name).is_file()]
    return list(folder.glob("model*.safetensors")) or list(folder.glob("pytorch_model*.bin"))


def _stored_dtype(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(config.get("dtype") or config.get("torch_dtype") or "")
