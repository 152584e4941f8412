"""Settings of a model: what to load, in which precision, what to train, and how it scores steps; and the tiny models,
which are made here.

The same :class:`PolicyConfig` sits under the key ``policy`` of every method, so one overlay in ``recipes/base/`` serves
all of them. The tiny world has a character tokenizer and Llama models of 0.1M to 2M parameters; nothing is downloaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stepkd.errors import NOT_MEASURED, ConfigError, ModelError, check_bounds, check_choice
from stepkd.steps.format import Meaning, StepFormat

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DType = Literal["float32", "bfloat16", "float16", "float64"]
"""Numeric type of a model's weights."""
Quantization = Literal["none", "nf4", "int8"]
"""How base weights are kept: as they are, or in 4 or 8 bits."""


@dataclass(frozen=True)
class LoRAConfig:
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

    def __post_init__(self) -> None:
        check_bounds("policy.lora.", self, r="[1, inf)", alpha="(0, inf)", dropout="[0, 1)")


@dataclass(frozen=True)
class PolicyConfig:
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
    special_tokens: tuple[str, ...] = ()
    """Tokens that the tokenizer has and that texts shall not show, such as the tags of steps; exports keep them so."""
    dtype: DType | None = "float32"
    """Parameter dtype; null is the stored one. What is trained is float32: adapters and ``modules_to_save`` on any
    base, all weights under null; ``bfloat16`` without adapters is refused by ``fit``."""
    allow_low_precision: bool = False
    """Let ``fit`` train weights that ``dtype`` makes bfloat16, with moments of the optimiser in bfloat16 too: half the
    memory, and most small updates are rounded away, so that it is off and meant for comparisons of memory and speed."""
    attention: str | None = None
    """``sdpa``, ``eager``, ``flash_attention_2``, ``flex_attention``; None lets transformers choose."""
    gradient_checkpointing: bool = False
    """Recompute block activations in the backward pass: less memory, about a third more time."""
    lora: LoRAConfig | None = None
    """Train adapters instead of all weights."""
    quantization: Quantization = "none"
    """Base weights in 4 or 8 bits (QLoRA, through bitsandbytes); what is trained then needs ``lora``."""
    init_seed: int = 0
    """Seed of the weights of a tiny preset, and of fresh adapters."""
    trust_remote_code: bool = False
    """Run Python code that a model repository ships. Off by default; turn on only for code you have read."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("policy.path is empty: give a folder, a hub id, a .gguf file or a tiny preset")
        if str(self.dtype) == "auto":
            raise ConfigError(f"policy.dtype=auto: {NOT_MEASURED}")
        if self.chat_template is not None:
            object.__setattr__(self, "chat_template", _jinja(self.chat_template))
        check_bounds("policy.", self, init_seed="[0, inf)")


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


def spec_from_dict(values: dict[str, Any]) -> PolicyConfig:
    """Settings from the plain dict (``dataclasses.asdict``) in a checkpoint; unknown keys raise ConfigError."""
    lora = values.get("lora")
    for name, kind, found in (("policy", PolicyConfig, values), ("policy.lora", LoRAConfig, lora or {})):
        if unknown := set(found) - {each.name for each in fields(kind)}:
            raise ConfigError(f"unknown {name} settings {sorted(unknown)}: was this written by a newer stepkd?")
    special = tuple(values.get("special_tokens", ()))
    return PolicyConfig(**{**values, "special_tokens": special, "lora": lora and LoRAConfig(**lora)})


class StepHeadConfig(ABC):
    """How steps are scored, by :class:`LabelTokens` or a :class:`Classifier`; recorded in checkpoints and exports."""

    kind: ClassVar[str]
    """Its name in ``step_head.json``."""
    format: StepFormat
    neutral: Literal["correct", "incorrect", "half"]
    meaning: Meaning
    subclasses: int = 1
    members: int = 1

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """C, from worst to best: 2, or 3 with neutral in the middle."""

    def to_dict(self) -> dict[str, Any]:
        """The settings as ``step_head.json`` and checkpoints hold them; :func:`step_head_from_dict` reads them."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True)
class _Head(StepHeadConfig):
    format: StepFormat = field(default_factory=StepFormat)
    """Separators and markers of the steps."""
    neutral: Literal["correct", "incorrect", "half"] = "correct"
    """What a neutral class counts as in a score; "Let's Verify Step by Step" counts it as correct."""
    meaning: Meaning = "correctness"
    """What the scores estimate; decides how they are reduced to one number per solution."""

    def __post_init__(self) -> None:
        check_bounds("head.", self)
        if self.format.marker_place == "prompt_end" and self.meaning != "outcome":
            raise ConfigError(
                f"head.meaning={self.meaning!r}: a head that reads the prompt alone (format.marker_place: prompt_end) "
                "scores no steps; set head.meaning: outcome (and data.labels.scope: outcome)"
            )


@dataclass(frozen=True, kw_only=True)
class LabelTokens(_Head):
    """The vocabulary head's probability of a good and a bad token at the step marker (Math-Shepherd, ASPRM)."""

    labels: tuple[str, ...] = ("-", "+")
    """Label tokens from worst to best, each one token: two, or three with neutral in the middle."""
    restricted: bool = True
    """Probabilities among the label tokens only; off, over the whole vocabulary, which training then also has to learn
    to leave (ASPRM's choice). Scores are always among the label tokens."""

    kind = "label_tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "labels", tuple(self.labels))
        if len(self.labels) not in (2, 3) or len(set(self.labels)) != len(self.labels):
            raise ConfigError(f"head.labels={list(self.labels)}: two or three different tokens, from worst to best")
        if self.format.marker is None:
            raise ConfigError("label tokens are predicted at a step marker: set head.format.marker")

    @property
    def num_classes(self) -> int:
        """One per label."""
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Classifier(_Head):
    """A small head on the hidden state, in place of the vocabulary (Qwen2.5-Math-PRM)."""

    classes: int = 2
    """Outputs: 2 (incorrect, correct) or 3 (incorrect, neutral, correct)."""
    layers: int = 2
    """Layers: 2, or 1 as transformers' token classification models have (TRL's PRMTrainer)."""
    subclasses: int = 1
    """Sub-classes of each class, >= 1: as many outputs a class, whose probabilities add up to the class's; above 1 for
    ``StepDistillation`` (LELP, arXiv 2409.20449)."""
    members: int = 1
    """Heads of different first weights on the one model, >= 1, each trained by itself (``StepCrossEntropy``,
    ``StepDistillation``), whose scores are averaged; ``stepkd score`` keeps each one's, for how they differ says where
    labels are wanted (ActPRM, arXiv 2504.10559)."""

    kind = "classifier"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds("head.", self, classes="[2, 3]", layers="[1, 2]", subclasses="[1, inf)", members="[1, inf)")
        if self.members > 1 and self.subclasses > 1:
            raise ConfigError(
                f"head.members={self.members}, head.subclasses={self.subclasses}: sub-classes are those of one head; "
                "set one of both to 1"
            )

    @property
    def num_classes(self) -> int:
        """One per output."""
        return self.classes


_KINDS: dict[str, type[LabelTokens] | type[Classifier]] = {each.kind: each for each in (LabelTokens, Classifier)}


def step_head_from_dict(values: Mapping[str, Any]) -> StepHeadConfig:
    """Inverse of :meth:`StepHeadConfig.to_dict`. Files of 0.1 hold the settings of all kinds, of which those of others
    are left, and other words for ``neutral``.

    Raises:
        ConfigError: an unknown kind, or settings that cannot be.
        ModelError: unknown keys (from a newer version).
    """
    older = {"right": "correct", "wrong": "incorrect"}
    values = {name: older.get(value, value) if name == "neutral" else value for name, value in values.items()}
    layout = dict(values.get("format", {}))
    check_choice("head.kind", kind := values.get("kind", LabelTokens.kind), _KINDS)
    own = {each.name for each in fields(_KINDS[kind])}
    known = {"kind"}.union(*({each.name for each in fields(member)} for member in _KINDS.values()))
    if unknown := set(values) - known | set(layout) - {each.name for each in fields(StepFormat)}:
        raise ModelError(f"unknown step head settings {sorted(unknown)}: was this written by a newer stepkd?")
    return _KINDS[kind](**{name: values[name] for name in own & set(values)} | {"format": StepFormat(**layout)})


TINY_CONTEXT = 1024
"""Longest sequence in tokens, of the tokenizer and of every preset."""

TINY_PRESETS: dict[str, dict[str, int]] = {
    "tiny-0.1m": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 2},
    "tiny-0.5m": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
    "tiny-2m": {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 4, "num_attention_heads": 6},
}
"""LlamaConfig settings by preset; heads are 32 wide, embeddings tied, 100 tokens of vocabulary."""

_PAD, _EOS, _UNK = "<pad>", "<eos>", "<unk>"
_PRINTABLE = [chr(code) for code in range(0x20, 0x7F)]
_VOCABULARY = [_PAD, _EOS, _UNK, "####", "\n", *_PRINTABLE]


_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build the character tokenizer of the tiny world.

    One token for each printable ASCII character and the newline, one for ``####``, and ``<pad>``, ``<eos>``, ``<unk>``:
    the same 100 tokens for every task. Nothing is added, trimmed or cleaned up, so text of these characters survives
    encoding and decoding exactly; any other character becomes ``<unk>``.

    Returns:
        A fast tokenizer with offsets, a chat template and a maximum length of `TINY_CONTEXT` tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(_VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"####|[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=TINY_CONTEXT,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def tiny_config(preset: str, tokenizer: Any) -> LlamaConfig:
    """Return the model settings of a preset for a tokenizer's vocabulary and special tokens.

    Args:
        preset: a name in `TINY_PRESETS`.
        tokenizer: gives the vocabulary size and the pad, eos and (optional) bos ids.

    Raises:
        ConfigError: unknown preset.
    """
    from transformers import LlamaConfig

    check_choice("tiny model preset", preset, TINY_PRESETS)
    return LlamaConfig(
        **TINY_PRESETS[preset],
        vocab_size=len(tokenizer),
        max_position_embeddings=TINY_CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_tiny(preset: str, *, seed: int, dtype: str = "float32") -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Build an untrained tiny Llama and its tokenizer.

    Args:
        preset: a name in `TINY_PRESETS`.
        seed: seed of the weights, 0 to 2**63 - 1. The global generators are left as they were.
        dtype: name of torch's type. Weights are drawn in float32 and cast, so that all types start from the same point.

    Returns:
        The model on the CPU in evaluation mode, and the tokenizer.

    Raises:
        ConfigError: unknown preset.
    """
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    config = tiny_config(preset, tokenizer)
    # The constructor draws from the CPU's global generator; these weights are thrown away and its state is put back.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.ndim == 1:
                weight.fill_(1.0)  # the norms' scales
            else:
                weight.normal_(0.0, config.initializer_range, generator=generator)
    return model.to(getattr(torch, dtype)).eval(), tokenizer
