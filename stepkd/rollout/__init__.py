"""Sampling completions: the Sampler protocol, its transformers backend, and the signals of given completions."""

from stepkd.rollout.annotate import TokenSignals, annotate
from stepkd.rollout.decode import draw, sampling_logprobs
from stepkd.rollout.sampler import (
    Branch,
    BranchRollouts,
    BranchSampler,
    Drawn,
    Rollout,
    SampleCounts,
    Sampler,
    SamplingSpec,
)
from stepkd.rollout.transformers_sampler import TransformersSampler

__all__ = [
    "Branch",
    "BranchRollouts",
    "BranchSampler",
    "Drawn",
    "Rollout",
    "SampleCounts",
    "Sampler",
    "SamplingSpec",
    "TokenSignals",
    "TransformersSampler",
    "annotate",
    "draw",
    "sampling_logprobs",
]
