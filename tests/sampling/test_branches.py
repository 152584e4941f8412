"""Continuing every prefix of a sequence: shared reading equals reading anew; work, waves, fallbacks, bad cuts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_policy import tiny_policy

from stepkd.data.completion import Completion
from stepkd.errors import DataError, ModelError
from stepkd.models.policy import Policy
from stepkd.models.spec import tiny_tokenizer
from stepkd.sampling import branches
from stepkd.sampling.cache import room_for
from stepkd.sampling.decode import Decoder
from stepkd.sampling.engine import Branch, BranchContinuations, Engine, SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine

SPEC = SamplingConfig(n=3, max_new_tokens=10, seed=4)
TEXTS = ["1+2=", "a much longer text than the others: 17*3=51\nso 51+4=55\n#### 55", "7", "Step 1: x\nStep 2: y\n"]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


def encode(text: str) -> list[int]:
    return list(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="module")
def some() -> list[Branch]:
    """Sequences of 1 to 59 tokens with 1 to 10 cuts; the whole sequence and a single token among them."""
    sequences = [encode(text) for text in TEXTS]
    cuts = [[1, 4], [*range(1, 59, 7), len(sequences[1])], [1], [8, 9, 19]]
    return [Branch(ids, c, index) for ids, c, index in zip(sequences, cuts, (5, 0, 12, 3), strict=True)]


def flat(results: Sequence[BranchContinuations]) -> list[Completion]:
    return [continuation for branch in results for cut in branch.continuations for continuation in cut]


def assert_same(
    actual: Sequence[BranchContinuations], expected: Sequence[BranchContinuations], exact: float = 1e-10
) -> None:
    assert [[len(cut) for cut in branch.continuations] for branch in actual] == [
        [len(cut) for cut in branch.continuations] for branch in expected
    ]
    for a, b in zip(flat(actual), flat(expected), strict=True):
        assert (a.key, a.finish, a.text, a.sample) == (b.key, b.finish, b.text, b.sample)
        assert a.logprobs == pytest.approx(b.logprobs, rel=exact, abs=exact)
        assert a.raw_logprobs == pytest.approx(b.raw_logprobs, rel=exact, abs=exact)


def reading_apart(policy: Policy, max_rows: int = 64) -> TransformersEngine:
    """An engine that reads every prefix anew, as it does where a model can skip no part of its cache."""
    engine = TransformersEngine(policy, max_rows=max_rows)
    engine._gap_limit = 0
    return engine


def test_shape_of_the_answer(policy: Policy, some: list[Branch]) -> None:
    results = TransformersEngine(policy).continue_branches(some, SPEC)
    for branch, result in zip(some, results, strict=True):
        assert len(result.continuations) == len(branch.cuts)
        for end, cut in zip(branch.cuts, result.continuations, strict=True):
            prefix = list(branch.token_ids[:end])
            assert [(r.prompt_ids.tolist(), r.sample) for r in cut] == [(prefix, j) for j in range(3)]
    assert all(1 <= len(r.token_ids) <= 10 for r in flat(results))
    assert len({r.token_ids.tobytes() for r in flat(results)}) == len(flat(results))  # every sample has its own noise
    assert TransformersEngine(policy).continue_branches([], SPEC) == []
    assert TransformersEngine(policy).continue_branches([Branch([5], [], 0)], SPEC) == [BranchContinuations((), 0)]


@pytest.mark.parametrize("max_rows", [pytest.param(1, marks=pytest.mark.slow), 7, 64])
@pytest.mark.parametrize("settings_", [{}, {"temperature": 0}, {"temperature": 1.3, "top_k": 20, "top_p": 0.9}])
def test_shared_reading_changes_nothing(
    policy: Policy, some: list[Branch], max_rows: int, settings_: dict[str, Any]
) -> None:
    spec = SamplingConfig(n=3, max_new_tokens=10, seed=4, stop=("e", "1"), **settings_)
    expected = reading_apart(policy).continue_branches(some, spec)
    assert spec.temperature == 0 or {r.finish for r in flat(expected)} == {"stop", "length"}
    assert_same(TransformersEngine(policy, max_rows=max_rows).continue_branches(some, spec), expected)
    assert_same(reading_apart(policy, max_rows=max_rows).continue_branches(some, spec), expected)


@torch.no_grad()
def test_logprobs_equal_a_plain_forward(policy: Policy, some: list[Branch]) -> None:
    """No cache, no padding, no mask: one pass over the prefix and its continuation."""
    results = TransformersEngine(policy, max_rows=5).continue_branches(some, SPEC)
    for branch, result in zip(some, results, strict=True):
        for cut, continuations in zip(branch.cuts, result.continuations, strict=True):
            for continuation in continuations:
                sequence = torch.tensor([[*branch.token_ids[:cut], *continuation.token_ids]])
                hidden = policy.hidden(sequence, torch.ones_like(sequence))[0, cut - 1 : -1]
                logps = torch.log_softmax(policy.head(hidden), -1)
                raw = logps.gather(1, torch.from_numpy(continuation.token_ids)[:, None])[:, 0]
                assert continuation.raw_logprobs == pytest.approx(raw.tolist(), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("shared", [True, False])
def test_equals_sampling_from_the_prefix(
    policy: Policy, some: list[Branch], monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """With the same uniform numbers for all, a continuation is the completion of its prefix."""
    monkeypatch.setattr("stepkd.sampling.decode.generator", lambda *_: np.random.default_rng(8))
    engine = TransformersEngine(policy) if shared else reading_apart(policy)
    prefixes = [branch.token_ids[:cut] for branch in some for cut in branch.cuts]
    completions = engine.generate(prefixes, SPEC)
    continuations = [cut for result in engine.continue_branches(some, SPEC) for cut in result.continuations]
    assert [[r.key for r in row] for row in continuations] == [[r.key for r in row] for row in completions]
    for a, b in zip(continuations, completions, strict=True):
        assert a[0].raw_logprobs == pytest.approx(b[0].raw_logprobs, rel=1e-10, abs=1e-10)


def test_noise_is_keyed_by_what_is_continued(
    policy: Policy, some: list[Branch], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepkd.randomness import generator

    keys = []

    def noted(*key: Any) -> Any:
        keys.append(key)
        return generator(*key)

    monkeypatch.setattr("stepkd.sampling.decode.generator", noted)
    TransformersEngine(policy).continue_branches(some, SPEC, purpose="label", step=6)
    assert sorted(keys) == sorted((4, "label", 6, b.index, cut, j) for b in some for cut in b.cuts for j in range(3))


def test_an_engine_without_shared_reading_asks_for_every_prefix(policy: Policy, some: list[Branch]) -> None:
    """As any engine does that has only ``generate``; greedy, since the noise of a prefix is keyed otherwise there."""
    engine, spec = TransformersEngine(policy), replace(SPEC, n=1, temperature=0.0)
    found = Engine._continue(engine, some, spec, ("branch", 0), None)
    assert_same(found, engine.continue_branches(some, spec))
    assert [each.prefill_tokens for each in found] == [sum(branch.cuts) for branch in some]


def test_company_and_order_do_not_matter(policy: Policy, some: list[Branch]) -> None:
    engine = TransformersEngine(policy, max_rows=6)
    expected = engine.continue_branches(some, SPEC)
    backwards = engine.continue_branches(some[::-1], SPEC)[::-1]
    assert [r.key for r in flat(backwards)] == [r.key for r in flat(expected)]
    for position, branch in enumerate(some):
        alone = engine.continue_branches([branch], SPEC)
        assert [r.key for r in flat(alone)] == [r.key for r in flat(expected[position : position + 1])]
        assert alone[0].prefill_tokens == expected[position].prefill_tokens
    fewer = engine.continue_branches([Branch(some[1].token_ids, [8, 29], 0)], SPEC)  # two of the cuts, read to 29
    of_cut = dict(zip(some[1].cuts, expected[1].continuations, strict=True))
    assert [r.key for r in flat(fewer)] == [r.key for cut in (8, 29) for r in of_cut[cut]]


class Watched(torch.nn.Module):
    """Notes the arguments of every pass, then does what the backbone does."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.passes: list[dict[str, Any]] = []

    def forward(self, **arguments: Any) -> Any:
        self.passes.append(arguments)
        return self.inner(**arguments)


def watched(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    watching = Watched(policy.causal_lm.base_model)
    for room in ("sampling.decode", "models.packed"):
        monkeypatch.setattr(f"stepkd.{room}.backbone_of", lambda _: watching)
    return watching.passes


def read(passes: list[dict[str, Any]]) -> int:
    """Real tokens of the passes that read sequences, with padding or without."""
    unpadded = sum(p["input_ids"].numel() for p in passes if "unpadded_rows" in p)
    return unpadded + sum(int(p["attention_mask"].sum()) for p in passes if p["past_key_values"] is None)


def test_every_prefix_token_is_read_once(policy: Policy, some: list[Branch], monkeypatch: pytest.MonkeyPatch) -> None:
    passes = watched(policy, monkeypatch)
    spec = SamplingConfig(n=4, max_new_tokens=5, seed=1)
    engine = TransformersEngine(policy, max_rows=8)
    engine.continue_branches([], spec)  # the probe
    passes.clear()
    results = engine.continue_branches(some, spec)
    longest = [branch.cuts[-1] for branch in some]
    generated = sum(len(r.token_ids) for r in flat(results))
    assert [result.prefill_tokens for result in results] == longest
    # What the model itself was given: the sequences once, and every drawn token but a continuation's last.
    assert read(passes) == sum(longest)
    decoded = [p["input_ids"].shape for p in passes if "one_query" in p]
    assert {width for _, width in decoded} == {1}
    assert sum(rows for rows, _ in decoded) == generated - len(flat(results))
    assert max(rows for rows, _ in decoded) <= 8

    passes.clear()
    apart = reading_apart(policy, max_rows=8).continue_branches(some, spec)
    assert [result.prefill_tokens for result in apart] == [sum(branch.cuts) for branch in some]
    assert read(passes) == sum(sum(branch.cuts) for branch in some)


def test_masks_hide_what_comes_after_the_cut(
    policy: Policy, some: list[Branch], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = watched(policy, monkeypatch)
    engine = TransformersEngine(policy, max_rows=4)
    engine.continue_branches([], SPEC)
    passes.clear()
    branch = Branch(some[1].token_ids, [3, 30, 59], 0)
    engine.continue_branches([branch], SamplingConfig(n=2, max_new_tokens=3, seed=11))
    steps = [p for p in passes if "one_query" in p]
    seen = [(p["attention_mask"][:, 0, 0].tolist(), p["position_ids"].flatten().tolist()) for p in steps]
    # 6 rows in two parts of 3, the longest prefixes first; the second part is cropped to 30 columns.
    expected = []
    for cuts in ([59, 59, 30], [30, 3, 3]):
        for t in (1, 2):
            empty = [0] * (room_for(max(cuts) + t) - max(cuts) - t)
            masks = [[1] * cut + [0] * (max(cuts) - cut) + [1] * t + empty for cut in cuts]
            expected.append((masks, [cut + t - 1 for cut in cuts]))
    assert seen == expected


def test_progress_counts_every_continuation(policy: Policy, some: list[Branch]) -> None:
    for engine in (TransformersEngine(policy, max_rows=7), reading_apart(policy, max_rows=7)):
        finished: list[int] = []
        results = engine.continue_branches(some, SPEC, on_progress=finished.append)
        assert sum(finished) == len(flat(results))


def architecture(family: str, window: int = 6) -> Policy:
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        MptConfig,
        MptForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    tokenizer = tiny_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        **ids,
    }
    torch.manual_seed(0)
    if family == "qwen2_full":
        model: Any = Qwen2ForCausalLM(Qwen2Config(**common))
    elif family == "qwen2_sliding":
        config = Qwen2Config(**common, use_sliding_window=True, sliding_window=window, max_window_layers=1)
        model = Qwen2ForCausalLM(config)
    elif family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**common, head_dim=8, sliding_window=window))
    elif family == "mpt":
        model = MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=len(tokenizer), **ids))
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(8 if weight.ndim > 1 else 1)
    else:
        model = MistralForCausalLM(MistralConfig(**common, sliding_window=window))
    return Policy((model if family in ("gemma2", "mpt") else model.double()).eval(), tokenizer)


@pytest.mark.parametrize(
    ("family", "window", "shares"),
    [
        ("qwen2_full", 0, True),
        ("qwen2_sliding", 6, False),
        ("mistral", 3, False),
        ("mistral", 500, True),
        ("gemma2", 6, False),
        ("mpt", 0, False),
    ],
)
def test_other_architectures(family: str, window: int, shares: bool, some: list[Branch]) -> None:
    """Where a gap would change the result, prefixes are read anew: same tokens either way."""
    other = architecture(family, window)
    exact = 1e-4 if family in ("gemma2", "mpt") else 1e-10
    expected = reading_apart(other).continue_branches(some, SPEC)
    for max_rows in (3, 64):
        results = TransformersEngine(other, max_rows=max_rows).continue_branches(some, SPEC)
        assert_same(results, expected, exact)
        # A single cut costs the same either way.
        assert [r.prefill_tokens for r in results] == [b.cuts[-1] if shares else sum(b.cuts) for b in some]


def test_a_window_longer_than_the_sequence_is_no_obstacle(some: list[Branch]) -> None:
    """Decided for each sequence by itself, so that its cost does not depend on the company."""
    other = architecture("mistral", window=40)
    expected = reading_apart(other).continue_branches(some, SPEC)
    results = TransformersEngine(other).continue_branches(some, SPEC)
    assert_same(results, expected)
    assert [r.prefill_tokens for r in results] == [4, sum(some[1].cuts), 1, 19]
    # 29 columns and 10 new ones stay below the window of 40; one more does not.
    for cut, read in ((29, 29 * 1), (30, 7 + 30)):
        branch = Branch(some[1].token_ids, [7, cut], 0)
        shared = TransformersEngine(other).continue_branches([branch], SPEC)
        apart = reading_apart(other).continue_branches([branch], SPEC)
        assert_same(shared, apart)
        assert shared[0].prefill_tokens == read


def test_the_probe_sees_a_gap_that_matters(policy: Policy) -> None:
    assert branches.gap_limit(Decoder(policy, max_rows=1)) == math.inf
    assert branches.gap_limit(Decoder(tiny_policy(dtype="bfloat16"), max_rows=1)) == math.inf
    assert branches.gap_limit(Decoder(architecture("mistral", 40), max_rows=1)) == 39
    assert branches.gap_limit(Decoder(architecture("mpt"), max_rows=1)) == 0


def test_the_context_ends_a_continuation(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy.causal_lm.config, "max_position_embeddings", 8)
    spec = SamplingConfig(n=1, max_new_tokens=50, stop=("#",))
    for engine in (TransformersEngine(policy), reading_apart(policy)):
        result = engine.continue_branches([Branch([5] * 7, [3, 7], 0)], spec)[0]
        assert [len(cut[0].token_ids) for cut in result.continuations] == [5, 1]
    with pytest.raises(DataError, match="a prefix of branch 9 has 8 tokens and the model's context is 8"):
        engine.continue_branches([Branch([5] * 9, [7, 8], 9)], spec)
    monkeypatch.setattr(policy.causal_lm.config, "max_position_embeddings", 5)
    assert branches.gap_limit(Decoder(policy, max_rows=1)) == 0


def test_modes_stay_as_they_were() -> None:
    policy = tiny_policy()
    policy.train()
    TransformersEngine(policy).continue_branches([Branch([5, 6], [1, 2], 0)], SPEC)
    assert all(module.training for module in policy.modules())
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"logits are not numbers \(NaN\) at token 0"):
        TransformersEngine(policy).continue_branches([Branch([5, 6], [1, 2], 0)], SPEC)
    assert all(module.training for module in policy.modules())


@pytest.mark.parametrize("cuts", [[0, 1], [3], [2, 1], [1, 1]])
def test_cuts_that_are_no_prefixes(policy: Policy, cuts: list[int]) -> None:
    with pytest.raises(AssertionError):
        TransformersEngine(policy).continue_branches([Branch([5, 6], cuts, 7)], SPEC)
