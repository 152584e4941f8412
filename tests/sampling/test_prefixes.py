"""Going on from what is kept gives what reading everything anew gives, and reads less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_policy import tiny_policy

from stepkd.data.completion import Completion
from stepkd.models.policy import Policy
from stepkd.models.spec import tiny_tokenizer
from stepkd.sampling.annotate import annotate
from stepkd.sampling.cache import Prefixes
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine

SPEC = SamplingConfig(n=2, max_new_tokens=9, seed=3)
PROMPTS = ["1+2=", "a much longer text than the others: 17*3=51\nso", "7"]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


def engine_of(policy: Policy, *, keeps: bool, max_rows: int = 64) -> TransformersEngine:
    engine = TransformersEngine(policy, max_rows=max_rows)
    engine.keeps_prefixes = keeps
    return engine


def encode(text: str) -> list[int]:
    return list(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def searched(engine: TransformersEngine, rounds: int = 3, more: str = "") -> list[Completion]:
    """Continuations of continuations, cut at different lengths, beside a new prompt in every round."""
    prompts, found = [encode(text) for text in PROMPTS], []
    for number in range(rounds):
        new = encode(f"new in round {number}: ")
        drawn = engine.generate([*prompts, new], SPEC, step=number, entropies=True)
        flat = [each for own in drawn for each in own]
        found += flat
        cuts = [each.token_ids[: 1 + i % len(each.token_ids)].tolist() for i, each in enumerate(flat)]
        prompts = [[*each.prompt_ids.tolist(), *cut, *encode(more)] for each, cut in zip(flat, cuts, strict=True)]
        prompts = prompts[:6]
    return found


def assert_same(actual: Sequence[Completion], expected: Sequence[Completion], within: float) -> None:
    assert [each.key for each in actual] == [each.key for each in expected]
    for a, b in zip(actual, expected, strict=True):
        for name in ("logprobs", "raw_logprobs", "entropies"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=within, abs=within)


@pytest.mark.parametrize(("dtype", "within", "more"), [("float64", 1e-10, " so"), ("float32", 1e-5, "")])
def test_going_on_equals_reading_anew(dtype: str, within: float, more: str) -> None:
    policy = tiny_policy(dtype=dtype)
    expected = searched(engine_of(policy, keeps=False), more=more)
    assert len({each.key for each in expected}) > 20
    max_rows = 3 if more else 64
    assert_same(searched(engine_of(policy, keeps=True, max_rows=max_rows), more=more), expected, within)


def tokens_read(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Places of each forward pass of more than one column."""
    read: list[int] = []
    forward, unpadded = engine._decoder.forward, engine._decoder.read

    def counted(input_ids: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        read.append(input_ids.numel())
        return forward(input_ids, *arguments, **more)

    def whole(sequences: Sequence[Sequence[int]], **more: Any) -> Any:
        read.append(sum(map(len, sequences)))
        return unpadded(sequences, **more)

    monkeypatch.setattr(engine._decoder, "forward", counted)
    monkeypatch.setattr(engine._decoder, "read", whole)
    return read


def test_what_is_known_is_not_read(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(policy, keeps=True)
    greedy = SamplingConfig(temperature=0, max_new_tokens=8)
    prompt = encode(PROMPTS[1])
    ((first,),) = engine.generate([prompt], greedy)
    read = tokens_read(engine, monkeypatch)
    engine.generate([[*prompt, *first.token_ids.tolist(), *encode("abc")]], greedy)
    assert read[0] == 4, "the token that was drawn last, and three new ones"
    read.clear()
    engine.generate([[*prompt, *first.token_ids[:4].tolist()]] * 2, greedy)
    assert read[0] == 1, "the last token, of both at once"
    read.clear()
    engine.forget()
    engine.generate([prompt], greedy)
    assert read[0] == len(prompt)


def fused_step(weight: torch.nn.Parameter) -> None:
    optimizer = torch.optim.AdamW([weight], lr=0.05, fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()


CHANGES = {
    "in place": lambda weight: weight.add_(0.05),
    "by data": lambda weight: weight.data.add_(0.05),
    "other data": lambda weight: setattr(weight, "data", weight.data + 0.05),
    "fused step": fused_step,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_weights_are_read_with(change: Callable[[torch.nn.Parameter], Any]) -> None:
    policy = tiny_policy()
    engine = engine_of(policy, keeps=True)
    before = searched(engine, rounds=2)
    with torch.no_grad():
        change(policy.causal_lm.get_input_embeddings().weight)
    after = searched(engine, rounds=2)
    assert [each.key for each in after] != [each.key for each in before]
    assert_same(after, searched(engine_of(policy, keeps=False), rounds=2), 1e-10)
    engine.update(1)
    assert engine._prefixes.bytes == 0


def test_memory_is_bounded(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(policy, keeps=True)
    engine._prefixes = kept = Prefixes(100_000)
    cleared: list[int] = []
    monkeypatch.setattr(kept, "clear", lambda: (cleared.append(kept.bytes), Prefixes.clear(kept)))
    assert_same(searched(engine, rounds=2), searched(engine_of(policy, keeps=False), rounds=2), 1e-10)
    assert kept.bytes <= 100_000
    assert max(cleared) > 50_000


@pytest.mark.parametrize("ends", [False, True])
def test_what_has_ended_is_not_kept(policy: Policy, monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    """The token drawn sixth is an end token, or the last for which there is room."""
    engine, prompt = engine_of(policy, keeps=True), encode(PROMPTS[1])
    spec = SamplingConfig(max_new_tokens=6, seed=3)
    ((drawn,),) = engine.generate([prompt], spec)
    *before, last = drawn.token_ids.tolist()
    assert len(before) == 5
    assert last not in before
    engine.forget()
    monkeypatch.setattr(type(policy), "eos_ids", frozenset([last] if ends else []))
    ((again,),) = engine.generate([prompt], spec)
    assert (again.token_ids.tolist(), again.finish) == ([*before, last], "stop" if ends else "length")
    assert engine._prefixes.known([*prompt, *before, last]) == len(prompt) + (0 if ends else 5)


def test_models_that_cannot_skip_columns_keep_nothing(policy: Policy) -> None:
    engine = engine_of(policy, keeps=True)
    engine._gap_limit = 100  # as of a sliding window
    searched(engine, rounds=1)
    assert engine._prefixes.bytes == 0


def test_others_keep_nothing(policy: Policy) -> None:
    engine = TransformersEngine(policy)
    searched(engine, rounds=1)
    assert engine._prefixes.bytes == 0


def test_siblings_share_what_they_have_in_common() -> None:
    kept = Prefixes()

    def cache(columns: int) -> Any:
        layer = SimpleNamespace(keys=torch.ones(2, 3, columns, 4), values=torch.ones(2, 3, columns, 4))
        return SimpleNamespace(layers=[layer])

    kept.add([5, 6, 7], 0, cache(5), 1, 5)
    one_token = 2 * 3 * 4 * 4
    assert kept.bytes == 3 * one_token
    assert [kept.known(ids) for ids in ([5], [5, 6], [5, 6, 7], [5, 6, 7, 8], [5, 9, 7], [6])] == [0, 1, 2, 3, 1, 0]
    kept.add([5, 6, 8, 9], 2, cache(2), 0, 2)
    kept.add([5, 6, 8, 9], 2, cache(2), 0, 2)
    assert (kept.bytes, kept.known([5, 6, 8, 9, 1])) == (5 * one_token, 4)
    kept.add([1, 2, 3], 1, cache(2), 0, 2)
    assert (kept.bytes, kept.known([1, 2, 3])) == (5 * one_token, 0), "what it goes on from is not kept"


def test_entropies_are_those_of_the_whole_distribution(policy: Policy) -> None:
    prompt = encode(PROMPTS[0])
    ((one, two),) = engine_of(policy, keeps=False).generate([prompt], SPEC, entropies=True)
    told = annotate(policy, [prompt, prompt], [one.token_ids.tolist(), two.token_ids.tolist()])
    for each, signals in zip((one, two), told, strict=True):
        assert each.entropies == pytest.approx(np.array(signals.entropies), rel=1e-9, abs=1e-9)
    ((plain, _),) = engine_of(policy, keeps=False).generate([prompt], SPEC)
    assert plain.entropies is None
