"""Settings of a model: what to load, in which precision, and what to train.

The same :class:`PolicySpec` sits under the key ``policy`` of every method, so one overlay in ``recipes/base/`` serves
all of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from stepkd.errors import ConfigError, check_bounds

Quantization = Literal["none", "nf4", "int8"]
"""How base weights are kept: as they are, or in 4 or 8 bits."""
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), through peft."""

    r: int = 16
    """Rank, >= 1."""
    alpha: float = 32.0
    """Numerator of the adapter's scale ``alpha / r``, > 0."""
    dropout: float = 0.0
    """Dropout on the adapter's input in [0, 1). Preference and distillation methods need 0."""
    target_modules: str | list[str] = "all-linear"
    """Module names, a regular expression, or ``all-linear`` (every linear layer but the head)."""
    modules_to_save: list[str] | None = None
    """Modules trained in full beside the adapters, for instance ``[lm_head]``."""
    rslora: bool = False
    """Scale by ``alpha / sqrt(r)`` (rank-stabilised LoRA)."""

    def __post_init__(self) -> None:
        check_bounds("policy.lora.", self, r="[1, inf)", alpha="(0, inf)", dropout="[0, 1)")


@dataclass(frozen=True)
class PolicySpec:
    """The model that is trained."""

    path: str = "tiny-0.5m"
    """A run folder, a model folder, a hub id (``org/name``), a ``.gguf`` file, a peft adapter folder, or a tiny preset
    (``tiny-0.1m``, ``tiny-0.5m``, ``tiny-2m``: random weights, character tokenizer)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer when it is not beside the weights."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's: a Jinja file, or its text. Checkpoints hold it, exports write it into
    the tokenizer."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "float32"
    """Parameter dtype; ``auto``: as stored. What is trained is float32: adapters and ``modules_to_save`` on any base,
    all weights under ``auto``; ``bfloat16`` without adapters is refused by ``fit``."""
    attention: str | None = None
    """``sdpa``, ``eager``, ``flash_attention_2``, ``flex_attention``; None lets transformers choose."""
    gradient_checkpointing: bool = False
    """Recompute block activations in the backward pass: less memory, about a third more time."""
    lora: LoraSpec | None = None
    """Train adapters instead of all weights."""
    quantization: Quantization = "none"
    """Base weights in 4 or 8 bits (QLoRA, through bitsandbytes, CUDA only); needs ``lora``."""
    init_seed: int = 0
    """Seed of the weights of a tiny preset, and of fresh adapters."""
    trust_remote_code: bool = False
    """Run Python code that a model repository ships. Off by default; turn on only for code you have read."""

    trained: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("policy.path is empty: give a folder, a hub id, a .gguf file or a tiny preset")
        if self.chat_template is not None:
            object.__setattr__(self, "chat_template", _jinja(self.chat_template))
        check_bounds("policy.", self)
        if self.trained and self.quantization != "none" and self.lora is None:
            raise ConfigError(
                f"policy.quantization={self.quantization!r} without policy.lora: quantised weights cannot be trained; "
                "add a lora section, or load the weights unquantised"
            )


def _jinja(value: str) -> str:
    """The text of a chat template that is given as a file or as such."""
    text = value
    if "{" not in value:
        try:
            text = Path(value).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"policy.chat_template={value!r}: no readable Jinja file, and no Jinja text") from error
    if "{{" not in text:
        raise ConfigError(f"policy.chat_template={value!r}: writes nothing of a message (it holds no {{{{ }}}})")
    return text


class FrozenSpec(PolicySpec):
    """A model that is only read: its weights may be quantised without an adapter."""

    trained = False


def spec_to_dict(spec: PolicySpec) -> dict[str, Any]:
    """Plain nested dict of a spec, for checkpoints and manifests."""
    return asdict(spec)


def spec_from_dict(values: dict[str, Any]) -> PolicySpec:
    """Inverse of :func:`spec_to_dict`; unknown keys (from a newer version) raise ConfigError."""
    known = {f.name for f in fields(PolicySpec)}
    if unknown := set(values) - known:
        raise ConfigError(f"unknown policy settings {sorted(unknown)}: was this written by a newer stepkd?")
    lora = values.get("lora")
    if isinstance(lora, dict):
        if unknown := set(lora) - {f.name for f in fields(LoraSpec)}:
            raise ConfigError(f"unknown policy.lora settings {sorted(unknown)}: was this written by a newer stepkd?")
        lora = LoraSpec(**lora)
    return PolicySpec(**{**values, "lora": lora})
