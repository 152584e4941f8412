"""The dtype that a job samples in where its settings leave it to the machine: measured once, the same on every rank."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from stepkd.errors import ConfigError
from stepkd.models.checkpoint import load_trained
from stepkd.models.machine import fast_bfloat16
from stepkd.models.packed import PACKED_FROM
from stepkd.models.policy import Policy
from stepkd.runs.job import Job
from stepkd.sampling.config import EngineConfig, VLLMServer
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine

logger = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float32")
"""What is measured on a CPU."""


def settled_dtype(
    wanted: str | None, model: str, engine: EngineConfig, device: torch.device, job: Job, name: str
) -> str | None:
    """The dtype in which a job loads the model that it samples from.

    Args:
        wanted: the job's setting; ``auto`` has rank 0 measure it (:func:`measured_dtype`), once for the whole job.
        model: as :func:`~stepkd.models.checkpoint.load_trained` takes it.
        engine: what will sample from it.
        device: where.
        job: keeps what was measured in its settings.
        name: dotted name of the dtype there.

    Raises:
        ConfigError: ``auto`` for a server, whose weights are its own.
    """
    if wanted != "auto":
        return wanted
    if isinstance(engine, VLLMServer):
        raise ConfigError("dtype=auto is measured in this process, and a server samples in its own type: drop it")
    found = job.settled(name, lambda: measured_dtype(partial(load_trained, model), device, engine.at_once))
    return None if found is None else str(found)


def measured_dtype(load: Callable[..., Policy], device: torch.device, rows: int) -> str:
    """What a model samples faster in: on a GPU bfloat16 where it has that; on a CPU without bfloat16 instructions
    float32; else by a few decoding steps in both.

    Args:
        load: gives the model in a ``dtype``.
        device: where it samples.
        rows: completions that are decoded at once; no more than 32 are timed.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if not fast_bfloat16():
        return "float32"
    seconds = {dtype: _seconds_per_token(load(dtype=dtype).to(device), min(rows, 32)) for dtype in DTYPES}
    dtype = faster_dtype(seconds)
    logger.info("dtype auto: %s (%s)", dtype, ", ".join(f"{name} {1 / s:.0f} tokens/s" for name, s in seconds.items()))
    return dtype


def _seconds_per_token(policy: Policy, rows: int) -> float:
    engine = TransformersEngine(policy)
    for tokens in (4, 2 * PACKED_FROM):  # the first warm up; the others read packed weights, as in jobs
        spec = SamplingConfig(n=rows, max_new_tokens=tokens)
        start = time.perf_counter()
        (drawn,) = engine.generate([[0] * 8], spec, purpose="measure")
        seconds = time.perf_counter() - start
    return seconds / sum(len(each.token_ids) for each in drawn)


def faster_dtype(seconds: Mapping[str, float]) -> str:
    """The dtype to sample in, by the seconds that a token takes in each; bfloat16 must save a tenth: in float32 greedy
    tokens are the same from every engine."""
    return "bfloat16" if seconds["bfloat16"] < 0.9 * seconds["float32"] else "float32"
