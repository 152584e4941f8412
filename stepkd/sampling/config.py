"""Where training and jobs sample: in this process, on vLLM servers, or in vLLM's engine in this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stepkd.errors import ConfigError, check_bounds
from stepkd.sampling.engine import Engine


class EngineConfig(ABC):
    """Where completions are sampled: :class:`Transformers`, :class:`VLLMServer` or :class:`VLLM`."""

    holds_weights: ClassVar[bool] = True
    """Whether it samples from weights in this process; else a job reads the model's settings and tokenizer only."""

    @property
    @abstractmethod
    def at_once(self) -> int:
        """Completions that are sampled at the same time; in a job the size of a unit of work, which a kill can lose."""

    @abstractmethod
    def build(self, policy: Any, breaks_off: Callable[[], bool] | None = None) -> Engine:
        """The engine.

        Args:
            policy: the :class:`~stepkd.models.policy.Policy` that is sampled from.
            breaks_off: asked while it samples; once it says yes, completions end where they are. None: never.

        Raises:
            ConfigError: what it needs is not there.
        """

    def for_job(self, policy: Any, device: Any) -> Engine:
        """The engine of a job; a model that is in this process is put on a device, and given to an engine elsewhere;
        its context is the engine's afterwards, also in its own settings, where that is shorter.

        Args:
            policy: as for :meth:`build`.
            device: where the model computes.
        """
        if policy.device.type == "meta":
            return self.build(policy)
        engine = self.build(policy.to(device))
        engine.update(0)
        if engine.max_length != policy.max_length:  # of a server
            policy.causal_lm.config.get_text_config().max_position_embeddings = engine.max_length
        return engine


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

    def build(self, policy: Any, breaks_off: Callable[[], bool] | None = None) -> Engine:
        """See :meth:`EngineConfig.build`."""
        from stepkd.sampling.transformers_engine import TransformersEngine

        return TransformersEngine(policy, max_rows=self.max_rows, breaks_off=breaks_off)


IN_PROCESS = Transformers()
"""The engine where none is chosen."""


@dataclass(frozen=True)
class VLLMServer(EngineConfig):
    """vLLM servers of the policy's model, beside this process or on machines of their own; in training they are given
    the weights before every step. Nothing of vLLM is needed here."""

    urls: tuple[str, ...] | str
    """Addresses, ``http://host:port``, one or several of the same model, asked in turn. A key is read from the
    environment variable VLLM_API_KEY."""
    requests: int = 64
    """Most prompts that are asked for at the same time, over all addresses, >= 1; a server batches them. Samples of one
    prompt are requests of their own, of which up to 256 are then under way."""
    timeout_s: float = 600.0
    """Seconds that are waited for an answer of up to 8,192 tokens (in proportion longer for more), and for a server
    that is loading its model or was restarted, > 0; ten minutes load most models. Ranks of one run wait half an hour
    for each other: keep it below that."""
    weights: str | None = None
    """Folder that this process and the servers see under the same path, where weights are handed over in training; null
    takes this machine's folder for temporary files, which servers on the same machine see. What killed runs left there
    is found by host name and process number, and deleted: containers of one host name need a folder each."""
    seeded: bool = True
    """Give every sample a seed of its own, so that a run repeats as far as the server's numeric type allows; false lets
    the server draw as it likes, which is faster where it draws seeded samples one by one (small models on CPUs). vLLM's
    own seed is 0 where none is given: several servers then need a --seed each, or they draw the same samples."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "urls", checked_urls("engine.urls", self.urls))
        check_bounds("engine.", self, timeout_s="(0, inf)", requests="[1, inf)")

    holds_weights = False

    @property
    def at_once(self) -> int:
        """``requests``."""
        return self.requests

    def build(self, policy: Any, breaks_off: Callable[[], bool] | None = None) -> Engine:
        """See :meth:`EngineConfig.build`."""
        from stepkd.sampling.client import Client
        from stepkd.sampling.vllm import ServerEngine

        client = Client(self.urls, self.requests, self.timeout_s)
        return ServerEngine(policy, client, weights=self.weights, seeded=self.seeded, breaks_off=breaks_off)


def checked_urls(name: str, urls: Sequence[str] | str) -> tuple[str, ...]:
    """Addresses as a tuple.

    Args:
        name: of the setting, for the message.
        urls: one address, or several.

    Raises:
        ConfigError: none, or one that is no address.
    """
    found = (urls,) if isinstance(urls, str) else tuple(urls)
    for url in found or ("",):
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{name}: {url!r} is no address: give http://host:port, one or several")
    return found


@dataclass(frozen=True)
class VLLM(EngineConfig):
    """vLLM's engine in this process, with its prefix cache: in training on every rank's GPU beside the model that
    learns, in a job with the model of its own."""

    completions: int = 256
    """Completions that a job asks for at once, >= 1, the size of a unit of work; the engine makes its own batches."""
    gpu_memory: float = 0.3
    """Share of the GPU's memory that the engine may take, in (0, 1); 0.9 where nothing else needs it. On a CPU it is
    that of the machine's."""
    holds_weights = False

    def __post_init__(self) -> None:
        check_bounds("engine.", self, completions="[1, inf)", gpu_memory="(0, 1)")

    @property
    def at_once(self) -> int:
        """``completions``."""
        return self.completions

    def build(self, policy: Any, breaks_off: Callable[[], bool] | None = None) -> Engine:
        """See :meth:`EngineConfig.build`."""
        from stepkd.sampling.vllm_engine import VLLMEngine

        return VLLMEngine(policy, self.gpu_memory, breaks_off=breaks_off)
