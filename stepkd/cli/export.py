"""Write a trained model as a folder that plain transformers (and so vLLM and the llama.cpp converters) loads.

stepkd export runs/sft --to models/sft
stepkd export runs/sft --to models/sft-adapter --mode adapter
stepkd export runs/prm --to models/prm --layout token_classification
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of ``stepkd export``."""

    POSITIONAL: ClassVar = ("source",)

    source: str
    """What is exported: a run folder (its best checkpoint), a .ckpt file, an adapter folder, a .gguf file or model."""
    to: str
    """Folder to write, whole or not at all."""
    mode: Literal["merged", "adapter"] = "merged"
    """``merged`` folds an adapter into the weights, which every program loads; ``adapter`` writes it alone."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the written weights; null keeps the one that the model was trained in."""
    layout: Literal["stepkd", "token_classification", "qwen_prm"] = "stepkd"
    """Layout of a reward model: ``stepkd`` (the language model, its step head in files beside it), or one that other
    programs load, ``token_classification`` (transformers, TRL) or ``qwen_prm`` (Qwen2.5-Math-PRM; Qwen2 models alone);
    what a layout cannot say exactly is refused."""
    overwrite: bool = False
    """Replace an existing export."""


def run(config: ExportConfig) -> int:
    """Run ``stepkd export``."""
    from stepkd.models.checkpoint import export_model
    from stepkd.runs.process import quiet_libraries

    quiet_libraries()
    settings = asdict(config)
    folder = export_model(settings.pop("source"), settings.pop("to"), **settings)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    print(f"wrote {folder} ({size / 2**20:.1f} MiB)")
    return 0
