"""Sampling completions: the Sampler protocol, its transformers backend, and the signals of given completions."""

from __future__ import annotations

from typing import Any

from stepkd.lazy import lazily

_HOMES = {
    "annotate": "TokenSignals annotate",
    "decode": "draw sampling_logprobs",
    "engines": "EngineConfig InProcess VLLMColocated VLLMServer",
    "sampler": "Branch BranchContinuations Sampler SamplingConfig",
    "transformers_sampler": "TransformersSampler sample",
}


def __getattr__(name: str) -> Any:
    return lazily(__name__, _HOMES, name)
