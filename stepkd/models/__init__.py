"""Models: load (hub id, folder, GGUF, tiny preset), adapters, reference views, vocabulary heads, export."""

from __future__ import annotations

from stepkd.lazy import lazily

_HOMES = {
    "head": "check_head positions_from_mask real_vocab_size vocab_head",
    "load": "load_model load_tokenizer",
    "policy": "Policy",
    "spec": (
        "Classifier LabelTokens LoRAConfig PolicyConfig StepHeadConfig TINY_PRESETS build_tiny spec_from_dict "
        "tiny_tokenizer"
    ),
    "step_head": "StepHead",
}

__getattr__ = lazily(__name__, _HOMES)
