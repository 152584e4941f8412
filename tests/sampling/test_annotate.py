"""Signals of given completions: against plain logits, against the engine, whatever the batch; bad input."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_policy import tiny_policy

from stepkd.errors import DataError, ModelError
from stepkd.losses.linear import VocabHead
from stepkd.models.policy import Policy
from stepkd.sampling.annotate import TokenSignals, annotate
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.steps.segment import get_segmenter, segment
from stepkd.steps.text import text_from_ids, tokenize_text

TEXTS = [("1+2=", "3\n#### 3"), ("a much longer prompt: 17*3=", "17+17"), ("7", "x"), ("??", ""), ("Q: ", "ab\ncd\n")]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy(0)


@pytest.fixture(scope="module")
def teacher() -> Policy:
    return tiny_policy(1)


@pytest.fixture(scope="module")
def ids(policy: Policy) -> tuple[list[list[int]], list[list[int]]]:
    def encode(text: str) -> list[int]:
        return policy.tokenizer(text, add_special_tokens=False)["input_ids"]

    return [encode(prompt) for prompt, _ in TEXTS], [encode(completion) for _, completion in TEXTS]


@torch.no_grad()
def plain(policy: Policy, prompt: list[int], completion: list[int]) -> tuple[list[float], list[float]]:
    """From the model's own full logits, one row at a time."""
    logits = policy.causal_lm(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1, : policy.vocab_size], -1)
    picked = [float(logprobs[t, token]) for t, token in enumerate(completion)]
    return picked, (-(logprobs.exp() * logprobs).sum(-1)).tolist()[: len(completion)]


def close(actual: Any, expected: Any) -> bool:
    return actual == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("max_tokens", "chunk_size"), [(8192, 1024), (1, 1), (40, 3), (64, 5)])
def test_equal_to_plain_logits(policy: Policy, teacher: Policy, ids: Any, max_tokens: int, chunk_size: int) -> None:
    results = annotate(policy, *ids, teacher=teacher, max_tokens=max_tokens, chunk_size=chunk_size)
    assert len(results) == len(TEXTS)
    for prompt, completion, signals in zip(*ids, results, strict=True):
        logprobs, entropies = plain(policy, prompt, completion)
        assert close(signals.logprobs, logprobs)
        assert close(signals.entropies, entropies)
        assert close(signals.teacher_logprobs, plain(teacher, prompt, completion)[0])
    assert results[3] == TokenSignals((), (), ())
    spread = [x for signals in results for x in signals.entropies]
    assert 0 < min(spread) < max(spread) < math.log(policy.vocab_size)


def test_without_a_teacher(policy: Policy, teacher: Policy, ids: Any) -> None:
    alone, both = annotate(policy, *ids), annotate(policy, *ids, teacher=teacher)
    assert all(signals.teacher_logprobs is None for signals in alone)
    assert [signals[:2] for signals in alone] == [signals[:2] for signals in both]
    assert annotate(policy, [], []) == []
    assert annotate(policy, ids[0][:1], [[]]) == [TokenSignals((), ())]
    own = annotate(policy, *ids, teacher=policy)
    assert all(close(signals.teacher_logprobs, signals.logprobs) for signals in own)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_equal_to_the_samplers_raw_logprobs(policy: Policy, temperature: float, ids: Any) -> None:
    spec = SamplingConfig(n=3, max_new_tokens=20, temperature=temperature, seed=2)
    samples = [continuation for row in TransformersEngine(policy).generate(ids[0], spec) for continuation in row]
    prompts = [continuation.prompt_ids.tolist() for continuation in samples]
    results = annotate(policy, prompts, [continuation.token_ids.tolist() for continuation in samples], max_tokens=100)
    for continuation, signals in zip(samples, results, strict=True):
        assert close(signals.logprobs, continuation.raw_logprobs)


def test_never_more_logits_than_a_chunk(policy: Policy, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = VocabHead.__call__

    def count(self: VocabHead, hidden_CH: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden_CH))
        return original(self, hidden_CH)

    monkeypatch.setattr(VocabHead, "__call__", count)
    annotate(policy, *ids, chunk_size=4)
    assert max(seen) == 4
    assert sum(seen) == sum(len(completion) for completion in ids[1])  # completion tokens only


def test_modes_and_gradients_are_left_alone(ids: Any) -> None:
    policy = tiny_policy(0)
    policy.train()
    first = next(policy.parameters())
    results = annotate(policy, *ids)
    assert all(module.training for module in policy.modules())
    assert first.grad is None
    policy.eval()
    assert annotate(policy, *ids) == results


def test_ruled_out_tokens_add_nothing_to_the_entropy(policy: Policy, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that gives two tokens even odds and -inf to the rest: ln 2, not NaN."""

    def two_tokens(self: VocabHead, hidden_CH: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(hidden_CH), policy.vocab_size), -math.inf, dtype=hidden_CH.dtype)
        logits[:, [5, 6]] = 0.0
        return logits

    monkeypatch.setattr(VocabHead, "__call__", two_tokens)
    (signals,) = annotate(policy, ids[0][:1], [[5, 6]])
    assert signals.entropies == pytest.approx([math.log(2)] * 2)
    assert signals.logprobs == pytest.approx([-math.log(2)] * 2)


def test_segmenters_read_the_signals(policy: Policy, teacher: Policy, ids: Any) -> None:
    """The road from text to steps: tokenise, annotate, segment; by sampled ids it is the same."""
    prompt = ids[0][0]
    written = tokenize_text(policy.tokenizer, "3 + 4 = 7\n7 * 2 = 14\n#### 14")
    (signals,) = annotate(policy, [prompt], [written.token_ids], teacher=teacher)
    completion = replace(written, **signals._asdict())
    assert replace(text_from_ids(policy.tokenizer, written.token_ids), **signals._asdict()) == completion
    median = sorted(math.exp(x) for x in signals.logprobs)[len(written) // 2]
    for name in (f"adaptive_step:{median}", "entropy:1.0", "reject"):
        assert len(segment(get_segmenter(name), completion)) > 1, name


def test_bfloat16(ids: Any) -> None:
    for signals in annotate(tiny_policy(0, "bfloat16"), *ids):
        assert all(math.isfinite(x) and x <= 0 for x in signals.logprobs)
        assert all(0 <= x <= math.log(100) for x in signals.entropies)


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([[5], []], [[5], [5]], "prompt 1 has no tokens"),
        ([[5]], [[5, 100]], "prompt and completion 0 hold id 100, and the model has ids 0 to 99"),
        ([[-1]], [[5]], "prompt and completion 0 hold id -1"),
        (
            [[5], [5] * 24],
            [[5], [6] * 1001],
            "prompt and completion 1 have 1025 tokens and the model's context is 1024: shorten or drop the row",
        ),
    ],
)
def test_bad_input(policy: Policy, prompts: Any, completions: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        annotate(policy, prompts, completions)


def test_the_context_may_be_full(policy: Policy) -> None:
    (signals,) = annotate(policy, [[5] * 1000], [[6] * 24])
    assert len(signals.logprobs) == 24


def test_teacher_of_another_vocabulary(policy: Policy, ids: Any) -> None:
    other = tiny_policy(1)
    other.tokenizer.add_tokens(["<extra>"])
    message = "(101 and 100 tokens; '<extra>' has id 100 there and None here), so it cannot read the model's ids"
    with pytest.raises(ModelError, match=re.escape(message)):
        annotate(policy, *ids, teacher=other)


def test_logits_that_are_not_numbers(ids: Any) -> None:
    policy = tiny_policy(0)
    with torch.no_grad():
        policy.causal_lm.model.norm.weight.fill_(math.nan)
    with pytest.raises(ModelError, match=r"logits are not numbers \(NaN\) in completion"):
        annotate(policy, *ids)
