"""Sampling completions: the Sampler protocol, its transformers backend, and the signals of given completions."""

from stepkd.rollout.annotate import TokenSignals, annotate
from stepkd.rollout.decode import TransformersSampler
from stepkd.rollout.draw import draw, sampling_logprobs
from stepkd.rollout.sampler import Rollout, Sampler, SamplingSpec

__all__ = [
    "Rollout",
    "Sampler",
    "SamplingSpec",
    "TokenSignals",
    "TransformersSampler",
    "annotate",
    "draw",
    "sampling_logprobs",
]
