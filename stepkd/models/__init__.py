"""Models: load (hub id, folder, GGUF, tiny preset), adapters, reference views, vocabulary heads, export."""

from stepkd.models.head import check_head, real_vocab_size, vocab_head
from stepkd.models.load import load_model, load_tokenizer
from stepkd.models.policy import Policy, positions_from_mask
from stepkd.models.spec import (
    TINY_PRESETS,
    LoraSpec,
    PolicySpec,
    build_tiny,
    spec_from_dict,
    spec_to_dict,
    tiny_tokenizer,
)
from stepkd.models.step_head import StepHead, StepHeadSpec

__all__ = [
    "TINY_PRESETS",
    "LoraSpec",
    "Policy",
    "PolicySpec",
    "StepHead",
    "StepHeadSpec",
    "build_tiny",
    "check_head",
    "load_model",
    "load_tokenizer",
    "positions_from_mask",
    "real_vocab_size",
    "spec_from_dict",
    "spec_to_dict",
    "tiny_tokenizer",
    "vocab_head",
]
