"""Where training samples: in this process, on a vLLM server, or in a vLLM engine on the training GPUs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from stepkd.errors import check_bounds
from stepkd.sampling.engine import Engine, SamplingConfig


class EngineConfig(ABC):
    """Where completions are sampled: :class:`Transformers`, :class:`VLLMServer` or :class:`VLLM`."""

    holds_weights: ClassVar[bool] = True
    """Whether it samples from weights in this process; else a job reads the model's settings and tokenizer only."""

    @property
    @abstractmethod
    def at_once(self) -> int:
        """Completions that are sampled at the same time; in a job the size of a unit of work, which a kill can lose."""

    @abstractmethod
    def build(self, policy: Any, sampling: SamplingConfig, breaks_off: Callable[[], bool] | None = None) -> Engine:
        """The engine.

        Args:
            policy: the :class:`~stepkd.models.policy.Policy` that is sampled from.
            sampling: how it will be asked to draw.
            breaks_off: asked while it samples; once it says yes, completions end where they are. None: never.

        Raises:
            ConfigError: what it needs is not there.
        """


@dataclass(frozen=True)
class Transformers(EngineConfig):
    """This process's own decoding, with the weights that are trained."""

    max_rows: int = 64
    """Completions that are decoded at once, >= 1; memory grows with it. In a job also the size of a unit of work, and
    part of what decides the result: batch shapes decide rounding."""

    def __post_init__(self) -> None:
        check_bounds("engine.", self, max_rows="[1, inf)")

    @property
    def at_once(self) -> int:
        """``max_rows``."""
        return self.max_rows

    def build(self, policy: Any, sampling: SamplingConfig, breaks_off: Callable[[], bool] | None = None) -> Engine:
        """See :meth:`EngineConfig.build`."""
        from stepkd.sampling.transformers_engine import TransformersEngine

        return TransformersEngine(policy, max_rows=self.max_rows, breaks_off=breaks_off)


IN_PROCESS = Transformers()
"""The engine where none is chosen."""


@dataclass(frozen=True)
class VLLMServer(EngineConfig):
    """A vLLM server of the policy's model, on GPUs of its own, which is given the weights before every step."""

    url: str
    """Address of the server, ``http://host:port``."""
    group_port: int = 51216
    """Port of the group through which weights are sent."""
    timeout_s: float = 240.0
    """Seconds that are waited for the server at the start, > 0; it loads its model first."""
    requests: int = 32
    """Most prompts that are asked for at the same time, >= 1."""

    def __post_init__(self) -> None:
        check_bounds("engine.", self, timeout_s="(0, inf)", requests="[1, inf)")

    holds_weights = False

    @property
    def at_once(self) -> int:
        """``requests``."""
        return self.requests

    def build(self, policy: Any, sampling: SamplingConfig, breaks_off: Callable[[], bool] | None = None) -> Engine:
        """See :meth:`EngineConfig.build`."""
        from stepkd.sampling.vllm import ServerEngine, connect

        client = connect(self.url, group_port=self.group_port, timeout_s=self.timeout_s)
        return ServerEngine(policy, client, requests=self.requests, breaks_off=breaks_off)


@dataclass(frozen=True)
class VLLM(EngineConfig):
    """A vLLM engine on every training GPU, beside the model that learns. Its samples are not keyed: no run repeats."""

    gpu_memory: float = 0.3
    """Share of the GPU's memory that the engine may take, in (0, 1)."""

    def __post_init__(self) -> None:
        check_bounds("engine.", self, gpu_memory="(0, 1)")

    @property
    def at_once(self) -> int:
        """The engine makes batches of its own of 256."""
        return 256

    def build(self, policy: Any, sampling: SamplingConfig, breaks_off: Callable[[], bool] | None = None) -> Engine:
        """See :meth:`EngineConfig.build`."""
        from stepkd.sampling.vllm import VLLMEngine

        return VLLMEngine(policy, self.gpu_memory, sampling)
