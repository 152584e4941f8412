"""vLLM's engine in this process, given the policy's weights in training; its own model's in a job."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stepkd.data.completion import Completion, Numbers
from stepkd.errors import ConfigError
from stepkd.models.policy import Policy
from stepkd.randomness import stream_key
from stepkd.sampling.draw import draw
from stepkd.sampling.engine import Engine, Progress, SamplingConfig, Scores, Wanted
from stepkd.sampling.follow import FollowCheck
from stepkd.sampling.vllm import among, to_completion, to_scores
from stepkd.sampling.weights import check_mergeable, merged_weights

logger = logging.getLogger(__name__)


class VLLMEngine(Engine):
    """vLLM's engine in this process, with its prefix cache: on every rank's GPU, or on the CPU.

    In training it begins without weights, and is given the policy's at the first :meth:`update` and at every later one;
    a job has it load the model, of which this process then holds nothing else.

    Args:
        policy: whose weights are sampled from, and whose tokenizer decodes.
        gpu_memory: share of the GPU's memory that it may take.
        breaks_off: asked before prompts are given to it; once it says yes, they get one token of nothing more.

    Raises:
        ConfigError: vLLM is not installed, or cannot start with this model.
    """

    def __init__(
        self, policy: Policy, gpu_memory: float = 0.3, *, breaks_off: Callable[[], bool] | None = None
    ) -> None:
        self.policy, self.breaks_off = policy, breaks_off
        self._trains = policy.device.type != "meta"
        self._watch = FollowCheck(self)
        on_cpu = not torch.cuda.is_available()
        self._sleeps = self._trains and not on_cpu
        """Whether its weights and caches leave the GPU while the trainer works there."""
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # weights are handed over within this process
        try:
            vllm = import_module("vllm")
        except ImportError as error:
            raise ConfigError(f"engine VLLM needs vLLM (pip install 'stepkd[vllm]'): {error}") from error
        self._vllm = vllm
        if on_cpu:
            _patch_cpu_sampler()
        settings: dict[str, Any] = {
            "dtype": str(next(policy.parameters()).dtype).removeprefix("torch."),
            "max_model_len": policy.max_length,
            "gpu_memory_utilization": gpu_memory,
            "enable_prefix_caching": True,
            "enforce_eager": on_cpu,
            "enable_chunked_prefill": not on_cpu,  # its CPU engine dies of a seed where it splits a prompt
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": 64,
            "enable_sleep_mode": self._sleeps,
            "seed": 0,
        }
        if dist.is_initialized() and "RANK" in os.environ:  # one engine a rank, in the group that is there
            settings["distributed_executor_backend"] = "external_launcher"
        try:
            with tempfile.TemporaryDirectory(prefix="stepkd-vllm-") as folder:
                if self._trains:
                    self._describe(Path(folder))
                    settings |= {"model": folder, "load_format": "dummy"}
                else:
                    assert policy.spec is not None
                    settings |= {"model": policy.spec.path, "revision": policy.spec.revision}
                self.llm = vllm.LLM(**settings)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"vLLM does not start with {settings['model']}: {error}") from error

    def facts(self) -> dict[str, Any]:
        """See :meth:`~stepkd.sampling.engine.Engine.facts`."""
        return {"vllm": self._vllm.__version__}

    def _describe(self, folder: Path) -> None:
        """Write the model's settings and tokenizer without its weights.

        Embeddings and head stand apart there: of a shared head vLLM's CPU engine keeps a packed copy, which stays old.
        """
        check_mergeable(self.policy.model)
        config = copy.deepcopy(self.policy.causal_lm.config)
        config.tie_word_embeddings = False
        config.save_pretrained(folder)
        self.policy.tokenizer.save_pretrained(folder)

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from merged_weights(self.policy.model)
        embeddings, head = self.policy.causal_lm.get_input_embeddings(), self.policy.causal_lm.get_output_embeddings()
        if head.weight is embeddings.weight:
            yield "lm_head.weight", head.weight.detach()

    def _send(self, version: int) -> None:
        if self._sleeps and self._version is not None:
            self.llm.wake_up()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights()})
        self.llm.reset_prefix_cache()

    def _draw(
        self, wanted: Sequence[Wanted], spec: SamplingConfig, on_progress: Progress | None
    ) -> list[list[Completion]]:
        over = self.breaks_off is not None and self.breaks_off()
        limits = [1 if over else each.limit for each in wanted]
        how = [
            self._vllm.SamplingParams(
                n=spec.different,
                temperature=spec.temperature,
                top_p=spec.top_p,
                top_k=spec.top_k,
                max_tokens=limit,
                logprobs=0,
                seed=stream_key(spec.seed, str(each.key[0]), *each.key[1:]) % 2**31 if spec.temperature else None,
                stop=list(spec.stop),
                include_stop_str_in_output=True,
                stop_token_ids=sorted(self.policy.eos_ids),
                skip_special_tokens=False,
                detokenize=bool(spec.stop),
            )
            for each, limit in zip(wanted, limits, strict=True)
        ]
        answers = self._answers([each.prompt for each in wanted], how)
        if on_progress is not None:
            on_progress(spec.n * len(answers))
        drawn = [
            [
                to_completion(
                    self, spec, (number, j), each.prompt, list(own.token_ids),
                    [at[i].logprob for i, at in zip(own.token_ids, own.logprobs, strict=True)], limit,
                )
                for j, own in enumerate(sorted(answer.outputs, key=lambda own: own.index) * (spec.n // spec.different))
            ]
            for number, (each, limit, answer) in enumerate(zip(wanted, limits, answers, strict=True))
        ]  # fmt: skip
        if self._version is not None:
            self._watch({"": [each for row in drawn for each in row]}, spec, f"version {self._version}")
        return drawn

    @property
    def scored_length(self) -> int | None:
        """One token less than the context: vLLM writes one behind what it scores."""
        return None if self.max_length is None else self.max_length - 1

    def _score(self, completions: Sequence[Completion], top_k: int) -> list[Scores]:
        how = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top_k, detokenize=False)
        texts = [[*each.prompt_ids.tolist(), *each.token_ids.tolist()] for each in completions]
        answers = self._answers(texts, how)
        return [
            to_scores(each, top_k, [{i: (at.rank, at.logprob) for i, at in (row or {}).items()} for row in own], "vLLM")
            for each, own in zip(completions, (answer.prompt_logprobs for answer in answers), strict=True)
        ]

    def choice_logps(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Numbers:
        """See :meth:`~stepkd.sampling.engine.Engine.choice_logps`."""
        how = self._vllm.SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=[*token_ids], detokenize=False)
        answers = self._answers([[*each] for each in prompts], how)
        said = [answer.outputs[0].logprobs[0] for answer in answers]
        return among([[each[token].logprob for token in token_ids] for each in said], token_ids)

    def _answers(self, prompts: Sequence[list[int]], how: Any) -> list[Any]:
        """What vLLM makes of prompts, awake only as long as it takes."""
        if self._trains and self._version is None:
            self.update(0)
        if self._sleeps:
            self.llm.wake_up()
        answers: list[Any] = self.llm.generate([{"prompt_token_ids": each} for each in prompts], how, use_tqdm=False)
        if self._sleeps:
            self.llm.sleep(level=1)
        return answers


def _patch_cpu_sampler() -> None:
    """Have vLLM's sampler for CPUs draw a token with one number of the row's generator.

    vLLM's own draws two random numbers for every token of the vocabulary, in one thread: half of the time of a small
    model. The inverse of the cumulative distribution is the same distribution. So do all engines of this process with
    processed log-probabilities. A vLLM that is built otherwise is left as it is.
    """
    try:
        module = import_module("vllm.v1.sample.ops.topk_topp_sampler")
        sampler, cut = module.TopKTopPSampler, module.apply_top_k_top_p
        inner = sampler.forward_cpu
    except (ImportError, AttributeError) as error:
        logger.info("vLLM draws by its own sampler, which is slow with small models: %s", error)
        return

    def forward_cpu(self: Any, logits: Tensor, generators: dict[int, torch.Generator], k: Any, p: Any) -> Any:
        if self.logprobs_mode != "processed_logprobs":
            return inner(self, logits, generators, k, p)
        logprobs_BV = cut(logits, k, p).log_softmax(dim=-1, dtype=torch.float32)
        uniform_B = torch.rand(len(logprobs_BV), dtype=torch.float64)
        for row, own in generators.items():
            uniform_B[row] = torch.rand((), dtype=torch.float64, generator=own)
        return draw(logprobs_BV, uniform_B, SamplingConfig()).tokens_B, logprobs_BV

    if inner.__module__ == module.__name__:
        sampler.forward_cpu = forward_cpu
