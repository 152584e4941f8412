"""Sampling completions: the Engine protocol, its transformers backend, and the signals of given completions."""

from __future__ import annotations

from stepkd.lazy import lazily

_HOMES = {
    "annotate": "TokenSignals annotate",
    "config": "EngineConfig Transformers VLLM VLLMServer",
    "draw": "draw sampling_logprobs",
    "engine": "Branch BranchContinuations Engine SamplingConfig",
    "transformers_engine": "TransformersEngine sample",
}

__getattr__ = lazily(__name__, _HOMES)
