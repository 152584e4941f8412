"""The decode loop: token identity whatever the batch, log-probabilities, finish reasons, cost, bad input."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_policy import tiny_policy

from stepkd.data.completion import Completion
from stepkd.errors import ConfigError, DataError, ModelError
from stepkd.models import packed
from stepkd.models.machine import fast_bfloat16
from stepkd.models.policy import Policy
from stepkd.models.spec import tiny_tokenizer
from stepkd.sampling.decode import Decoder
from stepkd.sampling.draw import sampling_logprobs
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine

SPEC = SamplingConfig(n=3, max_new_tokens=14, seed=4)
TEXTS = ["1+2=", "a much longer prompt than the others: 17*3=", "7", "Step 1: x\n", "??"]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[list[int]]:
    return [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


def ids(results: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[tuple(continuation.token_ids.tolist()) for continuation in row] for row in results]


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("max_rows", [1, 2, 3, 7, 64])
def test_batch_size_does_not_matter(
    policy: Policy, prompts: list[list[int]], max_rows: int, temperature: float
) -> None:
    spec = SamplingConfig(n=3, max_new_tokens=14, seed=4, temperature=temperature)
    expected = TransformersEngine(policy).generate(prompts, spec)
    actual = TransformersEngine(policy, max_rows=max_rows).generate(prompts, spec)
    assert ids(actual) == ids(expected)
    for a, b in zip((r for row in actual for r in row), (r for row in expected for r in row), strict=True):
        assert a.raw_logprobs == pytest.approx(b.raw_logprobs, rel=1e-10, abs=1e-12)
        assert (a.finish, a.text, a.sample) == (b.finish, b.text, b.sample)


def test_prompt_order_padding_and_company_do_not_matter(policy: Policy, prompts: list[list[int]]) -> None:
    engine = TransformersEngine(policy)
    expected = ids(engine.generate(prompts, SPEC))
    order = [3, 0, 4, 2, 1]
    shuffled = ids(engine.generate([prompts[i] for i in order], SPEC, indices=order))
    assert [shuffled[order.index(i)] for i in range(5)] == expected
    for i, prompt in enumerate(prompts):  # alone: no left padding at all
        assert ids(engine.generate([prompt], SPEC, indices=[i])) == [expected[i]]
    long = prompts[1] * 6  # a long neighbour: everyone else gets much padding
    assert ids(engine.generate([long, *prompts], SPEC, indices=[99, *range(5)]))[1:] == expected


def test_runs_repeat_and_keys_differ(policy: Policy, prompts: list[list[int]]) -> None:
    engine = TransformersEngine(policy)
    state = torch.get_rng_state()
    first = ids(engine.generate(prompts, SPEC, purpose="rollout", step=3))
    assert ids(engine.generate(prompts, SPEC, purpose="rollout", step=3)) == first
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched
    others = [
        engine.generate(prompts, SPEC, purpose="evaluate", step=3),
        engine.generate(prompts, SPEC, purpose="rollout", step=4),
        engine.generate(prompts, SamplingConfig(n=3, max_new_tokens=14, seed=5), purpose="rollout", step=3),
        engine.generate(prompts, SPEC, purpose="rollout", step=3, indices=range(5, 10)),
    ]
    for other in others:
        assert all(a != b for a, b in zip(ids(other), first, strict=True))


def test_longer_budget_continues_the_same_completion(policy: Policy, prompts: list[list[int]]) -> None:
    short = ids(TransformersEngine(policy).generate(prompts, SPEC))
    longer = ids(TransformersEngine(policy).generate(prompts, SamplingConfig(n=3, max_new_tokens=30, seed=4)))
    for a, b in zip((r for row in short for r in row), (r for row in longer for r in row), strict=True):
        assert b[: len(a)] == a


@torch.no_grad()
def teacher_forced(
    policy: Policy, prompt: list[int], continuation: Completion, spec: SamplingConfig
) -> tuple[Any, Any]:
    """Log-probabilities from one plain forward over prompt and completion: no cache, no padding."""
    sequence = torch.tensor([[*prompt, *continuation.token_ids]])
    hidden = policy.hidden(sequence, torch.ones_like(sequence))[0, len(prompt) - 1 : -1]
    logits, picked = policy.head(hidden), torch.from_numpy(continuation.token_ids)[:, None]
    raw = torch.log_softmax(logits, -1).gather(1, picked)[:, 0]
    return sampling_logprobs(logits, spec).gather(1, picked)[:, 0], raw


@pytest.mark.parametrize(
    "settings_", [{}, {"temperature": 0.5}, {"top_k": 5}, {"temperature": 1.4, "top_p": 0.7, "top_k": 20}]
)
def test_logprobs_equal_a_plain_forward(policy: Policy, prompts: list[list[int]], settings_: dict[str, Any]) -> None:
    spec = SamplingConfig(n=2, max_new_tokens=12, **settings_)
    for prompt, row in zip(prompts, TransformersEngine(policy).generate(prompts, spec), strict=True):
        for continuation in row:
            tempered, raw = teacher_forced(policy, prompt, continuation, spec)
            assert continuation.logprobs == pytest.approx(tempered.tolist(), rel=1e-12, abs=1e-12)
            assert continuation.raw_logprobs == pytest.approx(raw.tolist(), rel=1e-12, abs=1e-12)


def test_reading_without_padding_fills_the_cache_as_reading_with_it(
    policy: Policy, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, readings = Decoder(policy, max_rows=8), []
    with torch.no_grad():
        for side in ("left", "right"):
            for unpads in (True, False):
                monkeypatch.setattr(policy, "can_unpad", unpads)
                readings.append(decoder.read(prompts, padding=side))
    for found, expected in (readings[:2], readings[2:]):
        real = expected.mask_PT.bool()
        assert torch.equal(found.mask_PT, expected.mask_PT)
        assert torch.allclose(found.hidden_PTH[real], expected.hidden_PTH[real], rtol=1e-10)
        for ours, theirs in zip(found.cache.layers, expected.cache.layers, strict=True):
            for name in ("keys", "values"):
                a, b = (getattr(layer, name).transpose(1, 2)[real] for layer in (ours, theirs))
                assert torch.allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_attention_of_one_query_draws_what_transformers_attention_does(
    policy: Policy, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    spec = SamplingConfig(n=4, max_new_tokens=70, temperature=temperature, seed=3)
    found = TransformersEngine(policy).generate(prompts, spec)
    monkeypatch.setattr(policy, "can_unpad", False)
    expected = TransformersEngine(policy).generate(prompts, spec)
    assert ids(found) == ids(expected)
    for a, b in zip((r for row in found for r in row), (r for row in expected for r in row), strict=True):
        assert a.raw_logprobs == pytest.approx(b.raw_logprobs, rel=1e-9, abs=1e-11)


def test_greedy_takes_the_most_likely_token(policy: Policy, prompts: list[list[int]]) -> None:
    spec = SamplingConfig(temperature=0, n=2, max_new_tokens=10)
    for prompt, row in zip(prompts, TransformersEngine(policy).generate(prompts, spec), strict=True):
        assert row[0].key == row[1].key
        assert set(row[0].logprobs) == {0.0}
        sequence = list(prompt)
        for token in row[0].token_ids:
            inputs = torch.tensor([sequence])
            logits = policy.head(policy.hidden(inputs, torch.ones_like(inputs))[:, -1])
            assert token == logits.argmax().item()
            sequence.append(token)


@pytest.mark.parametrize("family", ["qwen2_sliding", "gemma2", "mistral_sliding", "padded_vocabulary"])
def test_other_architectures(family: str) -> None:
    """Sliding windows (shorter than prompt and completion), soft-capping, padded rows: same tokens, exact logps."""
    other = Policy(*architecture(family))
    prompts = [other.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    spec = SamplingConfig(n=2, max_new_tokens=12, seed=1)
    exact = 1e-5 if family == "gemma2" else 1e-10
    expected = TransformersEngine(other).generate(prompts, spec)
    for max_rows in (1, 3):
        assert ids(TransformersEngine(other, max_rows=max_rows).generate(prompts, spec)) == ids(expected)
    for prompt, row in zip(prompts, expected, strict=True):
        for continuation in row:
            _, raw = teacher_forced(other, prompt, continuation, spec)
            assert continuation.raw_logprobs == pytest.approx(raw.tolist(), rel=exact, abs=exact)


def architecture(family: str) -> tuple[Any, Any]:
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    tokenizer = tiny_tokenizer()
    common: dict[str, Any] = {
        "vocab_size": 128 if family == "padded_vocabulary" else len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    if family == "qwen2_sliding":
        config = Qwen2Config(**common, use_sliding_window=True, sliding_window=6, max_window_layers=1)
        model: Any = Qwen2ForCausalLM(config)
    elif family == "gemma2":
        config = Gemma2Config(
            **common, head_dim=8, sliding_window=6, final_logit_softcapping=3.0, attn_logit_softcapping=5.0
        )
        model = Gemma2ForCausalLM(config)
    elif family == "mistral_sliding":
        model = MistralForCausalLM(MistralConfig(**common, sliding_window=6))
    else:
        model = LlamaForCausalLM(LlamaConfig(**common))
    # Gemma 2 caps attention scores, which only eager attention does, and that takes no float64 masks.
    return (model if family == "gemma2" else model.double()).eval(), tokenizer


class CountingBackbone(torch.nn.Module):
    """Counts calls and tokens read, then does what the backbone does."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.shapes: list[tuple[int, int]] = []

    def forward(self, **arguments: Any) -> Any:
        self.shapes.append(tuple(arguments["input_ids"].shape))
        return self.inner(**arguments)


def counted(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    counting = CountingBackbone(policy.causal_lm.base_model)
    for room in ("sampling.decode", "models.packed"):
        monkeypatch.setattr(f"stepkd.{room}.backbone_of", lambda _: counting)
    return counting.shapes


def test_every_prompt_is_read_once(policy: Policy, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = counted(policy, monkeypatch)
    spec = SamplingConfig(n=6, max_new_tokens=5, temperature=0)
    TransformersEngine(policy, max_rows=12).generate(prompts, spec)
    prefills = [shape for shape in shapes if shape[1] > 1]
    assert prefills == [(1, sum(map(len, part))) for part in (prompts[:2], prompts[2:4], prompts[4:])]  # no padding
    shapes.clear()
    TransformersEngine(policy, max_rows=4).generate(prompts[:1], spec)  # more samples than rows: still one prefill
    assert [shape for shape in shapes if shape[1] > 1] == [(1, len(prompts[0]))]
    assert [shape[0] for shape in shapes if shape[1] == 1] == [4] * 4 + [2] * 4


def test_finished_rows_leave_the_batch(
    policy: Policy, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = counted(policy, monkeypatch)
    spec = SamplingConfig(n=8, max_new_tokens=40, seed=2, stop=("a", "e", "i", "o", "u", "1", "2", "3"))
    finished: list[int] = []
    results = TransformersEngine(policy).generate(prompts, spec, on_progress=finished.append)
    continuations = [continuation for row in results for continuation in row]
    assert sum(finished) == len(continuations) == 40
    # a completion of T tokens costs its prompt's prefill and T - 1 single tokens, nothing more
    assert sum(rows for rows, width in shapes if width == 1) == sum(len(r.token_ids) - 1 for r in continuations)
    assert len({len(r.token_ids) for r in continuations}) > 3


def scripted(policy: Policy, monkeypatch: pytest.MonkeyPatch, script: list[int]) -> TransformersEngine:
    """An engine whose model is certain of ``script``, token after token."""
    calls = iter(script)

    def head(hidden_BH: torch.Tensor) -> torch.Tensor:
        logits = torch.full((hidden_BH.shape[0], policy.vocab_size), -1e4, dtype=torch.float64)
        logits[:, next(calls)] = 0
        return logits

    monkeypatch.setattr(Policy, "head", property(lambda _: head))
    return TransformersEngine(policy)


@pytest.mark.parametrize(
    ("script", "stop", "finish", "text"),
    [
        ("12<eos>|34", (), "stop", "12"),
        ("1234", (), "length", "1234"),
        ("1\nQ:|34", ("\nQ:",), "stop", "1"),
        ("1 Q:| x", ("zz", " Q:"), "stop", "1"),
        ("123#", ("#",), "stop", "123"),
        ("x<unk>y<eos>", (), "stop", "xy"),
        ("a####|b", ("##",), "stop", "a"),  # the stop string is a part of one token
        ("aab", ("ab", "aab"), "stop", ""),
    ],
)
def test_finish_reasons(
    policy: Policy,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    stop: tuple[str, ...],
    finish: str,
    text: str,
) -> None:
    """The model says ``script``; a ``|`` shows where the completion must end before that."""
    drawn, _, rest = script.partition("|")
    tokens, never = (policy.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (drawn, rest))
    engine = scripted(policy, monkeypatch, tokens + never)
    continuation = engine.generate([[5]], SamplingConfig(stop=stop, max_new_tokens=len(tokens + never)))[0][0]
    assert (continuation.finish, continuation.text) == (finish, text)
    assert list(continuation.token_ids) == tokens


def test_the_context_ends_a_completion(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy.causal_lm.config, "max_position_embeddings", 8)
    results = TransformersEngine(policy).generate(
        [[5] * 3, [6] * 7], SamplingConfig(n=1, max_new_tokens=50, stop=("#",))
    )
    assert [len(row[0].token_ids) for row in results] == [5, 1]
    assert [row[0].finish for row in results] == ["length", "length"]
    with pytest.raises(DataError, match=r"prompt 12 has 8 tokens and the model's context is 8: use fewer few-shot"):
        TransformersEngine(policy).generate([[5], [5] * 8], SPEC, indices=[11, 12])


def test_modes_stay_as_they_were() -> None:
    policy = tiny_policy()
    policy.train()
    policy.model.model.layers[0].eval()  # a part that is frozen for good
    modes = [module.training for module in policy.modules()]
    assert len(set(modes)) == 2
    TransformersEngine(policy).generate([[5, 6]], SPEC)
    assert [module.training for module in policy.modules()] == modes
    with pytest.raises(DataError):
        TransformersEngine(policy).generate([[]], SPEC)
    policy.causal_lm.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TransformersEngine(policy).generate([[5, 6]], SPEC)
    assert [module.training for module in policy.modules()] == modes
    policy.eval()
    assert not policy.training


def test_dropout_and_gradient_checkpointing_are_off_while_sampling() -> None:
    from peft import LoraConfig, get_peft_model

    plain = tiny_policy()
    expected = TransformersEngine(plain).generate([[5, 6, 7]], SPEC)
    adapted = Policy(
        get_peft_model(copy.deepcopy(plain.model), LoraConfig(r=2, lora_dropout=0.9, target_modules="all-linear")),
        plain.tokenizer,
    )
    adapted.causal_lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    adapted.train()
    assert ids(TransformersEngine(adapted).generate([[5, 6, 7]], SPEC)) == ids(
        expected
    )  # a new adapter changes nothing
    assert all(p.grad is None for p in adapted.parameters())


@pytest.mark.skipif(not (fast_bfloat16() and torch.backends.mkldnn.is_available()), reason="no bfloat16 kernels here")
@pytest.mark.parametrize("tokens", [14, 20])
def test_weights_laid_out_for_the_cpu_draw_the_same_samples(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(dtype="bfloat16")
    prompts = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    spec, calls = SamplingConfig(n=3, max_new_tokens=tokens, seed=4), []
    own = packed._packed_linear
    monkeypatch.setattr(packed, "_packed_linear", lambda *given: calls.append(1) or own(*given))
    found = TransformersEngine(policy).generate(prompts, spec)
    assert bool(calls) == (tokens >= packed.PACKED_FROM)  # not for a few tokens
    assert not any("forward" in vars(module) for module in policy.modules())  # training never meets them
    monkeypatch.setattr(packed, "PACKED_FROM", 10**9)
    expected = TransformersEngine(policy).generate(prompts, spec)
    assert ids(found) == ids(expected)
    assert [each.logprobs.tolist() for row in found for each in row] == [
        each.logprobs.tolist() for row in expected for each in row
    ]


def test_bfloat16_flips_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Not zero by right: rounding differs between batch shapes. Counted so that a jump is seen."""
    policy = tiny_policy(dtype="bfloat16")
    prompts = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    spec = SamplingConfig(n=4, max_new_tokens=24)
    one = TransformersEngine(policy, max_rows=1).generate(prompts, spec)
    many = TransformersEngine(policy, max_rows=64).generate(prompts, spec)
    flips = sum(a.key != b.key for x, y in zip(one, many, strict=True) for a, b in zip(x, y, strict=True))
    with capsys.disabled():
        print(f"\nbfloat16, max_rows 1 against 64: {flips} of 20 completions differ")
    assert all(max(r.raw_logprobs) <= 0 for row in one for r in row)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: TransformersEngine(p, max_rows=0), ConfigError, "max_rows=0: must be at least 1"),
        (lambda p: TransformersEngine(p).generate([[5], []], SPEC), DataError, "prompt 1 has no tokens"),
        (
            lambda p: TransformersEngine(p).generate([[5]], SPEC, indices=[1, 2]),
            ValueError,
            "zip() argument 2 is longer",
        ),
    ],
)
def test_bad_calls(policy: Policy, call: Callable[[Policy], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(policy)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_diverged_model_is_named(temperature: float) -> None:
    policy = tiny_policy()
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"logits are not numbers \(NaN\) at token 0 of a completion of prompt 0"):
        TransformersEngine(policy).generate([[5, 6]], SamplingConfig(temperature=temperature))
