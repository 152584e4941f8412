"""Rollouts and scores from vLLM, through TRL's client for a server, or TRL's engine on the training GPUs.

An extra: ``pip install 'stepkd[vllm]'``, imported when it is asked for. The contract is tested against a stand-in that
speaks the server's protocol; **no GPU has run it**. A server's samples are keyed by a seed per prompt, so that a run
repeats on it; they are not those that the transformers backend draws.

A server runs beside the training, on GPUs of its own; :data:`START` is how it is started. It is given the weights of
the plain model: adapters are added to what they adapt, one at a time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from stepkd.data.completion import Completion, Finish
from stepkd.errors import ConfigError, ModelError
from stepkd.models.policy import Policy
from stepkd.randomness import stream_key
from stepkd.sampling.engine import Engine, Progress, SamplingConfig, Wanted, before_stop, decode_text

START = (
    """`VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}' """
    "--logprobs-mode processed_logprobs --max-logprobs -1` (pip install 'stepkd[vllm]')"
)
"""How a server is started that can be given weights, samples and scores."""


def connect(address: str, *, group_port: int = 51216, timeout_s: float = 240.0) -> Any:
    """TRL's client of a vLLM server.

    Raises:
        ConfigError: trl or vLLM is not installed, or nothing answers there.
    """
    try:
        from trl.generation.vllm_client import VLLMClient

        return VLLMClient(base_url=address, group_port=group_port, connection_timeout=timeout_s)
    except ImportError as error:
        raise ConfigError(f"a vLLM server needs TRL's client, and TRL's client vLLM: {error}") from error
    except OSError as error:  # requests has its own classes
        raise ConfigError(
            f"no vLLM server answers at {address} within {timeout_s:g} s: start it with {START}"
        ) from error


def _to_completion(
    policy: Policy,
    spec: SamplingConfig,
    place: tuple[int, int],
    prompt: Sequence[int],
    ids: Sequence[int],
    logprobs: Sequence[Any],
    limit: int,
) -> Completion:
    """What the server or engine gave, as a completion.

    Args:
        policy: its tokenizer decodes, its end tokens end.
        spec: how it was drawn.
        place: number of the prompt, and of the sample.
        prompt: what it continues.
        ids, logprobs: tokens, and for each a list that begins with its log-probability.
        limit: most tokens asked for.

    Raises:
        ModelError: it is no completion.
    """
    number, sample = place
    if not 0 < len(ids) <= limit or len(ids) != len(logprobs) or any(each[0] is None for each in logprobs):
        raise ModelError(
            f"vLLM gave prompt {number} {len(ids)} tokens with {len(logprobs)} log-probabilities, of at most {limit}: "
            "its logits are not numbers, or it is not the server that is expected here"
        )
    values = np.array([float(each[0]) for each in logprobs])
    text = decode_text(policy.tokenizer, ids)
    cut = before_stop(text, spec.stop)
    finish: Finish = "stop" if ids[-1] in policy.eos_ids or cut != text else "length"
    return Completion(
        np.asarray(prompt),
        np.asarray(ids),
        logprobs=np.zeros_like(values) if spec.temperature == 0 else values,
        raw_logprobs=values if _is_plain(spec) else np.full_like(values, math.nan),
        finish=finish,
        text=cut,
        sample=sample,
    )


def _is_plain(spec: SamplingConfig) -> bool:
    """Whether the log-probabilities of the model itself are those that are sampled from (or nothing is sampled)."""
    return spec.temperature in (0, 1) and spec.top_p == 1 and not spec.top_k


@dataclass(eq=False)
class ServerEngine(Engine):
    """A :class:`~stepkd.sampling.engine.Engine` on a vLLM server."""

    policy: Policy
    """Whose weights are sampled from, and whose tokenizer decodes."""
    client: Any
    """TRL's ``VLLMClient``."""
    requests: int = field(default=32, kw_only=True)
    """Most prompts asked for at the same time."""
    breaks_off: Callable[[], bool] | None = field(default=None, kw_only=True)
    """Asked before every prompt; once it says yes, prompts not asked yet get one token of nothing more."""
    _checked: bool = field(default=False, init=False)

    def _send(self) -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            facts = weight_facts(self.policy.model)
            try:
                if self.client.communicator is None:  # the group through which weights are sent
                    self.client.init_communicator(device=self.policy.device)
            except torch.OutOfMemoryError:
                raise
            except (NotImplementedError, RuntimeError) as error:  # of TRL's client: no CUDA, or no engine there
                raise ConfigError(f"the policy's weights cannot be sent to the vLLM server: {error}") from error
            self.client.update_named_params(facts, merged_weights(self.policy.model))
            self.client.reset_prefix_cache()
        if dist.is_initialized():
            dist.barrier()

    def _draw(
        self, wanted: Sequence[Wanted], spec: SamplingConfig, on_progress: Progress | None
    ) -> list[list[Completion]]:
        self._check_server(spec)

        def ask(number: int) -> list[Completion]:
            prompt, limit, key = wanted[number]
            limit = 1 if self.breaks_off is not None and self.breaks_off() else limit
            return self._ask(number, prompt, spec, limit, stream_key(spec.seed, str(key[0]), *key[1:]) % 2**31)

        found = []
        with ThreadPoolExecutor(max_workers=self.requests) as pool:
            for row in pool.map(ask, range(len(wanted))):
                found.append(row)
                if on_progress is not None:
                    on_progress(spec.n)
        return found

    def _ask(self, number: int, prompt: list[int], spec: SamplingConfig, limit: int, key: int) -> list[Completion]:
        extra: dict[str, Any] = {"seed": key, "skip_special_tokens": False}
        extra["stop_token_ids"] = sorted(self.policy.eos_ids)
        if spec.stop:
            extra |= {"stop": list(spec.stop), "include_stop_str_in_output": True}
        answer = self.client.generate(
            prompts=[prompt],
            n=spec.n,
            temperature=spec.temperature,
            top_p=spec.top_p,
            top_k=spec.top_k,
            max_tokens=limit,
            logprobs=0,
            generation_kwargs=extra,
        )
        found = answer["completion_ids"]
        if answer["prompt_ids"] != [prompt] or len(found) != spec.n:
            raise ModelError(
                f"the vLLM server answered prompt {number} with {len(found)} completions in place of {spec.n}, "
                "or with those of another prompt: does it hold the policy's model and tokenizer?"
            )
        logprobs = answer["logprobs"]
        return [
            _to_completion(self.policy, spec, (number, j), prompt, ids, logprobs[j], limit)
            for j, ids in enumerate(found)
        ]

    def _check_server(self, spec: SamplingConfig) -> None:
        """At another temperature than 1 the server must give log-probabilities of what it samples from."""
        if self._checked or _is_plain(spec):
            return
        mode = self.client.get_server_info()["model_config"]["logprobs_mode"]
        if mode != "processed_logprobs":
            raise ConfigError(
                f"the vLLM server gives {mode}, which are not of the distribution that it samples from at temperature "
                f"{spec.temperature:g}: start it with --logprobs-mode processed_logprobs, as in {START}"
            )
        self._checked = True


@dataclass(eq=False)
class VLLMEngine(Engine):
    """The same by TRL's engine on this rank's GPU. Samples are not keyed by prompt: a run does not repeat."""

    policy: Policy
    """Whose weights are sampled from; in a folder or with a hub id that vLLM loads."""
    gpu_memory: float
    """Share of the GPU's memory that it may take."""
    sampling: SamplingConfig
    """How to draw; one engine draws in one way."""

    def __post_init__(self) -> None:
        policy, sampling = self.policy, self.sampling
        if sampling.stop:
            raise ConfigError("engine VLLM knows no stop strings: take engine VLLMServer")
        try:
            from accelerate import Accelerator
            from trl.generation.vllm_generation import VLLMGeneration

            self.engine = VLLMGeneration(
                model=policy.model,
                accelerator=Accelerator(),
                processing_class=policy.tokenizer,
                mode="colocate",
                gpu_memory_utilization=self.gpu_memory,
                max_model_length=policy.max_length,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_completion_length=sampling.longest,
                logprobs=0,
                generation_kwargs={"stop_token_ids": sorted(policy.eos_ids)}
                | ({"seed": sampling.seed} if sampling.temperature == 0 else {}),
            )
        except ImportError as error:
            raise ConfigError(f"VLLM needs TRL and vLLM (pip install 'stepkd[vllm]'): {error}") from error

    def _send(self) -> None:
        weight_facts(self.policy.model)  # refuses what cannot be merged
        for name, value in merged_weights(self.policy.model):
            worker = self.engine.llm.llm_engine.model_executor.driver_worker
            worker.model_runner.model.load_weights([(name, value)])
        self.engine.llm.reset_prefix_cache()

    def _draw(
        self, wanted: Sequence[Wanted], spec: SamplingConfig, on_progress: Progress | None
    ) -> list[list[Completion]]:
        repeated = [each for each in wanted for _ in range(spec.n)]
        _, found, logprobs, _ = self.engine.generate([each.prompt for each in repeated], None, spec.n)
        if on_progress is not None:
            on_progress(len(found))
        drawn = [
            _to_completion(self.policy, spec, divmod(i, spec.n), prompt, ids[:limit], logps[:limit], limit)
            for i, ((prompt, limit, _), ids, logps) in enumerate(zip(repeated, found, logprobs, strict=True))
        ]
        return [drawn[start : start + spec.n] for start in range(0, len(drawn), spec.n)]


Fact = tuple[str, str, list[int]]
"""Name, dtype (``bfloat16``) and shape of a weight."""


def weight_facts(model: Any) -> list[Fact]:
    """What :func:`merged_weights` will give, in its order, without computing anything.

    Args:
        model: a transformers causal language model, peft-wrapped or not, whole on this rank.

    Raises:
        ConfigError: weights that no plain model has (quantised, or an adapter on one of two tied ones).
    """
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    ends = plain.get_input_embeddings(), plain.get_output_embeddings()
    if ends[0].weight is ends[1].weight and any(hasattr(each, "base_layer") for each in ends):
        raise ConfigError(
            "embeddings and vocabulary head share a weight, and the adapter on one of them would change both in vLLM: "
            "take another target module, or sample without vLLM"
        )
    facts = []
    for name, _, _, parameter in _parameters(model):
        if not parameter.is_floating_point():
            raise ConfigError(
                f"{name} is quantised ({parameter.dtype}), which cannot be sent: load the policy whole "
                "(policy.quantization none), or sample without vLLM"
            )
        facts.append((name, str(parameter.dtype).removeprefix("torch."), list(parameter.shape)))
    return facts


@torch.no_grad()
def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of the model that a server holds, nothing changed in place, each made when it is asked for.

    Args:
        model: as for :func:`weight_facts`, which refuses what cannot be merged.

    Yields:
        Tied weights once, under the names of the plain model.
    """
    for name, layer, own, parameter in _parameters(model):
        if layer is not None:
            layer = copy.deepcopy(layer)
            layer.merge()
            parameter = layer.get_base_layer().get_parameter(own)
        yield name, parameter.detach()


def _parameters(model: Any) -> Iterator[tuple[str, Any, str, Tensor]]:
    """Weights that the plain model has too: no adapter's own, and none that a trained copy stands for.

    Yields:
        Name in the plain model, the adapter layer that changes it (or None), its name in that layer, and the weight.
    """
    layers: dict[str, Any] = {}
    copies: list[str] = []
    if hasattr(model, "peft_config"):
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        copies = [f".modules_to_save.{adapter}" for adapter in model.active_adapters]
    for name, parameter in model.named_parameters():
        above, _, own = name.partition(".base_layer.")
        if ".original_module." in name or (not own and any(name.startswith(f"{layer}.") for layer in layers)):
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        for each in copies:
            plain = plain.replace(each, "")
        yield plain, layers.get(above), own, parameter
