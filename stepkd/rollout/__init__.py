"""Sampling completions: the Sampler protocol and its transformers backend."""

from stepkd.rollout.decode import TransformersSampler
from stepkd.rollout.draw import draw, sampling_logprobs
from stepkd.rollout.sampler import Rollout, Sampler, SamplingSpec

__all__ = ["Rollout", "Sampler", "SamplingSpec", "TransformersSampler", "draw", "sampling_logprobs"]
