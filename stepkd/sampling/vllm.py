"""Samples and scores of vLLM servers, which are given the policy's weights in training.

A server needs nothing beside the standard library here (:mod:`stepkd.sampling.client`, whose ``START`` is how it is
started). Its samples are keyed by a seed per prompt: in float32 a run repeats on it, in narrower types as far as its
kernels do not depend on the company a request has. They are not those that the transformers engine draws.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch.distributed as dist

from stepkd.data.completion import UNKNOWN, Completion, Finish, Numbers
from stepkd.errors import ConfigError, MachineError, ModelError, StepkdError
from stepkd.models.policy import Policy
from stepkd.randomness import stream_key
from stepkd.runs.process import group_rank
from stepkd.sampling.client import START, Client
from stepkd.sampling.engine import Engine, Progress, SamplingConfig, Scores, Wanted, decode_text
from stepkd.sampling.follow import FollowCheck
from stepkd.sampling.weights import WeightSender

logger = logging.getLogger(__name__)
AT_ONCE = 256
"""Samples under way at the same time that several of one prompt may make of ``requests`` prompts: as many as a server
decodes at once where it was not told otherwise."""


def to_completion(
    engine: Engine,
    spec: SamplingConfig,
    place: tuple[int, int],
    prompt: Sequence[int],
    ids: Sequence[int],
    logprobs: Sequence[float | None],
    limit: int,
) -> Completion:
    """What the server or engine gave, as a completion.

    vLLM draws from all rows of a padded vocabulary head. A completion ends before an id that no token has, as one that
    is cut off, and ``engine.cut_off`` counts it; where that is its first, an end token stands for it
    (:func:`~stepkd.sampling.engine.is_stand_in`).

    Args:
        engine: of whose policy the tokenizer decodes and end tokens end.
        spec: how it was drawn.
        place: number of the prompt, and of the sample.
        prompt: what it continues.
        ids, logprobs: tokens, and their log-probabilities.
        limit: most tokens asked for.

    Raises:
        ModelError: it is no completion.
    """
    policy, (number, sample) = engine.policy, place
    values = np.array(logprobs, dtype=np.float64)
    if not 0 < len(ids) <= limit or len(ids) != len(values) or not np.isfinite(values).all():
        raise ModelError(
            f"vLLM gave prompt {number} {len(ids)} tokens with {len(logprobs)} log-probabilities, of at most {limit}: "
            "its logits are not numbers, or it is not the server that is expected here"
        )
    is_cut = max(ids) >= policy.vocab_size
    if is_cut:
        known = next(t for t, token in enumerate(ids) if token >= policy.vocab_size)
        ids, values = ids[:known] or [min(policy.eos_ids)], values[: max(known, 1)]
        engine.cut_off += 1
        if engine.cut_off & (engine.cut_off - 1) == 0:  # 1, 2, 4, ...
            logger.warning(
                "completions that drew an id beyond the policy's %d tokens and end before it: %d so far. Where that is "
                "often, does the server hold the policy's model?", policy.vocab_size, engine.cut_off,
            )  # fmt: skip
    text = decode_text(policy.tokenizer, ids)
    cut = spec.before_stop(text)
    finish: Finish = "stop" if (ids[-1] in policy.eos_ids and not is_cut) or cut != text else "length"
    return Completion(
        np.asarray(prompt),
        np.asarray(ids),
        logprobs=np.zeros_like(values) if spec.temperature == 0 else values,
        raw_logprobs=values if _is_plain(spec) else UNKNOWN,
        finish=finish,
        text=cut,
        sample=sample,
    )


def _is_plain(spec: SamplingConfig) -> bool:
    """Whether the log-probabilities of the model itself are those that are sampled from (or nothing is sampled)."""
    return spec.temperature in (0, 1) and spec.top_p == 1 and not spec.top_k


def among(logps: Sequence[Sequence[float]], token_ids: Sequence[int]) -> Numbers:
    """(P, C) log-probabilities of C tokens, given that one of them comes, from those that vLLM gave.

    Raises:
        ModelError: it gave none of one of them.
    """
    found_PC = np.array(logps, dtype=np.float64).reshape(-1, len(token_ids))
    if np.isnan(found_PC).any():
        raise ModelError(
            f"vLLM gives no log-probabilities of tokens {list(token_ids)}: its logits are not numbers, or it is older "
            "than logprob_token_ids (0.30 has them)"
        )
    return found_PC - np.logaddexp.reduce(found_PC, axis=-1, keepdims=True)


def to_scores(
    completion: Completion, top_k: int, said: Sequence[Mapping[int, tuple[int, float]]], place: str
) -> Scores:
    """What vLLM said of prompt and completion, as scores of the completion.

    Args:
        completion: that was read.
        top_k: most likely tokens that were asked for.
        said: for every token of both, ids with their ranks and log-probabilities; nothing at the first.
        place: who said it, for messages.

    Raises:
        ModelError: of other tokens, or of fewer than were asked for.
    """
    own = completion.token_ids.tolist()
    rows = said[len(completion.prompt_ids) :]
    if len(said) != completion.length or any(token not in row for token, row in zip(own, rows, strict=True)):
        raise ModelError(
            f"{place} scored {len(rows)} tokens of row {completion.id!r}, which has {len(own)}, or other ones: is its "
            "context long enough?"
        )
    best = [[i for i, _ in sorted(row.items(), key=lambda pair: pair[1][0])[:top_k]] for row in rows]
    if any(len(each) < top_k for each in best):
        raise ModelError(f"{place} gives {len(best[0])} tokens where {top_k} were asked for")
    return Scores(
        np.array([row[token][1] for token, row in zip(own, rows, strict=True)], dtype=np.float64),
        np.array(best, dtype=np.int64).reshape(len(own), top_k),
        np.array([[row[i][1] for i in each] for each, row in zip(best, rows, strict=True)]).reshape(len(own), top_k),
    )


@dataclass(eq=False)
class ServerEngine(Engine):
    """A :class:`~stepkd.sampling.engine.Engine` on vLLM servers."""

    policy: Policy | Any
    """Whose weights are sampled from, and whose tokenizer decodes; None: it only scores."""
    client: Client
    weights: str | None = field(default=None, kw_only=True)
    """Folder that both sides see, for the policy's weights; None: this machine's folder for temporary files."""
    seeded: bool = field(default=True, kw_only=True)
    """Whether every sample has a seed of its own."""
    breaks_off: Callable[[], bool] | None = field(default=None, kw_only=True)
    """Asked while it samples; once it says yes, nobody waits for servers: samples not there yet are an end token each,
    and weights are not sent."""

    def __post_init__(self) -> None:
        self._sender: WeightSender | None = None
        self._watch = FollowCheck(self)
        self._gives_up = False
        if not self.seeded and len(self.client.urls) > 1:
            logger.warning(
                "engine.seeded=false with %d servers: start each with another --seed. vLLM's own is 0, and servers of "
                "one seed can draw the same samples of a prompt, which counts them twice", len(self.client.urls),
            )  # fmt: skip
        if self.policy is not None and self.policy.device.type == "meta":  # a job, which is of what the server serves
            self._check_model()

    def _check_model(self) -> None:
        """Refuse a server of another model than the job's; the job's context is the server's."""
        assert self.policy.spec is not None
        path, served = self.policy.spec.path, {self.client.model, self.client.root}
        if path not in served and os.path.realpath(path) not in map(os.path.realpath, served):
            raise ConfigError(
                f"the vLLM server at {self.client.urls[0]} serves {self.client.model!r}, and this job is of {path!r}: "
                f"start the server with that model, or with --served-model-name {path} where it has another path there"
            )
        self.policy.causal_lm.config.get_text_config().max_position_embeddings = self.max_length

    @property
    def max_length(self) -> int | None:
        """Context in tokens: the policy's, or the server's where that is shorter."""
        lengths = (self.policy and self.policy.max_length, self.client.max_length)
        return min((length for length in lengths if length), default=None)

    @property
    def scored_length(self) -> int | None:
        """One token less than the server's context: vLLM writes one behind what it scores."""
        return self.client.max_length - 1 if self.client.max_length else None

    def facts(self) -> dict[str, Any]:
        """The server's build, model, and what it says of its numbers."""
        model = self.client.info.get("model_config", {})
        return {
            "vllm": self.client.version,
            "served_model": self.client.model,
            "context": self.client.max_length,
            **{name: str(model.get(name)) for name in ("dtype", "quantization")},
            **({} if self.seeded else {"seeded": False}),
        }

    def _score(self, completions: Sequence[Completion], top_k: int) -> list[Scores]:
        if self.client.info.get("lora_config"):
            raise ConfigError(
                f"the vLLM server at {self.client.urls[0]} was started with --enable-lora, and vLLM fails there at the "
                "scores of several texts at once: start one without it to score"
            )

        def ask(completion: Completion) -> Scores:
            ids = [*completion.prompt_ids.tolist(), *completion.token_ids.tolist()]
            body = {"model": self.client.name, "prompt": ids, "max_tokens": 1, "temperature": 0}
            said: Any = [None] * len(ids)
            if len(completion.token_ids):
                body |= {"prompt_logprobs": top_k}
                said = self.client.ask(
                    "/v1/completions", body, read=lambda it: it["choices"][0]["prompt_logprobs"] or []
                )
            rows = [{int(i): (one["rank"], one["logprob"]) for i, one in (row or {}).items()} for row in said]
            return to_scores(completion, top_k, rows, f"the vLLM server at {self.client.urls[0]}")

        return list(self.client.map(ask, completions))

    def choice_logps(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Numbers:
        """See :meth:`~stepkd.sampling.engine.Engine.choice_logps`. A token is generated: for log-probabilities of what
        prompts hold vLLM reads them whole, whatever its prefix cache has."""
        body = {"model": self.client.name, "max_tokens": 1, "temperature": 0, "logprobs": 1}
        body |= {"logprob_token_ids": list(token_ids), "return_tokens_as_token_ids": True}

        def ask(prompt: Sequence[int]) -> list[float]:
            said = self.client.ask(
                "/v1/completions",
                {**body, "prompt": list(prompt)},
                read=lambda answer: dict(answer["choices"][0]["logprobs"]["top_logprobs"][0]),
            )
            return [said.get(f"token_id:{token}", np.nan) for token in token_ids]

        return among(list(self.client.map(ask, prompts)), token_ids)

    def _stops(self) -> bool:
        self._gives_up = self._gives_up or (self.breaks_off is not None and self.breaks_off())
        return self._gives_up

    def _send(self, version: int) -> None:
        if self._sender is None:
            self._sender = WeightSender(self.policy, self.client, self.weights)
        said: list[Any] = [None]
        if group_rank() == 0:
            try:
                said = [None if self._stops() else self._sender.send(version)]
            except StepkdError as error:
                said = [None if self._stops() else error]  # the server got the same warning and went first
            except Exception as error:  # other ranks wait for what is said here
                said = [ModelError(f"the weights were not sent: {type(error).__name__}: {error}")]
        if dist.is_initialized():
            dist.broadcast_object_list(said)
        if isinstance(said[0], StepkdError):
            raise said[0]
        if said[0] is None:
            self._gives_up = True
        else:
            self._sender.adopt(*said[0])

    def _draw(
        self, wanted: Sequence[Wanted], spec: SamplingConfig, on_progress: Progress | None
    ) -> list[list[Completion]]:
        if not self._stops():
            self._check_server(spec)

        def ask(place: tuple[int, int]) -> tuple[str, Completion]:
            if not self._stops():
                try:
                    drawn = self._ask(place, wanted[place[0]], spec)
                    return self.client.last.url, drawn
                except MachineError:
                    if not self._stops():
                        raise
            # The step is given up, and the one before it saved.
            each = wanted[place[0]]
            return "", to_completion(self, spec, place, each.prompt, [min(self.policy.eos_ids)], [0.0], each.limit)

        # Each sample by itself: as long as its own tokens take, and lost alone.
        places = [(number, sample) for number in range(len(wanted)) for sample in range(spec.different)]
        most = max(self.client.requests, min(self.client.requests * spec.different, AT_ONCE))
        found: list[list[Completion]] = [[] for _ in wanted]
        by_address: dict[str, list[Completion]] = defaultdict(list)
        answers = self.client.map(ask, places, most=most, until=self._stops)
        for (number, _), (where, drawn) in zip(places, answers, strict=True):
            copies = range(drawn.sample, spec.n, spec.different)
            found[number] += [replace(drawn, sample=sample) for sample in copies]
            by_address[where].append(drawn)
            if on_progress is not None:
                on_progress(len(copies))
        if self._version is not None and not self._stops():
            self._watch(by_address, spec, f"version {self._version} ({self.client.name})")
        return found

    def _ask(self, place: tuple[int, int], wanted: Wanted, spec: SamplingConfig) -> Completion:
        prompt, limit, key = wanted.prompt, wanted.limit, wanted.key
        seeded = self.seeded and spec.temperature
        body = {
            "model": self.client.name,
            "prompt": prompt,
            "n": 1,
            "temperature": spec.temperature,
            "top_p": spec.top_p,
            "top_k": spec.top_k,
            "min_p": 0.0,  # said, as a server takes what is not said from the model's generation_config.json
            "repetition_penalty": 1.0,
            "max_tokens": limit,
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
            "stop_token_ids": sorted(self.policy.eos_ids),
            # Greedy is greedy without one, and a CPU's engine dies of a seed where it splits prompts.
            "seed": (stream_key(spec.seed, str(key[0]), *key[1:]) + place[1]) % 2**31 if seeded else None,
            "stop": list(spec.stop),
            "include_stop_str_in_output": True,
        }

        def read(answer: Any) -> tuple[list[int], list[float]]:
            if len(answer["choices"]) != 1:
                raise ValueError(f"{len(answer['choices'])} choices in place of one")
            each = answer["choices"][0]
            if each["prompt_token_ids"] != prompt:
                raise ValueError("choices of another prompt")
            return each["token_ids"], each["logprobs"]["token_logprobs"]

        ids, logprobs = self.client.ask("/v1/completions", body, tokens=limit, read=read)
        return to_completion(self, spec, place, prompt, ids, logprobs, limit)

    def _check_server(self, spec: SamplingConfig) -> None:
        """At another temperature than 1 the server must give log-probabilities of what it samples from."""
        if _is_plain(spec):
            return
        info = self.client.info
        mode = info.get("model_config", {}).get("logprobs_mode", "log-probabilities of an unknown kind")
        if mode != "processed_logprobs":
            raise ConfigError(
                f"the vLLM server at {self.client.urls[0]} gives {mode}, and at temperature {spec.temperature:g} those "
                f"of the distribution that it samples from are needed: start it with {START}"
            )
